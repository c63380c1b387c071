"""The search in memory against a plain loop, alone and in batches, and snapshots that stay as they were."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.search import chunks as chunks_module
from app.search.chunks import Rows
from app.search.codes import ByteCodes
from app.search.index import VectorIndex, copied, run_to_compact
from app.search.rowset import RowSet
from app.search.snapshot import Snapshot
from tests.app.search.clustered import clustered, unit

D = 16


def random_units(count: int, *, seed: int, dimensions: int = D) -> npt.NDArray[np.float32]:
    return unit(np.random.default_rng(seed).normal(size=(count, dimensions)))


def rids(*values: int) -> Rows:
    return np.array(values, dtype=np.int64)


def add(
    index: VectorIndex, vectors: npt.NDArray[np.float32], *, first_rid: int, removed: Rows | None = None
) -> None:
    snapshot = index.prepare(
        seq=index.snapshot.seq + 1,
        rids=np.arange(first_rid, first_rid + len(vectors), dtype=np.int64),
        vectors_ND=vectors,
        removed=rids() if removed is None else removed,
    )
    index.publish(snapshot)


def oracle(
    vectors: npt.NDArray[np.float32], living: list[int], query: npt.NDArray[np.float32], k: int
) -> list[tuple[int, float]]:
    scored = sorted(
        ((float(vectors[i].astype(np.float64) @ query.astype(np.float64)), i) for i in living),
        key=lambda pair: (-pair[0], pair[1]),
    )
    return [(i, score) for score, i in scored[:k]]


def found(snapshot: Snapshot, query: npt.NDArray[np.float32], k: int) -> list[int]:
    (candidates,) = snapshot.nearest(query[None], k=k)
    return [int(rid) for rid in candidates.rids[:k]]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 3_000),
    k=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
    dead_share=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_the_search_equals_a_plain_loop_over_several_chunks(
    count: int, k: int, seed: int, dead_share: float
) -> None:
    rng = np.random.default_rng(seed)
    vectors = random_units(count, seed=seed)
    index = VectorIndex(D)
    for start in range(0, count, 700):
        add(index, vectors[start : start + 700], first_rid=start)
    dead = np.flatnonzero(rng.random(count) < dead_share)
    add(index, vectors[:0], first_rid=count, removed=dead)
    living = sorted(set(range(count)) - set(dead.tolist()))
    query = random_units(1, seed=seed + 1)[0]

    (candidates,) = index.snapshot.nearest(query[None], k=k)

    expected = oracle(vectors, living, query, k)
    assert [int(rid) for rid in candidates.rids] == [i for i, _ in expected]
    # The index rounds its scores to float32 once.
    np.testing.assert_allclose(candidates.scores, [score for _, score in expected], atol=2e-7)
    assert index.snapshot.alive_count == len(living)


def test_a_query_has_the_same_answer_alone_and_in_a_batch() -> None:
    vectors = random_units(5_000, seed=1)
    index = VectorIndex(D)
    add(index, vectors, first_rid=0)
    queries = random_units(37, seed=2)
    together = index.snapshot.nearest(queries, k=10)
    for query, candidates in zip(queries, together, strict=True):
        (alone,) = index.snapshot.nearest(query[None], k=10)
        np.testing.assert_array_equal(alone.rids, candidates.rids)
        np.testing.assert_array_equal(alone.scores, candidates.scores)


def test_all_that_tie_with_the_last_are_returned_wherever_they_lie() -> None:
    """Copies of one vector all over several chunks: a matrix product may round them differently."""
    vectors = random_units(4_000, seed=3, dimensions=67)
    copies = list(range(0, 4_000, 97))
    vectors[copies] = vectors[0]
    index = VectorIndex(67)
    add(index, vectors, first_rid=0)
    (candidates,) = index.snapshot.nearest(vectors[:1], k=3)
    assert sorted(candidates.rids.tolist()) == copies
    assert set(candidates.scores.tolist()) == {1.0}


def test_vectors_that_only_rounding_tells_apart_are_ties_and_all_returned() -> None:
    """A scan in float32 tells them apart by the last bits; cut by those, most would be missing."""
    rng = np.random.default_rng(11)
    base = rng.normal(size=(1, 384))
    vectors = unit(base + 1e-6 * rng.normal(size=(3_000, 384)))
    index = VectorIndex(384)
    add(index, vectors, first_rid=0)
    (candidates,) = index.snapshot.nearest(unit(base), k=5)
    assert set(candidates.scores.tolist()) == {1.0}
    assert len(candidates.rids) == 3_000


def test_scores_stay_within_minus_one_and_one() -> None:
    vectors = random_units(300, seed=4)
    index = VectorIndex(D)
    add(index, np.concatenate([vectors, -vectors]), first_rid=0)
    for candidates in index.snapshot.nearest(vectors, k=600):
        assert candidates.scores.max() == 1.0
        assert candidates.scores.min() == -1.0


@pytest.mark.parametrize("chosen_share", [0.01, 0.2, 0.9])
def test_only_and_excluded_rows_are_honoured_whether_rows_are_gathered_or_masked(chosen_share: float) -> None:
    rng = np.random.default_rng(5)
    vectors = random_units(2_500, seed=5)
    index = VectorIndex(D)
    add(index, vectors, first_rid=10, removed=None)
    only = np.flatnonzero(rng.random(2_500) < chosen_share) + 10
    excluded = only[::3]
    (candidates,) = index.snapshot.nearest(
        vectors[:1], k=2_500, only=np.concatenate([rids(1, 2), only, rids(99_999)]), excluded=excluded
    )
    assert set(candidates.rids.tolist()) == set(only.tolist()) - set(excluded.tolist())


def test_an_empty_index_finds_nothing() -> None:
    query = random_units(1, seed=6)
    snapshot = VectorIndex(D).snapshot
    for candidates in (
        *snapshot.nearest(query, k=5),
        *snapshot.nearest(query, k=5, only=rids(1), excluded=rids(2)),
    ):
        assert candidates.rids.size == 0


def test_a_snapshot_stays_as_it_was_while_the_index_goes_on() -> None:
    vectors = random_units(6_000, seed=7)
    index = VectorIndex(D)
    add(index, vectors[:100], first_rid=0)
    before = index.snapshot
    answer = found(before, vectors[0], 5)
    add(index, np.repeat(vectors[:1], 3_000, axis=0), first_rid=100, removed=rids(*answer))
    assert found(before, vectors[0], 5) == answer
    assert before.alive_count == 100
    assert set(found(index.snapshot, vectors[0], 5)) & set(answer) == set()


def test_what_is_prepared_but_never_published_leaves_no_trace() -> None:
    vectors = random_units(10, seed=8)
    index = VectorIndex(D)
    add(index, vectors[:5], first_rid=0)
    index.prepare(seq=2, rids=rids(5, 6), vectors_ND=vectors[5:7], removed=rids(0, 1))
    assert found(index.snapshot, vectors[0], 10)[0] == 0
    assert index.snapshot.alive_count == 5
    add(index, vectors[7:], first_rid=20)
    assert found(index.snapshot, vectors[7], 1) == [20]
    assert sorted(found(index.snapshot, vectors[0], 10)) == [0, 1, 2, 3, 4, 20, 21, 22]


def compact(index: VectorIndex) -> None:
    """As the background does it, with nobody writing meanwhile."""
    while run := run_to_compact(index.snapshot.views):
        is_last = run[-1] is index.snapshot.views[-1]
        index.publish(index.compacted(run, copied(run, is_last=is_last)))


def test_the_states_around_the_newest_are_there_for_who_reads_the_disk_meanwhile() -> None:
    vectors = random_units(30, seed=23)
    index = VectorIndex(D)
    add(index, vectors[:10], first_rid=0)
    add(index, vectors[10:20], first_rid=10)
    prepared = index.prepare(seq=3, rids=rids(20), vectors_ND=vectors[20:21], removed=rids())
    assert index.snapshot.seq == 2
    assert [index.at(seq) is not None for seq in range(5)] == [False, True, True, True, False]
    assert index.at(3) is prepared
    again = index.prepare(seq=3, rids=rids(21), vectors_ND=vectors[21:22], removed=rids(0))
    assert index.at(3) is again
    index.publish(again)
    assert index.at(2) is not None
    assert index.at(1) is None
    index.publish(index.with_ivf(None))
    assert index.at(3) is index.snapshot
    assert index.at(2) is None, "it may hold what the background has just replaced"


def test_the_dead_leave_memory_when_they_are_many() -> None:
    vectors = random_units(5_000, seed=9)
    index = VectorIndex(D)
    add(index, vectors, first_rid=0)
    dead = np.arange(0, 5_000, 2, dtype=np.int64)
    add(index, vectors[:1], first_rid=9_000, removed=dead)
    compact(index)
    assert index.snapshot.size == 2_501
    assert found(index.snapshot, vectors[0], 1) == [9_000]
    assert found(index.snapshot, vectors[1], 1) == [1]


def test_what_dies_and_comes_while_rows_are_copied_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "MAX_CHUNK_ROWS", 4_000)
    vectors = random_units(7_000, seed=12)
    index = VectorIndex(D)
    add(index, vectors[:6_000], first_rid=0)
    add(index, vectors[:0], first_rid=6_000, removed=np.arange(0, 5_000, 2, dtype=np.int64))
    run = run_to_compact(index.snapshot.views)
    assert len(run) == 2, "the last chunk fits, too"
    copy = copied(run, is_last=True)
    add(index, vectors[6_000:], first_rid=6_000, removed=rids(1, 3, 4_001))
    before = index.snapshot
    index.publish(index.compacted(run, copy))
    living = [*range(5, 5_000, 2), *(i for i in range(5_000, 7_000))]
    living.remove(4_001)
    assert index.snapshot.alive_count == before.alive_count == len(living)
    assert index.snapshot.size < before.size
    for query in random_units(20, seed=13):
        expected = [i for i, _ in oracle(vectors, living, query, 10)]
        assert found(index.snapshot, query, 10) == found(before, query, 10) == expected


def test_a_collection_that_died_out_leaves_nothing_and_begins_again() -> None:
    vectors = random_units(3_000, seed=14)
    index = VectorIndex(D)
    add(index, vectors, first_rid=0)
    add(index, vectors[:0], first_rid=3_000, removed=np.arange(3_000, dtype=np.int64))
    compact(index)
    assert index.snapshot.views == ()
    assert index.snapshot.nearest(vectors[:1], k=3)[0].rids.size == 0
    add(index, vectors[:2], first_rid=3_000)
    assert found(index.snapshot, vectors[1], 1) == [3_001]


def test_appending_copies_no_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "MAX_CHUNK_ROWS", 8)
    vectors = random_units(100, seed=10)
    index = VectorIndex(D)
    add(index, vectors[:20], first_rid=0)
    chunks = [view.chunk for view in index.snapshot.views]
    for i in range(20, 100):
        add(index, vectors[i : i + 1], first_rid=i)
    now = [view.chunk for view in index.snapshot.views]
    assert all(chunk is then for chunk, then in zip(now, chunks, strict=False))
    assert [found(index.snapshot, vector, 1) for vector in vectors] == [[i] for i in range(100)]


def test_rids_with_gaps_are_found_by_their_rids() -> None:
    vectors = random_units(50, seed=15)
    index = VectorIndex(D)
    for i in range(50):
        add(index, vectors[i : i + 1], first_rid=i * i)
    for i in range(50):
        (candidates,) = index.snapshot.nearest(vectors[:1], k=5, only=rids(i * i, i * i + 1))
        assert candidates.rids.tolist() == ([i * i, 1] if i == 0 else [i * i])
    np.testing.assert_array_equal(index.snapshot.vectors_of(rids(0, 3, 4, 2_401)), vectors[[0, 2, 49]])


def test_a_set_of_rows_stays_right_while_rows_come_go_and_move() -> None:
    vectors = random_units(4_000, seed=16)
    index = VectorIndex(D)
    add(index, vectors[:3_000], first_rid=0)
    chosen = RowSet(np.arange(0, 4_000, 3, dtype=np.int64))
    query = random_units(1, seed=17)

    def nearest() -> set[int]:
        (candidates,) = index.snapshot.nearest(query, k=4_000, only=chosen)
        return set(candidates.rids.tolist())

    assert nearest() == set(range(0, 3_000, 3))
    add(index, vectors[3_000:], first_rid=3_000, removed=np.arange(0, 3_000, 2, dtype=np.int64))
    expected = {rid for rid in range(0, 4_000, 3) if rid >= 3_000 or rid % 2}
    assert nearest() == expected
    compact(index)
    assert index.snapshot.size == 2_500
    assert nearest() == expected


def test_an_older_state_sees_no_row_that_came_later() -> None:
    vectors = random_units(400, seed=21)
    index = VectorIndex(D)
    add(index, vectors[:200], first_rid=0)
    before = index.snapshot
    add(index, vectors[200:], first_rid=200)
    chosen = RowSet(np.arange(0, 400, 3, dtype=np.int64))
    for snapshot, size in ((index.snapshot, 400), (before, 200), (index.snapshot, 400)):
        (candidates,) = snapshot.nearest(vectors[:1], k=400, only=chosen)
        assert set(candidates.rids.tolist()) == set(range(0, size, 3))


def test_codes_of_a_chunk_show_an_older_state_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "MAX_CHUNK_ROWS", 300)
    vectors = random_units(300, seed=22)
    index = VectorIndex(D)
    add(index, vectors[:200], first_rid=0)
    before = index.snapshot
    add(index, vectors[200:], first_rid=200)
    with_codes(index)
    assert found(before, vectors[299], 300) != [299]
    assert len(found(before, vectors[299], 300)) == 200
    assert found(index.snapshot, vectors[299], 1) == [299]


def with_codes(index: VectorIndex) -> None:
    for view in index.snapshot.views:
        if view.is_full:
            view.chunk.codes = ByteCodes(view.chunk.vectors, index.rotation)


@pytest.mark.parametrize("outlier", [0.0, 4.0])
def test_8_bits_choose_candidates_and_full_vectors_decide(
    outlier: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one dimension is far larger than all others, as in the features of transformers."""
    monkeypatch.setattr(chunks_module, "MAX_CHUNK_ROWS", 2_000)
    rows, _ = clustered(7_040, seed=18, dimensions=40)
    rows[:, 7] += outlier * np.abs(rows).max()
    vectors, queries = unit(rows[:7_000]), unit(rows[7_000:])
    index = VectorIndex(40)
    add(index, vectors, first_rid=0)
    add(index, vectors[:0], first_rid=7_000, removed=np.arange(0, 7_000, 5, dtype=np.int64))
    exact = index.snapshot.nearest(queries, k=20, exact=True)
    with_codes(index)
    assert index.snapshot.method() == "int8"
    for query, expected in zip(queries, exact, strict=True):
        (candidates,) = index.snapshot.nearest(query[None], k=20)
        np.testing.assert_array_equal(candidates.rids, expected.rids)
        np.testing.assert_array_equal(candidates.scores, expected.scores)


def test_ties_that_8_bits_would_cut_off_are_all_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "MAX_CHUNK_ROWS", 2_000)
    vectors = random_units(4_000, seed=19)
    vectors[500:1_500] = vectors[0]
    index = VectorIndex(D)
    add(index, vectors, first_rid=0)
    with_codes(index)
    (candidates,) = index.snapshot.nearest(vectors[:1], k=5, excluded=rids(0, 600))
    assert candidates.rids.tolist() == [i for i in range(500, 1_500) if i != 600]


def test_very_long_vectors_are_compared_in_full() -> None:
    index = VectorIndex(5_000)
    assert not index.can_code
    vectors = random_units(130, seed=20, dimensions=5_000)
    add(index, vectors, first_rid=0)
    assert found(index.snapshot, vectors[129], 1) == [129]
