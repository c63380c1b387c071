"""The IVF against comparing everything: recall, filters, what dies and comes, ties, and what it can't do."""

import faiss
import numpy as np
import numpy.typing as npt
import pytest

from app.search import ivf_tuning
from app.search.chunks import Rows
from app.search.codes import Rotation
from app.search.index import VectorIndex
from app.search.ivf import Ivf, view_of
from app.search.ivf_build import built, extended, lists_for, refilled
from app.search.ivf_tuning import tuned
from app.search.kmeans import GivenUp, on_gpus, train_centroids
from app.search.rowset import RowSet
from tests.app.search.clustered import Vectors, clustered, unit

ROWS = 60_000
QUERIES = 200
D = 64
NOTHING: Rows = np.empty(0, dtype=np.int64)


def never() -> bool:
    return False


def index_of(vectors: Vectors, *, first_rid: int = 0) -> VectorIndex:
    index = VectorIndex(vectors.shape[1])
    write(index, vectors, first_rid=first_rid)
    return index


def write(index: VectorIndex, vectors: Vectors, *, first_rid: int, removed: Rows = NOTHING) -> None:
    rids = np.arange(first_rid, first_rid + len(vectors), dtype=np.int64)
    index.publish(index.prepare(seq=index.snapshot.seq + 1, rids=rids, vectors_ND=vectors, removed=removed))


def ivf_of(index: VectorIndex) -> Ivf:
    faiss.omp_set_num_threads(1)
    views = index.snapshot.views
    ivf = built(views, index.rotation, stopped=never)
    view = view_of(ivf, views)
    assert view is not None
    return ivf.retuned(tuned(view, views, stopped=never), rows=len(ivf.rids))


class Made:
    """A big collection with its IVF; no test may write to it."""

    def __init__(self) -> None:
        vectors, cluster = clustered(ROWS + QUERIES, seed=1)
        self.vectors, self.queries, self.cluster = vectors[:ROWS], vectors[ROWS:], cluster[:ROWS]
        index = index_of(self.vectors)
        self.ivf = ivf_of(index)

    def index(self) -> VectorIndex:
        """A new index of the same rows, with the IVF."""
        index = index_of(self.vectors)
        index.publish(index.with_ivf(self.ivf))
        return index


@pytest.fixture(scope="module")
def made() -> Made:
    return Made()


def recall(
    index: VectorIndex, queries: Vectors, *, k: int = 10, only: RowSet | None = None, least: int = 1
) -> float:
    found = 0
    for query in queries:
        (true,) = index.snapshot.nearest(query[None], k=k, only=only, exact=True)
        (near,) = index.snapshot.nearest(query[None], k=k, only=only)
        assert len(near.rids) >= least
        assert np.all(np.diff(near.scores) <= 0)
        found += len(set(true.rids[:k].tolist()) & set(near.rids[:k].tolist()))
    return found / (k * len(queries))


@pytest.mark.parametrize("k", [1, 10, 100, 700])
def test_the_recall_of_vectors_that_are_not_stored_is_what_was_measured(made: Made, k: int) -> None:
    index = made.index()
    assert index.snapshot.method(k=k) == "ivf"
    setting = made.ivf.setting_for(k)
    assert setting is not None
    assert setting.recall >= 0.97
    assert recall(index, made.queries[: 200 if k < 100 else 40], k=k) >= 0.97


def test_scores_are_those_of_comparing_all(made: Made) -> None:
    index = made.index()
    together = index.snapshot.nearest(made.queries[:20], k=10)
    for query, candidates in zip(made.queries, together, strict=False):
        (alone,) = index.snapshot.nearest(query[None], k=10)
        np.testing.assert_array_equal(alone.rids, candidates.rids)
        wide = made.vectors[candidates.rids].astype(np.float64)
        cosines = wide @ query.astype(np.float64) / np.linalg.norm(wide, axis=1)
        np.testing.assert_allclose(candidates.scores, cosines, atol=2e-7)


