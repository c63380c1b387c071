from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from app.search.reading.clusters import OUTLIERS, REPRESENTATIVES, chosen_count, find_clusters
from tests.app.search.planted import clusters, directions, ignore, spool_of


@pytest.mark.parametrize("seed", range(3))
def test_planted_clusters_are_recovered(tmp_path: Path, seed: int) -> None:
    vectors, labels = clusters(12, each=60, spread=0.5, seed=seed)
    found = find_clusters(spool_of(tmp_path, vectors), count=12, report=ignore)
    assert adjusted_rand_score(labels, found["labels"]) > 0.999
    assert found["sizes"].tolist() == [60] * 12


def test_sizes_cohesion_and_labels_agree_with_a_count(tmp_path: Path) -> None:
    parts = [clusters(1, each=size, spread=0.4, seed=10 + size)[0] for size in (10, 80, 30)]
    vectors = np.concatenate(parts)
    found = find_clusters(spool_of(tmp_path, vectors), count=3, report=ignore)
    assert found["sizes"].tolist() == [80, 30, 10]  # the largest first
    assert found["labels"].tolist() == [2] * 10 + [0] * 80 + [1] * 30
    for cluster in range(3):
        members = vectors[found["labels"] == cluster].astype(np.float64)
        centroid = members.sum(axis=0)
        centroid /= np.linalg.norm(centroid)
        assert found["cohesion"][cluster] == pytest.approx((members @ centroid).mean(), abs=1e-3)


def test_representatives_are_members_near_the_middle_that_are_not_alike(tmp_path: Path) -> None:
    vectors, _ = clusters(2, each=100, spread=0.5)
    # The middle of the first cluster, 30 times over: one of them is enough.
    middle = vectors[:100].sum(axis=0) / np.linalg.norm(vectors[:100].sum(axis=0))
    vectors = np.concatenate([vectors, np.repeat(middle[None], 30, axis=0)]).astype(np.float32)
    found = find_clusters(spool_of(tmp_path, vectors), count=2, report=ignore)
    shown = found["representatives"][0]
    assert len(set(shown.tolist())) == REPRESENTATIVES
    assert (found["labels"][shown] == 0).all()
    assert shown[0] >= 200
    assert (shown >= 200).sum() == 1
    cosines = vectors[:100] @ middle
    assert (vectors[shown[1:]] @ middle).min() > np.percentile(cosines, 25)


def test_outliers_are_the_farthest_from_the_middle(tmp_path: Path) -> None:
    vectors, _ = clusters(2, each=50, spread=0.3)
    stranger = vectors[0] + 1.2 * directions(1, 32, seed=9)[0]
    vectors = np.concatenate([vectors, (stranger / np.linalg.norm(stranger))[None]]).astype(np.float32)
    found = find_clusters(spool_of(tmp_path, vectors), count=2, report=ignore)
    label = found["labels"][100]
    assert found["outliers"][label][0] == 100
    assert found["outliers"].shape == (2, OUTLIERS)


def test_the_number_grows_with_the_root_of_the_collection_up_to_a_hundred() -> None:
    assert [chosen_count(items) for items in (0, 1, 2, 50, 2_000, 100_000, 1_000_000)] == [
        2, 2, 2, 5, 32, 100, 100,
    ]  # fmt: skip


def test_there_are_never_more_clusters_than_different_vectors(tmp_path: Path) -> None:
    vectors = np.repeat(directions(3, 16), 40, axis=0)
    found = find_clusters(spool_of(tmp_path, vectors), count=50, report=ignore)
    assert found["sizes"].tolist() == [40, 40, 40]
    np.testing.assert_allclose(found["cohesion"], 1.0, atol=1e-6)
    same = find_clusters(spool_of(tmp_path, vectors[:40]), count=None, report=ignore)
    assert same["sizes"].tolist() == [40]


def test_rare_vectors_of_a_large_collection_have_their_clusters(tmp_path: Path) -> None:
    # A sample of 256 for each cluster would hardly meet the two that differ.
    vectors = np.repeat(directions(3, 8), [2_000, 1, 1], axis=0)
    found = find_clusters(spool_of(tmp_path, vectors), count=3, report=ignore)
    assert found["sizes"].tolist() == [2_000, 1, 1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_anything_is_hardly_any_clusters(tmp_path: Path, count: int) -> None:
    found = find_clusters(spool_of(tmp_path, directions(count, 512)), count=None, report=ignore)
    assert found["sizes"].tolist() == [1] * count
    assert found["representatives"].shape == (count, REPRESENTATIVES)
    assert found["representatives"][:, 0].tolist() == sorted(range(count))
    assert (found["outliers"] == -1).all()


def test_the_same_items_have_the_same_clusters(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, directions(800, 16))
    first = find_clusters(spool, count=None, report=ignore)
    second = find_clusters(spool, count=None, report=ignore)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
