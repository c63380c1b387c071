"""The search in memory against a dict, over random histories of writes and of what the background does.

The IVF compares all its lists, and all it finds again in full: then it must find what comparing all finds.
"""

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from app.search.memory import chunks
from app.search.memory import index as index_module
from app.search.memory import snapshot as snapshot_module
from app.search.memory.chunks import Rows, View
from app.search.memory.codes import ByteCodes
from app.search.memory.index import VectorIndex, copied, run_to_compact
from app.search.memory.ivf import Ivf, Setting
from app.search.memory.ivf_build import built, extended, refilled
from app.search.memory.rowset import RowSet
from app.search.memory.snapshot import Snapshot
from tests.app.search.clustered import Vectors, clustered

D = 8
POOL, _ = clustered(3_000, seed=1, dimensions=D, clusters=20)
POOL[100:140] = POOL[100]  # ties
NOTHING: Rows = np.empty(0, dtype=np.int64)


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with (
        patch.object(chunks, "MAX_CHUNK_ROWS", 64),
        patch.object(index_module, "MIN_DEAD_TO_COMPACT", 8),
        patch.object(snapshot_module, "ROWS_COMPARED_IN_FULL", 5),
        patch.object(snapshot_module, "_LIST_ROWS_FOR_ONE", 1_000_000),
        patch.object(snapshot_module, "_FILTERED_DEPTH", 1_000_000),
        patch.object(snapshot_module, "_FILTERED_PROBES", 1_000_000),
    ):
        yield


def never() -> bool:
    return False