def test_exact_is_exact(made: Made) -> None:
    index = made.index()
    assert index.snapshot.method(exact=True) == "exact"
    scores = made.vectors @ made.queries[:20].T
    for i, candidates in enumerate(index.snapshot.nearest(made.queries[:20], k=10, exact=True)):
        assert set(candidates.rids.tolist()) == set(np.argsort(-scores[:, i])[:10].tolist())


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_filters_find_their_neighbours(made: Made, share: float) -> None:
    chosen = np.flatnonzero(np.random.default_rng(2).random(ROWS) < share)
    assert recall(made.index(), made.queries[:100], only=RowSet(chosen), least=10) >= 0.97


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6])
def test_filters_that_have_to_do_with_the_vectors_find_their_neighbours(made: Made, share: float) -> None:
    """Albums: whole clusters, mostly far from the query."""
    albums = np.random.default_rng(3).permutation(int(made.cluster.max()) + 1)
    sizes = np.cumsum(np.bincount(made.cluster)[albums])
    chosen = np.flatnonzero(np.isin(made.cluster, albums[: int(np.searchsorted(sizes, share * ROWS)) + 1]))
    index = made.index()
    only = RowSet(chosen)
    assert index.snapshot.method(only=only) == ("rows" if len(chosen) < 8_000 else "ivf")
    assert recall(index, made.queries[:100], only=only, least=10) >= 0.97


def test_a_filter_finds_all_that_ask_for_more_than_there_are(made: Made) -> None:
    index = made.index()
    chosen = np.arange(0, ROWS, 2, dtype=np.int64)
    (candidates,) = index.snapshot.nearest(made.queries[:1], k=ROWS, only=chosen)
    np.testing.assert_array_equal(np.sort(candidates.rids), chosen)


def test_the_dead_are_never_found_and_the_new_at_once(made: Made) -> None:
    index = made.index()
    everything = RowSet(np.arange(2 * ROWS, dtype=np.int64))
    for step, query in enumerate(made.queries[:30]):
        (before,) = index.snapshot.nearest(query[None], k=10)
        first_rid = ROWS + step
        write(index, query[None], first_rid=first_rid, removed=np.sort(before.rids))
        for only in (None, everything):
            (after,) = index.snapshot.nearest(query[None], k=50, only=only)
            assert after.rids[0] == first_rid
            assert not set(before.rids.tolist()) & set(after.rids.tolist())
    assert index.snapshot.ivf is not None
    assert index.snapshot.indexed == ROWS - index.snapshot.ivf.dead_count
    assert recall(index, made.queries[30:130]) >= 0.97


def test_a_whole_cluster_may_die(made: Made) -> None:
    index = made.index()
    largest = int(np.argmax(np.bincount(made.cluster)))
    dead = np.flatnonzero(made.cluster == largest)
    write(index, made.vectors[:0], first_rid=ROWS, removed=dead)
    for query in made.vectors[dead[:30]]:
        (near,) = index.snapshot.nearest(query[None], k=10)
        assert len(near.rids) >= 10
        assert not set(near.rids.tolist()) & set(dead.tolist())


@pytest.mark.parametrize("excluded", [1, 30, 3_000])
def test_the_excluded_are_not_found_and_cost_nobody_his_place(made: Made, excluded: int) -> None:
    index = made.index()
    found = 0
    for query in made.queries[:30]:
        (near,) = index.snapshot.nearest(query[None], k=excluded + 10, exact=True)
        (rest,) = index.snapshot.nearest(query[None], k=10, excluded=near.rids[:excluded][::-1])
        assert not set(rest.rids.tolist()) & set(near.rids[:excluded].tolist())
        found += len(set(rest.rids[:10].tolist()) & set(near.rids[excluded : excluded + 10].tolist()))
    assert found / 300 >= 0.97


def test_copies_beyond_what_is_compared_again_are_all_returned(made: Made) -> None:
    vectors = made.vectors.copy()
    vectors[1_000:4_000] = vectors[0]
    index = index_of(vectors)
    index.publish(index.with_ivf(ivf_of(index)))
    assert index.snapshot.method() == "ivf"
    (candidates,) = index.snapshot.nearest(vectors[:1], k=10)
    assert set(candidates.rids.tolist()) == {0, *range(1_000, 4_000)}


def test_a_longer_copy_leaves_the_first_as_it_was(made: Made) -> None:
    index = index_of(made.vectors[:40_000])
    short = ivf_of(index)
    index.publish(index.with_ivf(short))
    before = index.snapshot
    answers = [before.nearest(query[None], k=10)[0].rids for query in made.queries[:50]]
    write(index, made.vectors[40_000:], first_rid=40_000)
    assert index.snapshot.ivf is not None
    long = extended(short, index.snapshot.views, start=index.snapshot.ivf.tail, stopped=never)
    index.publish(index.with_ivf(long))
    assert index.snapshot.indexed == ROWS
    assert recall(index, made.queries[:100]) >= 0.97
    for query, answer in zip(made.queries, answers, strict=False):
        np.testing.assert_array_equal(before.nearest(query[None], k=10)[0].rids, answer)


