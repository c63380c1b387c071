"""One state of the search in memory, and how the nearest of its rows are found.

    rows    a filter keeps few: those are compared, all of them
    ivf     the nearest lists of bits are compared, and the best again in full; rows that came since, in full
    int8    all are compared in 8 bits, and the best again in full, until the IVF is made
    exact   all are compared, in full

Which one is chosen depends on the number of rows, the filter and the recall that was measured.

Dimension key: Q queries · N rows · D embedding
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import faiss
import numpy as np

from app.search.candidates import Candidates, Pool
from app.search.chunks import NO_ROWS, Rows, View, spread
from app.search.collection import Vector
from app.search.ivf import IvfView, Setting
from app.search.products import products, products_at
from app.search.rowset import RowSet, SlotFilter

QUERIES_AT_ONCE = 16  # 65,536 rows * 16 queries * 4 bytes = 4 MB of scores
# Of a filter, measured at 100,000 and 1,000,000 rows: comparing its rows in full costs 50 to 90 ns each, the
# IVF 10 ns for each row of its lists, and 0.2 ms.
ROWS_COMPARED_IN_FULL = 8_000
_LIST_ROWS_FOR_ONE = 8
# Where a filter has to do with the vectors, its nearest rows are in many of the lists that it leaves: 128
# lists find 0.98 to 0.99 of them, of 512 with 100,000 rows as of 1,024 with 1,000,000.
_FILTERED_PROBES = 128
_FILTERED_DEPTH = 400
_SCAN_ABOVE_SHARE = 0.5  # a row picked out costs about twice one that is passed by
_COPY_BELOW_SHARE = 0.25  # for several queries, rows are copied: that costs about as much as comparing three
_MAX_INT8_K = 1_000


@dataclass(frozen=True)
class Snapshot:
    """One state of the index, safe to search while the next one is made.

    Attributes:
        seq: The collection's commit that this is the state after.
        dimensions: D.
        views: The rows, in order of rid.
        firsts: int64 [views]: the first rid of each; the same object while no row moves.
        ivf: What finds most of them fast, or None.
        alive_count: How many rows live.
    """

    seq: int
    dimensions: int
    views: tuple[View, ...]
    firsts: Rows
    ivf: IvfView | None
    alive_count: int

    @property
    def size(self) -> int:
        """Rows in use, dead ones included."""
        return sum(view.size for view in self.views)

    @property
    def indexed(self) -> int:
        """How many living rows the IVF has."""
        return 0 if self.ivf is None else len(self.ivf.ivf.rids) - self.ivf.dead_count

    @property
    def recall(self) -> float:
        """Of the 10 nearest, without a filter: as measured where an IVF finds them, else 1."""
        setting = self._setting(10)
        return 1.0 if setting is None else setting.recall

    @property
    def memory_bytes(self) -> int:
        """Of vectors and search structures, as far as they are written."""
        rows = self.size * (4 * self.dimensions + 8)
        codes = sum(view.codes.nbytes for view in self.views if view.codes is not None)
        return rows + codes + (0 if self.ivf is None else self.ivf.ivf.nbytes)

    def method(self, *, only: RowSet | None = None, exact: bool = False, k: int = 10) -> str:
        """How `nearest` goes about it, as `Explanation` names it."""
        if exact:
            return "exact" if only is None else "rows"
        if only is not None:
            return "rows" if self._filtered_setting(only, k=k) is None else "ivf"
        if self._setting(k) is not None:
            return "ivf"
        return "int8" if any(view.codes is not None for view in self.views) else "exact"

    def nearest(
        self,
        queries_QD: Vector,
        *,
        k: int,
        only: RowSet | Rows | None = None,
        excluded: Rows | None = None,
        exact: bool = False,
    ) -> list[Candidates]:
        """Finds the k nearest living rows of each query.

        Args:
            queries_QD: Normalised.
            k: At least 1.
            only: Rids to choose from, rising; None for all. Rids that aren't here are passed over.
            excluded: Rids to leave out.
            exact: Whether to compare all.
        """
        queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
        chosen = only if isinstance(only, RowSet) or only is None else RowSet(only)
        left_out = NO_ROWS if excluded is None else np.sort(excluded)
        pools = [Pool(query_D, k=k, excluded=left_out) for query_D in queries_QD]
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # of this thread; two for one query wait for each other
        try:
            if chosen is not None:
                self._search_chosen(pools, chosen, exact=exact)
            elif exact:
                self._compare_all(pools)
            else:
                self._search_all(pools)
        finally:
            faiss.omp_set_num_threads(threads)
        return [pool.best() for pool in pools]

    def vectors_of(self, rids: Rows) -> Vector:
        """The vectors of living or dead rids that are here, rising, copied: float32 [N, D]."""
        found = [np.empty((0, self.dimensions), dtype=np.float32)]
        for number, here in spread(self.firsts, rids):
            view = self.views[number]
            found.append(view.chunk.vectors[view.rows_of(here)])
        return np.concatenate(found)

    # Without a filter

    def _search_all(self, pools: list[Pool]) -> None:
        # The query itself, where it is left out, was likely found beside the k.
        setting = self._setting(pools[0].k + pools[0].excluded_count // 2) if pools else None
        if setting is not None and self.ivf is not None:
            done = [self._add_near(pool, self.ivf, setting=setting) for pool in pools]
            self._compare_from(self.ivf.tail, list(itertools.compress(pools, done)))
            self._compare_all(_others(pools, done))
        elif pools and len(pools) < QUERIES_AT_ONCE and pools[0].k <= _MAX_INT8_K:
            for pool in pools:
                self._compare_codes(pool)
        else:
            self._compare_all(pools)

    def _setting(self, k: int) -> Setting | None:
        return None if self.ivf is None else self.ivf.ivf.setting_for(k)

    def _add_near(
        self, pool: Pool, ivf: IvfView, *, setting: Setting, chosen: SlotFilter | None = None
    ) -> bool:
        """Adds what the IVF finds; False, and nothing added, where it may have cut off ties with the k-th."""
        depth = setting.depth + pool.excluded_count
        probes = setting.probes
        rids = ivf.rids_near(pool.query_D, probes=probes, depth=depth, chosen=chosen)
        while len(rids) < depth and probes < ivf.ivf.lists:  # most rows there are dead, or not chosen
            probes *= 4
            rids = ivf.rids_near(pool.query_D, probes=probes, depth=depth, chosen=chosen)
        parts = []
        for number, here in spread(self.firsts, rids):
            view = self.views[number]
            rows = view.rows_of(here)
            parts.append((view, rows, products_at(view.chunk.vectors, rows, pool.query_D)))
        if len(rids) == depth and pool.ties_with_all([rough for _, _, rough in parts]):
            return False
        for view, rows, rough in parts:
            pool.add(view, rows, rough)
        return True

    def _compare_codes(self, pool: Pool) -> None:
        depth = 2 * pool.k + 80 + pool.excluded_count
        for view in self.views:
            codes = view.codes
            if codes is None:
                _compare(view, view.living_rows(), [pool])
                continue
            rows = codes.nearest(pool.query_D, depth=depth, alive=view.alive)
            rough = products_at(view.chunk.vectors, rows, pool.query_D)
            if len(rows) == depth and pool.ties_with_all([rough]):
                _compare(view, view.living_rows(), [pool])
            else:
                pool.add(view, rows, rough)

    def _compare_all(self, pools: list[Pool]) -> None:
        self._compare_from((0, 0), pools)

    def _compare_from(self, tail: tuple[int, int], pools: list[Pool]) -> None:
        if not pools:
            return
        for number in range(tail[0], len(self.views)):
            start = tail[1] if number == tail[0] else 0
            _compare(self.views[number], self.views[number].living_rows(start=start), pools, start=start)

    # With a filter

    def _search_chosen(self, pools: list[Pool], chosen: RowSet, *, exact: bool) -> None:
        if not pools or not len(chosen):
            return
        parts = chosen.parts(self.firsts, self.views)
        setting = None if exact else self._filtered_setting(chosen, k=pools[0].k)
        if setting is None or self.ivf is None:
            self._compare_parts(parts, pools)
            return
        slots = chosen.slots(self.ivf.ivf)
        done = [self._add_near(pool, self.ivf, setting=setting, chosen=slots) for pool in pools]
        first, row = self.ivf.tail
        tail = [(n, rows[rows >= row] if n == first else rows) for n, rows in parts if n >= first]
        self._compare_parts(tail, list(itertools.compress(pools, done)))
        self._compare_parts(parts, _others(pools, done))

    def _filtered_setting(self, only: RowSet, *, k: int) -> Setting | None:
        """How the IVF finds rows of a filter; None to compare those rows themselves."""
        if self.ivf is None or len(only) <= ROWS_COMPARED_IN_FULL:
            return None
        # The 10 nearest of a tenth of all rows are among the 100 nearest of all, where the filter has nothing
        # to do with the vectors.
        setting = self._setting(-(-k * self.alive_count // len(only)))
        if setting is None:
            return None
        probes = max(setting.probes, _FILTERED_PROBES)
        list_rows = probes * len(self.ivf.ivf.rids) // self.ivf.ivf.lists
        if len(only) <= ROWS_COMPARED_IN_FULL + list_rows // _LIST_ROWS_FOR_ONE:
            return None
        return Setting(k, probes, _FILTERED_DEPTH + 2 * k, setting.recall)

    def _compare_parts(self, parts: Iterable[tuple[int, Rows]], pools: list[Pool]) -> None:
        if not pools:
            return
        for number, rows in parts:
            _compare(self.views[number], self.views[number].living(rows), pools)


def _others(pools: list[Pool], done: list[bool]) -> list[Pool]:
    return [pool for pool, is_done in zip(pools, done, strict=True) if not is_done]


def _compare(view: View, rows_N: Rows, pools: list[Pool], *, start: int = 0) -> None:
    """Compares living rows of a view, all from `start` on, with all queries."""
    if not len(rows_N):
        return
    vectors_MD = view.chunk.vectors[start : view.size]
    if len(pools) == 1:
        query_D = pools[0].query_D
        if len(rows_N) == len(vectors_MD):
            scores_N = products(vectors_MD, query_D)
        elif len(rows_N) > _SCAN_ABOVE_SHARE * len(vectors_MD):
            scores_N = products(vectors_MD, query_D)[rows_N - start]
        else:
            scores_N = products_at(view.chunk.vectors, rows_N, query_D)
        pools[0].add(view, rows_N, scores_N)
        return
    if len(rows_N) < _COPY_BELOW_SHARE * len(vectors_MD):
        vectors_MD, picked_N = view.chunk.vectors[rows_N], None
    else:
        picked_N = None if len(rows_N) == len(vectors_MD) else rows_N - start
    for first in range(0, len(pools), QUERIES_AT_ONCE):
        block = pools[first : first + QUERIES_AT_ONCE]
        scores_MQ = vectors_MD @ np.stack([pool.query_D for pool in block]).T
        for query, pool in enumerate(block):
            scores_M = scores_MQ[:, query]
            pool.add(view, rows_N, scores_M if picked_N is None else scores_M[picked_N])