class IndexMachine(RuleBasedStateMachine):
    """Each rule writes, or does a step of the background; then every way to search is compared."""

    @initialize()
    def begin(self) -> None:
        self.index = VectorIndex(D)
        self.model: dict[int, int] = {}  # rid -> row of the pool
        self.next_rid = 1
        self.chosen = RowSet(np.arange(0, 4_000, 2, dtype=np.int64))
        self.all_even = RowSet(NOTHING)
        self.kept: list[tuple[Snapshot, dict[int, int]]] = []
        self.run: tuple[View, ...] = ()
        self.copy: tuple[View, ...] = ()
        self.rng = np.random.default_rng(0)

    def write(self, rows: list[int], removed: list[int], *, gap: int = 0) -> None:
        self.next_rid += gap
        rids = np.arange(self.next_rid, self.next_rid + len(rows), dtype=np.int64)
        self.index.publish(
            self.index.prepare(
                seq=self.index.snapshot.seq + 1,
                rids=rids,
                vectors_ND=POOL[rows],
                removed=np.array(removed, dtype=np.int64),
            )
        )
        self.next_rid += len(rows)
        for rid in removed:
            self.model.pop(rid, None)
        self.model |= dict(zip(rids.tolist(), rows, strict=True))

    @rule(count=st.integers(1, 150), gap=st.integers(0, 3))
    def add(self, count: int, gap: int) -> None:
        self.write(self.rng.integers(0, len(POOL), count).tolist(), [], gap=gap)

    @rule(share=st.sampled_from([0.02, 0.3, 1.0]), count=st.integers(0, 20))
    def replace(self, share: float, count: int) -> None:
        dead = [rid for rid in self.model if self.rng.random() < share]
        self.write(self.rng.integers(0, 200, count).tolist(), [*dead, 999_999])

    @rule()
    def forget_what_was_prepared(self) -> None:
        removed = np.array(list(self.model)[:5], dtype=np.int64)
        rids = np.array([self.next_rid], dtype=np.int64)
        self.index.prepare(seq=99, rids=rids, vectors_ND=POOL[:1], removed=removed)

    @rule()
    def begin_to_copy(self) -> None:
        self.run = run_to_compact(self.index.snapshot.views)
        if self.run:
            self.copy = copied(self.run, is_last=self.run[-1] is self.index.snapshot.views[-1])

    @precondition(lambda self: bool(self.run))
    @rule()
    def finish_the_copy(self) -> None:
        self.index.publish(self.index.compacted(self.run, self.copy))
        self.run = ()

    def use(self, ivf: Ivf) -> None:
        everything = Setting(1_000, ivf.lists, 1_000_000, 1.0)
        self.index.publish(self.index.with_ivf(ivf.retuned((everything,), rows=len(ivf.rids))))

    @precondition(lambda self: len(self.model) >= 16)
    @rule()
    def build(self) -> None:
        self.use(built(self.index.snapshot.views, self.index.rotation, stopped=never))

    @precondition(lambda self: self.index.snapshot.ivf is not None)
    @rule(step=st.sampled_from(["extend", "refill", "drop"]))
    def go_on_with_the_ivf(self, step: str) -> None:
        view, views = self.index.snapshot.ivf, self.index.snapshot.views
        assert view is not None
        if step == "drop":
            self.index.publish(self.index.with_ivf(None))
        elif step == "extend":
            self.use(extended(view.ivf, views, start=view.tail, stopped=never))
        else:
            self.use(refilled(view.ivf, views, stopped=never))

    @rule()
    def make_codes(self) -> None:
        for view in self.index.snapshot.views:
            if view.is_full and view.alive_count:
                view.chunk.codes = ByteCodes(view.chunk.vectors, self.index.rotation)

    @rule()
    def keep(self) -> None:
        self.kept = [*self.kept[-1:], (self.index.snapshot, dict(self.model))]

    @invariant()
    def finds_what_a_loop_finds(self) -> None:
        if not hasattr(self, "index"):
            return
        for snapshot, model in [*self.kept, (self.index.snapshot, self.model)]:
            assert snapshot.alive_count == len(model)
            query = POOL[self.rng.integers(0, len(POOL))]
            now = np.array(sorted(model), dtype=np.int64)
            self.all_even = RowSet(now[now % 2 == 0]) if self.rng.random() < 0.3 else self.all_even
            for only in (None, self.chosen, self.all_even):
                for exact in (False, True):
                    excluded = np.array(list(model)[:2], dtype=np.int64)
                    (found,) = snapshot.nearest(query[None], k=7, only=only, excluded=excluded, exact=exact)
                    self.compare(query, model, only, excluded, found.rids, found.scores)

    def compare(
        self,
        query: Vectors,
        model: dict[int, int],
        only: RowSet | None,
        excluded: Rows,
        rids: Rows,
        scores: Vectors,
    ) -> None:
        known = set(model) if only is None else set(model) & set(only.rids.tolist())
        left = sorted(known - set(excluded.tolist()))
        stored = POOL[[model[rid] for rid in left]].astype(np.float64).reshape(-1, D)
        wide = query.astype(np.float64)
        cosines = (stored * wide).sum(axis=1) / np.linalg.norm(stored, axis=1) / np.linalg.norm(wide)
        true = np.sort(cosines.astype(np.float32))[::-1]
        assert set(rids.tolist()) <= set(left)
        assert len(set(rids.tolist())) == len(rids)
        assert len(rids) >= min(7, len(left))
        np.testing.assert_allclose(scores, true[: len(scores)], atol=2e-7)
        assert len(rids) >= np.count_nonzero(true >= true[min(6, len(true) - 1)]) if len(true) else True


TestIndexHistory = IndexMachine.TestCase
TestIndexHistory.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_where_all_rows_were_replaced_a_refilled_ivf_is_empty_and_what_came_after_is_found() -> None:
    machine = IndexMachine()
    machine.begin()
    machine.add(count=17, gap=0)
    machine.build()
    machine.replace(count=0, share=1.0)
    machine.go_on_with_the_ivf(step="refill")
    machine.finds_what_a_loop_finds()
    machine.add(count=3, gap=0)
    machine.finds_what_a_loop_finds()
