"""The best rows of a query: gathered by rough scores, then scored again so that ties are ties.

Scores in float32 depend on how many rows and queries are multiplied at once. So all rows within the error
bound of the k-th are kept, and scored again one by one in float64: the same vector has the same score in
every query, alone or in a batch.

Dimension key: N rows · D embedding
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.search.collection import Vector
from app.search.memory.chunks import NO_ROWS, Rows, View
from app.search.memory.products import rounding_error

Scores = npt.NDArray[np.float32]
_NO_SCORES: Scores = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class Candidates:
    """The best rows of one query, best first: the k asked for, and all that tie with the last of them.

    Attributes:
        rids: int64 [N].
        scores: float32 [N], cosines in [-1, 1].
    """

    rids: Rows
    scores: Scores


def cut(scores_N: Scores, *, k: int, dimensions: int) -> float:
    """The least rough score that may be among the k best."""
    if len(scores_N) <= k:
        return -math.inf
    least_of_k = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
    return float(least_of_k) - rounding_error(dimensions)


class Pool:
    """What may be among the k best rows of one query, so far.

    Args:
        query_D: float32.
        k: How many are asked for.
        excluded: Rids to leave out, rising; rows of them may be added all the same.
    """

    __slots__ = ("_excluded", "_parts", "k", "query_D")

    def __init__(self, query_D: Vector, *, k: int, excluded: Rows) -> None:
        self.query_D = query_D
        self.k = k
        self._excluded = excluded
        self._parts: list[tuple[View, Rows, Scores]] = []

    @property
    def excluded_count(self) -> int:
        """How many rids are left out."""
        return len(self._excluded)

    def ties_with_all(self, rough: list[Scores]) -> bool:
        """Whether so many rows tie with the k-th that they all do, and others may."""
        scores_N = np.concatenate(rough)
        least = cut(scores_N, k=self.k + len(self._excluded), dimensions=len(self.query_D))
        return bool(scores_N.min() >= least)

    def add(self, view: View, rows_N: Rows, rough_N: Scores) -> None:
        """Takes living rows of a view, no row twice, those that can't be among the best left out."""
        wanted = self.k + len(self._excluded)
        if len(rows_N) > wanted:
            keep = rough_N >= cut(rough_N, k=wanted, dimensions=len(self.query_D))
            rows_N, rough_N = rows_N[keep], rough_N[keep]
        self._parts.append((view, rows_N, rough_N))

    def best(self) -> Candidates:
        """The k best of all that was added, and all that tie with the last of them."""
        parts = [part for part in self._parts if len(part[1])]
        if not parts:
            return Candidates(NO_ROWS, _NO_SCORES)
        rids_N = np.concatenate([view.chunk.rids[rows] for view, rows, _ in parts])
        rough_N = np.concatenate([rough for _, _, rough in parts])
        if self._excluded.size:
            rough_N[np.isin(rids_N, self._excluded)] = -np.inf
            keep_N = rough_N > -np.inf
            keep_N &= rough_N >= cut(rough_N[keep_N], k=self.k, dimensions=len(self.query_D))
        else:
            keep_N = rough_N >= cut(rough_N, k=self.k, dimensions=len(self.query_D))
        return self._rescored(rids_N[keep_N], self._vectors(parts, keep_N))

    def _vectors(self, parts: list[tuple[View, Rows, Scores]], keep_N: npt.NDArray[np.bool_]) -> Vector:
        blocks: list[Vector] = []
        start = 0
        for view, rows, _ in parts:
            kept = rows[keep_N[start : start + len(rows)]]
            if len(kept):
                blocks.append(view.chunk.vectors[kept])
            start += len(rows)
        return np.concatenate(blocks) if blocks else np.empty((0, len(self.query_D)), dtype=np.float32)

    def _rescored(self, rids_N: Rows, vectors_ND: Vector) -> Candidates:
        query_D = self.query_D.astype(np.float64)
        wide_ND = vectors_ND.astype(np.float64)
        cosines_N = (wide_ND * query_D).sum(axis=1)
        cosines_N /= np.sqrt((query_D * query_D).sum()) * np.sqrt((wide_ND * wide_ND).sum(axis=1))
        scores_N = np.clip(cosines_N, -1.0, 1.0).astype(np.float32)
        order = np.argsort(-scores_N, kind="stable")
        if len(order) > self.k:
            last = scores_N[order[self.k - 1]]
            order = order[: int(np.searchsorted(-scores_N[order], -last, side="right"))]
        return Candidates(rids_N[order], scores_N[order])
