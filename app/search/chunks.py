"""Rows in memory: chunks of vectors that never move, and views that say which of their rows are there.

A writer puts new rows behind a chunk's last one, where no reader of an older view looks; a row that dies is
marked in a new copy of the mask. So a view, once made, never changes, and readers take no lock.

Dimension key: N rows · D embedding
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.search.codes import ByteCodes
from app.search.collection import Vector

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

MAX_CHUNK_ROWS = 65_536
_MAX_CHUNK_BYTES = 96 * 2**20  # 65,536 rows at 384 dimensions; memory that isn't written yet costs nothing
_MIN_CHUNK_ROWS = 64
NO_ROWS: Rows = np.empty(0, dtype=np.int64)


def rows_per_chunk(dimensions: int) -> int:
    """How many rows a new chunk has room for."""
    return min(MAX_CHUNK_ROWS, max(_MIN_CHUNK_ROWS, _MAX_CHUNK_BYTES // (4 * dimensions)))


class Chunk:
    """Room for rows.

    Attributes:
        vectors: float32 [rows, D].
        rids: int64 [rows], rising: the store's number of each row.
        codes: The rows in 8 bits, once the chunk is full and nothing else makes its search fast; whoever
            reads it keeps what it read, as it may be taken away.
    """

    __slots__ = ("codes", "rids", "vectors")

    def __init__(self, rows: int, dimensions: int) -> None:
        self.vectors: Vector = np.empty((rows, dimensions), dtype=np.float32)
        self.rids: Rows = np.empty(rows, dtype=np.int64)
        self.codes: ByteCodes | None = None

    @property
    def room(self) -> int:
        """How many rows it can hold."""
        return len(self.rids)


@dataclass(frozen=True, slots=True)
class View:
    """A chunk at one moment.

    Attributes:
        size: Rows in use, at least one; dead ones included.
        alive: bool [room], True behind `size`; None while all live.
        alive_count: How many of the rows in use live.
    """

    chunk: Chunk
    size: int
    alive: Mask | None
    alive_count: int

    @property
    def is_full(self) -> bool:
        """Whether no row will follow."""
        return self.size == self.chunk.room

    @property
    def codes(self) -> ByteCodes | None:
        """The rows in 8 bits; None where some of the chunk's came later than the view."""
        return self.chunk.codes if self.is_full else None

    @property
    def dead_count(self) -> int:
        """How many of the rows in use are dead."""
        return self.size - self.alive_count

    @property
    def last_rid(self) -> int:
        """The greatest rid."""
        return int(self.chunk.rids[self.size - 1])

    def rows_of(self, rids: Rows) -> Rows:
        """Row numbers of the rids that are here, dead or alive; the others are passed over."""
        known = self.chunk.rids[: self.size]
        first = int(known[0])
        if int(known[-1]) - first == self.size - 1:  # no gap, as where one collection is written at a time
            rows = rids - first
            if len(rows) and (rows[0] < 0 or rows[-1] >= self.size):
                rows = rows[(rows >= 0) & (rows < self.size)]
            return rows
        rows = np.searchsorted(known, rids)
        rows = np.minimum(rows, self.size - 1)
        found: Rows = rows[known[rows] == rids]
        return found

    def living(self, rows: Rows) -> Rows:
        """Those of some rows that live."""
        return rows if self.alive is None else rows[self.alive[rows]]

    def living_rows(self, *, start: int = 0) -> Rows:
        """All rows that live, from one on."""
        if self.alive is None:
            return np.arange(start, self.size, dtype=np.int64)
        return np.flatnonzero(self.alive[start : self.size]) + start

    def without(self, rows: Rows) -> "View":
        """The view after some rows died."""
        alive = np.ones(self.chunk.room, dtype=np.bool_) if self.alive is None else self.alive.copy()
        alive[rows] = False
        return View(self.chunk, self.size, alive, int(np.count_nonzero(alive[: self.size])))

    def appended(self, rids: Rows, vectors_ND: Vector) -> "View":
        """The view after rows came, for which there must be room; the chunk has them from now on."""
        size = self.size + len(rids)
        self.chunk.rids[self.size : size] = rids
        self.chunk.vectors[self.size : size] = vectors_ND
        return View(self.chunk, size, self.alive, self.alive_count + len(rids))


def appended(views: tuple[View, ...], rids: Rows, vectors_ND: Vector) -> tuple[View, ...]:
    """The views after rows came: behind the last one's, and in new chunks where they don't fit.

    Args:
        views: Of a collection, in order of their rids.
        rids: int64 [N], rising, above all that are there.
        vectors_ND: float32.
    """
    made = list(views)
    start = 0
    while start < len(rids):
        if not made or made[-1].is_full:
            dimensions = vectors_ND.shape[1]
            made.append(View(Chunk(rows_per_chunk(dimensions), dimensions), 0, None, 0))
        stop = min(len(rids), start + made[-1].chunk.room - made[-1].size)
        made[-1] = made[-1].appended(rids[start:stop], vectors_ND[start:stop])
        start = stop
    return tuple(made)


def spread(firsts: Rows, rids: Rows) -> list[tuple[int, Rows]]:
    """Which view each rid can be in: the view's number, and its rids.

    Args:
        firsts: int64 [views]: the first rid of each view.
        rids: Rising.
    """
    if len(firsts) == 1:
        return [(0, rids)] if len(rids) else []
    bounds = np.searchsorted(rids, firsts).tolist()
    bounds.append(len(rids))
    return [
        (number, rids[bounds[number] : bounds[number + 1]])
        for number in range(len(firsts))
        if bounds[number] < bounds[number + 1]
    ]
