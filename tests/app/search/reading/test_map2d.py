import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.manifold import trustworthiness

from app.search.collection import Vector
from app.search.reading import map2d
from app.search.reading.file import Kept
from app.search.reading.map2d import compute_map
from tests.app.search.planted import at_cosine, clusters, directions, ignore, spool_of

Places = npt.NDArray[np.float32]


def mapped(tmp_path: Path, vectors: Vector, previous: Kept | None = None, *, threads: int = 1) -> Kept:
    spool = spool_of(tmp_path, vectors)
    arrays, facts = compute_map(spool, previous=previous, threads=threads, report=ignore)
    places = arrays["xy"]
    assert places.shape == (len(vectors), 2)
    assert np.isfinite(places).all()
    assert (np.abs(places) <= 1).all()
    return Kept(facts, arrays)


def own_cluster_share(places: Places, labels: npt.NDArray[np.int64]) -> float:
    """Of items, how many have their nearest on the map from their own cluster."""
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return float((labels[distances.argmin(axis=1)] == labels).mean())


def test_neighbours_in_the_embedding_are_neighbours_on_the_map(tmp_path: Path) -> None:
    vectors, labels = clusters(15, each=40, dimensions=64, spread=0.7)
    places = mapped(tmp_path, vectors).arrays["xy"]
    # 1 is perfect and 0.5 is chance; a PCA of two axes alone has 0.75 on these.
    assert trustworthiness(vectors, places, n_neighbors=10, metric="cosine") > 0.93
    assert own_cluster_share(places, labels) > 0.99
    assert np.abs(places).max() == 1.0  # it fills its box


def test_the_same_vectors_have_the_same_map_however_many_threads_make_it(tmp_path: Path) -> None:
    vectors, _ = clusters(5, each=30)
    first = mapped(tmp_path, vectors).arrays["xy"]
    np.testing.assert_array_equal(mapped(tmp_path, vectors).arrays["xy"], first)
    np.testing.assert_array_equal(mapped(tmp_path, vectors, threads=2).arrays["xy"], first)


def test_new_items_are_placed_near_their_nearest_and_the_others_stay(tmp_path: Path) -> None:
    vectors, labels = clusters(10, each=40, dimensions=48, spread=0.6)
    before = mapped(tmp_path, vectors)
    chosen = np.arange(0, 400, 8)
    new = np.stack([at_cosine(vectors[i], 0.97, seed=int(i)) for i in chosen])
    after = mapped(tmp_path, np.concatenate([vectors, new]), before)
    assert after.facts == {"fitted_items": 400, "placed_items": 50}
    np.testing.assert_array_equal(after.arrays["xy"][:400], before.arrays["xy"])
    placed = after.arrays["xy"][400:]
    distances = np.linalg.norm(placed[:, None] - before.arrays["xy"][None], axis=2)
    assert (labels[distances.argmin(axis=1)] == labels[chosen]).mean() > 0.95
    near = np.linalg.norm(placed - before.arrays["xy"][chosen], axis=1)
    assert np.median(near) < 0.1 * np.median(distances)

    # What was placed stays, too, when more comes and some go; and equal vectors have one place.
    left = np.concatenate([vectors[:390], new, new[:1]])
    later = mapped(tmp_path, left, after)
    np.testing.assert_array_equal(later.arrays["xy"][:390], before.arrays["xy"][:390])
    np.testing.assert_array_equal(later.arrays["xy"][390:440], placed)
    np.testing.assert_array_equal(later.arrays["xy"][440], placed[0])


def test_a_collection_that_grew_by_half_is_fitted_anew(tmp_path: Path) -> None:
    vectors = directions(120, 16)
    before = mapped(tmp_path, vectors[:80])
    assert mapped(tmp_path, vectors[:119], before).facts == {"fitted_items": 80, "placed_items": 39}
    anew = mapped(tmp_path, vectors, before)
    assert anew.facts == {"fitted_items": 120, "placed_items": 0}
    # What came before leaves no trace.
    np.testing.assert_array_equal(anew.arrays["xy"], mapped(tmp_path, vectors).arrays["xy"])


def test_a_collection_that_lost_half_is_fitted_anew(tmp_path: Path) -> None:
    vectors = directions(100, 16)
    before = mapped(tmp_path, vectors)
    assert mapped(tmp_path, vectors[:50], before).facts["fitted_items"] == 100
    assert mapped(tmp_path, vectors[:49], before).facts["fitted_items"] == 49
    assert mapped(tmp_path, vectors[:0], before).facts["fitted_items"] == 0


def test_above_a_size_a_sample_is_fitted_and_the_rest_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map2d, "MAX_FITTED", 300)
    vectors, labels = clusters(10, each=120, dimensions=48, spread=0.6)
    found = mapped(tmp_path, vectors)
    assert found.arrays["reference_xy"].shape == (300, 2)
    assert own_cluster_share(found.arrays["xy"], labels) > 0.97
    assert trustworthiness(vectors, found.arrays["xy"], n_neighbors=10, metric="cosine") > 0.9
    # All of them were there at the fit, so it is none of them that a later map counts as new.
    assert found.facts == {"fitted_items": 1_200, "placed_items": 0}


def test_the_interpolated_gradient_of_large_collections_keeps_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(map2d, "_FFT_ABOVE", 100)
    vectors, labels = clusters(8, each=30, spread=0.6)
    before = mapped(tmp_path, vectors[:-20])
    places = mapped(tmp_path, vectors, before).arrays["xy"]
    assert own_cluster_share(places, labels) > 0.97


@pytest.mark.parametrize("dimensions", [1, 2, 512])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 6, 12])
def test_a_handful_has_a_map_in_any_number_of_dimensions(tmp_path: Path, count: int, dimensions: int) -> None:
    places = mapped(tmp_path, directions(count, dimensions)).arrays["xy"]
    if dimensions > 2:
        assert len(np.unique(places, axis=0)) == count


def test_all_items_identical_are_one_place_in_the_middle(tmp_path: Path) -> None:
    vectors = np.repeat(directions(1, 16), 40, axis=0)
    before = mapped(tmp_path, vectors)
    np.testing.assert_array_equal(before.arrays["xy"], np.zeros((40, 2)))
    # And another one beside them.
    mapped(tmp_path, np.concatenate([vectors, directions(1, 16, seed=2)]), before)


def test_many_copies_of_some_do_not_crowd_out_the_others(tmp_path: Path) -> None:
    vectors, labels = clusters(6, each=25, spread=0.5)
    vectors = np.concatenate([np.repeat(vectors[:1], 500, axis=0), vectors])
    places = mapped(tmp_path, vectors).arrays["xy"][500:]
    assert own_cluster_share(places, labels) > 0.97


def test_photographs_have_a_map_that_keeps_their_neighbours(tmp_path: Path) -> None:
    shared = Path(os.environ.get("DINO_SHARED", Path(__file__).parents[4].parent / "shared"))
    files = sorted((shared / "data" / "imagenette" / "val").glob("*/*"))[::8]
    if not files:
        pytest.skip("needs photographs in ../shared/data (or under DINO_SHARED)")
    from PIL import Image

    # Small pictures of light, shade and colour: real data with real outliers, and no model to load.
    pixels = [
        np.asarray(Image.open(file).convert("RGB").resize((8, 8)), np.float32).ravel() for file in files
    ]
    vectors = np.stack(pixels) - 128
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    places = mapped(tmp_path, vectors).arrays["xy"]
    assert trustworthiness(vectors, places, n_neighbors=10, metric="cosine") > 0.9