def test_refilling_leaves_the_dead_out(made: Made) -> None:
    index = made.index()
    write(index, made.vectors[:0], first_rid=ROWS, removed=np.arange(0, ROWS, 2, dtype=np.int64))
    full = refilled(made.ivf, index.snapshot.views, stopped=never)
    np.testing.assert_array_equal(full.rids, np.arange(1, ROWS, 2))
    index.publish(index.with_ivf(full))
    assert index.snapshot.ivf is not None
    assert index.snapshot.ivf.dead_count == 0
    assert recall(index, made.queries[:100]) >= 0.97


def test_an_ivf_that_lacks_a_row_is_refused(made: Made) -> None:
    index = index_of(made.vectors[:3_000])
    write(index, made.vectors[:0], first_rid=3_000, removed=np.array([7], dtype=np.int64))
    ivf = built(index.snapshot.views, index.rotation, stopped=never)
    other = index_of(made.vectors[:3_000])
    with pytest.raises(ValueError, match="lacks rows"):
        other.with_ivf(ivf)
    index.publish(index.with_ivf(ivf))
    assert index.snapshot.indexed == 2_999


def test_without_enough_recall_all_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ivf_tuning, "LEAST_RECALL", 1.01)
    vectors, _ = clustered(5_000, seed=4)
    index = index_of(vectors)
    ivf = ivf_of(index)
    assert ivf.setting_for(10) is None
    index.publish(index.with_ivf(ivf))
    assert index.snapshot.method() == "exact"
    assert index.snapshot.recall == 1.0
    assert recall(index, vectors[:20]) == 1.0


@pytest.mark.parametrize("dimensions", [5, 30, 67])
def test_any_number_of_dimensions_will_do(dimensions: int) -> None:
    vectors, _ = clustered(4_050, seed=5, dimensions=max(dimensions, 8))
    vectors = unit(vectors[:, :dimensions])
    index = index_of(vectors[:4_000])
    index.publish(index.with_ivf(ivf_of(index)))
    assert recall(index, vectors[4_000:]) >= 0.95


def test_a_rotation_changes_no_inner_product() -> None:
    vectors, _ = clustered(50, seed=6, dimensions=67)
    rotation = Rotation.random(67)
    turned = rotation.of_many(vectors)
    assert turned.shape == (50, 80)
    np.testing.assert_allclose(turned @ turned.T, vectors @ vectors.T, atol=1e-6)
    np.testing.assert_allclose(rotation.of_one(vectors[3]), turned[3], atol=1e-6)


def test_training_again_gives_the_same_lists() -> None:
    vectors, _ = clustered(3_000, seed=7)
    first = train_centroids(vectors, lists=32, stopped=never)
    np.testing.assert_array_equal(first, train_centroids(vectors, lists=32, stopped=never))
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1.0, atol=1e-6)


def test_lists_that_nobody_chooses_begin_again() -> None:
    vectors = np.repeat(clustered(8, seed=8)[0], 10, axis=0)
    centroids = train_centroids(vectors, lists=32, stopped=never)
    assert np.isfinite(centroids).all()
    nearest: npt.NDArray[np.float32] = (vectors @ centroids.T).max(axis=1)
    np.testing.assert_allclose(nearest, 1.0, atol=1e-5)


def test_what_is_no_longer_wanted_is_given_up(made: Made) -> None:
    views = made.index().snapshot.views
    view = view_of(made.ivf, views)
    assert view is not None
    asked = iter([False] * 5 + [True] * 1_000)
    with pytest.raises(GivenUp):
        built(views, made.ivf.rotation, stopped=lambda: next(asked))
    for work in (
        lambda: extended(made.ivf, views, start=(0, 0), stopped=lambda: True),
        lambda: refilled(made.ivf, views, stopped=lambda: True),
        lambda: tuned(view, views, stopped=lambda: True),
    ):
        with pytest.raises(GivenUp):
            work()


def test_the_number_of_lists_grows_with_the_root_of_the_rows() -> None:
    assert [lists_for(rows) for rows in (1, 20_000, 100_000, 1_000_000)] == [16, 256, 512, 1_024]


@pytest.mark.gpu
def test_centroids_of_a_gpu_are_those_of_the_cpu() -> None:
    if faiss.get_num_gpus() == 0:
        pytest.skip("this faiss sees no GPU")
    vectors, _ = clustered(20_000, seed=9)
    on_gpu = train_centroids(vectors, lists=64, stopped=never)
    assert type(on_gpus(faiss.IndexFlatIP(8))) is not faiss.IndexFlatIP
    index = faiss.IndexFlatIP(D)
    index.add(on_gpu)
    scores, _ = index.search(vectors, 1)
    assert scores.mean() > 0.5
