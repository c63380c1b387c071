"""The derived search: all vectors of a collection in memory, scanned whole: recall is 1.000 by construction.

Nothing here is the truth: it is filled from `app.search.store` at start and follows each commit.

Readers take no lock. A snapshot is never changed: a writer puts new rows behind its last one, where no reader
of an older snapshot looks, makes a new mask of the living, and publishes all of it with one assignment. Rows
live in chunks that are never moved, so appending copies nothing but the mask (a byte for each row). An update
is a removal and an append; when a fifth of the rows are dead, the living move to new chunks.

Dimension key: Q queries · N rows · D embedding
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.search.collection import Vector

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

FIRST_CHUNK_ROWS = 1_024
MAX_CHUNK_ROWS = 65_536  # 100 MB at 384 dimensions; memory that isn't written yet costs nothing
DEAD_SHARE_TO_COMPACT = 0.2
MIN_DEAD_TO_COMPACT = 1_024
QUERIES_AT_ONCE = 16  # 65,536 rows * 16 queries * 4 bytes = 4 MB of scores
GATHER_BELOW_SHARE = 0.25  # copying a row costs about as much as scanning three
_NO_ROWS: Rows = np.empty(0, dtype=np.int64)
_NO_SCORES: npt.NDArray[np.float32] = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class Candidates:
    """The best rows of one query, best first: the k asked for, and all that tie with the last of them.

    Attributes:
        rids: int64 [N].
        scores: float32 [N], cosines in [-1, 1].
    """

    rids: Rows
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Snapshot:
    """One state of the index, safe to search while the next one is made.

    Attributes:
        seq: The collection's commit that this is the state after.
        chunks: float32 [capacity, D] each; the first `size` rows of them together are in use.
        rids: int64 [capacity], rising: row number -> the store's rid.
        size: Rows in use, dead ones included.
        alive: bool [size].
        alive_count: How many of them live.
    """

    seq: int
    chunks: tuple[Vector, ...]
    rids: Rows
    size: int
    alive: Mask
    alive_count: int

    def nearest(
        self, queries_QD: Vector, *, k: int, only: Rows | None = None, excluded: Rows | None = None
    ) -> list[Candidates]:
        """Finds the k nearest living rows of each query, exactly.

        The scan is in float32, whose rounding depends on how many rows and queries are multiplied at once. So
        all rows within its error bound of the k-th are taken, and scored again one by one in float64: the
        same vector has the same score in every query, alone or in a batch, and ties are ties.

        Args:
            queries_QD: Normalised.
            k: At least 1.
            only: Rids to choose from, rising; None for all. Rids that aren't here are passed over.
            excluded: Rids to leave out.
        """
        mask = self.alive if only is None else self._mask_of(only) & self.alive
        if excluded is not None and excluded.size:
            mask = mask & ~self._mask_of(excluded)
        if not mask.any():
            return [Candidates(_NO_ROWS, _NO_SCORES) for _ in queries_QD]
        found: list[Candidates] = []
        for start in range(0, len(queries_QD), QUERIES_AT_ONCE):
            found += self._nearest_of_block(queries_QD[start : start + QUERIES_AT_ONCE], k=k, mask=mask)
        return found

    def _mask_of(self, rids: Rows) -> Mask:
        mask = np.zeros(self.size, dtype=np.bool_)
        mask[self.rows_of(rids)] = True
        return mask

    def rows_of(self, rids: Rows) -> Rows:
        """Row numbers of the rids that are here, dead or alive; the others are passed over."""
        if self.size == 0 or rids.size == 0:
            return np.empty(0, dtype=np.int64)
        known = self.rids[: self.size]
        rows = np.minimum(np.searchsorted(known, rids), self.size - 1)
        found: Rows = rows[known[rows] == rids]
        return found

    def _nearest_of_block(self, queries_QD: Vector, *, k: int, mask: Mask) -> list[Candidates]:
        rows: list[list[Rows]] = [[] for _ in queries_QD]
        rough: list[list[npt.NDArray[np.float32]]] = [[] for _ in queries_QD]
        for rows_N, scores_NQ in self._scan(queries_QD, mask=mask):
            for query in range(len(queries_QD)):
                scores_N = scores_NQ[:, query]
                keep = scores_N >= self._cut(scores_N, k=k)
                rows[query].append(rows_N[keep])
                rough[query].append(scores_N[keep])
        return [
            self._rescored(
                query_D, np.concatenate([_NO_ROWS, *rows[i]]), np.concatenate([_NO_SCORES, *rough[i]]), k=k
            )
            for i, query_D in enumerate(queries_QD)
        ]

    def _scan(self, queries_QD: Vector, *, mask: Mask) -> Iterator[tuple[Rows, npt.NDArray[np.float32]]]:
        for first_row, vectors_ND in self._blocks():
            keep = mask[first_row : first_row + len(vectors_ND)]
            kept = int(np.count_nonzero(keep))
            if kept == 0:
                continue
            if kept < GATHER_BELOW_SHARE * len(vectors_ND):
                scores_NQ = vectors_ND[keep] @ queries_QD.T
            else:
                scores_NQ = (vectors_ND @ queries_QD.T)[keep]
            yield np.flatnonzero(keep) + first_row, scores_NQ

    def _blocks(self) -> Iterator[tuple[int, Vector]]:
        """Row number of the first, and the rows in use, of each chunk."""
        first_row = 0
        for chunk in self.chunks:
            used = min(len(chunk), self.size - first_row)
            if used <= 0:
                return
            yield first_row, chunk[:used]
            first_row += used

    def _cut(self, scores_N: npt.NDArray[np.float32], *, k: int) -> float:
        """The least rough score that may be among the k best."""
        if len(scores_N) <= k:
            return -math.inf
        dimensions: int = self.chunks[0].shape[1]
        # A sum of D products of float32 is off by at most D * 2^-24 for unit vectors, at either of two rows;
        # twice that again, for a library that fuses or reorders.
        error = 4 * dimensions * 2.0**-24
        least_of_k = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
        return float(least_of_k) - error

    def _rescored(
        self, query_D: Vector, rows_N: Rows, rough_N: npt.NDArray[np.float32], *, k: int
    ) -> Candidates:
        rows_N = rows_N[rough_N >= self._cut(rough_N, k=k)]
        query = query_D.astype(np.float64)
        vectors = self.vectors_of(rows_N).astype(np.float64)
        cosines = (vectors * query).sum(axis=1)
        cosines /= np.linalg.norm(query) * np.sqrt((vectors * vectors).sum(axis=1))
        scores = np.clip(cosines, -1.0, 1.0).astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        if len(order) > k:
            order = order[: int(np.searchsorted(-scores[order], -scores[order[k - 1]], side="right"))]
        return Candidates(self.rids[rows_N[order]], scores[order])

    def vectors_of(self, rows_N: Rows) -> Vector:
        """The vectors of some rows, copied: float32 [N, D]."""
        vectors = np.empty((len(rows_N), self.chunks[0].shape[1]), dtype=np.float32)
        for first_row, block in self._blocks():
            here = (rows_N >= first_row) & (rows_N < first_row + len(block))
            vectors[here] = block[rows_N[here] - first_row]
        return vectors


class VectorIndex:
    """The newest snapshot, and how the next one is made. One writer at a time; any number of readers."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._snapshot = Snapshot(
            seq=0,
            chunks=(),
            rids=np.empty(0, dtype=np.int64),
            size=0,
            alive=np.empty(0, dtype=np.bool_),
            alive_count=0,
        )

    @property
    def snapshot(self) -> Snapshot:
        """The state that searches see."""
        return self._snapshot

    def publish(self, snapshot: Snapshot) -> None:
        """Lets searches see a prepared state. Cannot fail, so it may follow a commit."""
        self._snapshot = snapshot

    def prepare(self, *, seq: int, rids: Rows, vectors_ND: Vector, removed: Rows) -> Snapshot:
        """Makes the next state, which nobody sees until it is published, and which may be forgotten.

        Args:
            seq: The commit it will be the state after.
            rids: int64 [N], rising, above all that were here.
            vectors_ND: float32, normalised.
            removed: Rids that die; unknown ones are passed over.
        """
        before = self._snapshot
        alive = before.alive.copy()
        alive[before.rows_of(removed)] = False
        now_alive = int(np.count_nonzero(alive))
        dead = before.size - now_alive
        base = Snapshot(seq, before.chunks, before.rids, before.size, alive, now_alive)
        if dead >= max(MIN_DEAD_TO_COMPACT, DEAD_SHARE_TO_COMPACT * before.size):
            rows = np.flatnonzero(alive)
            empty = Snapshot(seq, (), np.empty(0, dtype=np.int64), 0, np.empty(0, dtype=np.bool_), 0)
            base = self._appended(empty, before.rids[rows], before.vectors_of(rows))
        return self._appended(base, rids, vectors_ND)

    def _appended(self, base: Snapshot, rids: Rows, vectors_ND: Vector) -> Snapshot:
        size = base.size + len(rids)
        chunks = self._with_room(base.chunks, size)
        first_row = 0
        for chunk in chunks:
            start, stop = max(base.size, first_row), min(size, first_row + len(chunk))
            if start < stop:
                chunk[start - first_row : stop - first_row] = vectors_ND[start - base.size : stop - base.size]
            first_row += len(chunk)
        all_rids = base.rids
        if size > len(all_rids):
            all_rids = np.empty(max(size, 2 * len(all_rids)), dtype=np.int64)
            all_rids[: base.size] = base.rids[: base.size]
        all_rids[base.size : size] = rids
        alive = np.concatenate([base.alive, np.ones(len(rids), dtype=np.bool_)])
        return Snapshot(base.seq, chunks, all_rids, size, alive, base.alive_count + len(rids))

    def _with_room(self, chunks: tuple[Vector, ...], size: int) -> tuple[Vector, ...]:
        room = sum(len(chunk) for chunk in chunks)
        while room < size:
            rows = min(2 * len(chunks[-1]), MAX_CHUNK_ROWS) if chunks else FIRST_CHUNK_ROWS
            chunks = (*chunks, np.empty((rows, self._dimensions), dtype=np.float32))
            room += rows
        return chunks
