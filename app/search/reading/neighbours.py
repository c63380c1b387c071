"""The k nearest of every vector among all: a graph that duplicates and maps are read from.

Up to `EXACT_ITEMS` all pairs are compared. Above, vectors are sorted into about sqrt(N) cells by k-means, and
each is compared with those of the `PROBES` cells that are nearest to itself: N * PROBES * sqrt(N) pairs,
block by block, so that memory holds the vectors of one cell and the result, however many there are.

Dimension key: N vectors · K neighbours · C cells · P probes · D embedding
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import faiss
import numpy as np
import numpy.typing as npt

from app.search.collection import Vector

Rows = npt.NDArray[np.int64]

EXACT_ITEMS: Final = 20_000  # 20,000 * 20,000 * 384 multiplications: some seconds of a core
PROBES: Final = 8
_BLOCK_ROWS: Final = 8_192
_TRAIN_PER_CELL: Final = 64
_SEED: Final = 0


class Vectors:
    """Some rows of an array that may be mapped and larger than memory.

    Attributes:
        array_MD: float32.
        rows: int64 [N], which of its rows these are.
    """

    def __init__(self, array_MD: Vector, rows: Rows | None = None) -> None:
        self.array_MD = array_MD
        self.rows = np.arange(len(array_MD)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Rows | slice) -> Vector:
        """A copy of some of them: float32, C-contiguous."""
        return np.ascontiguousarray(self.array_MD[self.rows[places]])


@dataclass(frozen=True)
class Graph:
    """Who is near whom; best first, -1 and -inf where there are no more.

    Attributes:
        rows: int32 [N, K], never the vector's own row.
        scores: float32 [N, K], cosines.
    """

    rows: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]


def nearest_neighbours(
    vectors_ND: Vectors, *, k: int, report: Callable[[float], None], exact_items: int = EXACT_ITEMS
) -> Graph:
    """Finds the k nearest of each vector.

    Args:
        vectors_ND: Of length 1.
        k: At least 1.
        report: Told what share is done.
        exact_items: Up to how many all pairs are compared.

    Returns:
        Exact up to `exact_items`. Above it a neighbour is missed only if its cell is not among the nearest
        `PROBES` of the vector, which is rare for one that is very near.
    """
    count = len(vectors_ND)
    graph = Graph(np.full((count, k), -1, np.int32), np.full((count, k), -np.inf, np.float32))
    if count <= exact_items:
        everyone = np.arange(count)
        for start in range(0, count, _BLOCK_ROWS):
            _merge(graph, everyone[start : start + _BLOCK_ROWS], everyone, vectors_ND)
            report(min(1.0, (start + _BLOCK_ROWS) / count))
        return graph
    _by_cells(graph, vectors_ND, report=report)
    return graph


def _by_cells(graph: Graph, vectors_ND: Vectors, *, report: Callable[[float], None]) -> None:
    cells = max(PROBES, round(math.sqrt(len(vectors_ND))))
    probes_NP = _nearest_cells(vectors_ND, cells=cells)
    report(0.2)
    own_N = probes_NP[:, 0]
    by_own = np.argsort(own_N, kind="stable")
    own_ends = np.searchsorted(own_N[by_own], np.arange(cells + 1))
    flat = probes_NP.reshape(-1)
    by_probe = np.argsort(flat, kind="stable")
    probe_ends = np.searchsorted(flat[by_probe], np.arange(cells + 1))
    for cell in range(cells):
        members = by_own[own_ends[cell] : own_ends[cell + 1]]
        if len(members):
            guests = by_probe[probe_ends[cell] : probe_ends[cell + 1]] // probes_NP.shape[1]
            for start in range(0, len(guests), _BLOCK_ROWS):
                _merge(graph, guests[start : start + _BLOCK_ROWS], members, vectors_ND)
        report(0.2 + 0.8 * (cell + 1) / cells)


def _nearest_cells(vectors_ND: Vectors, *, cells: int) -> npt.NDArray[np.int32]:
    count = len(vectors_ND)
    sample = np.random.default_rng(_SEED).choice(count, min(count, cells * _TRAIN_PER_CELL), replace=False)
    kmeans = faiss.Kmeans(
        vectors_ND.array_MD.shape[1], cells, niter=10, spherical=True, seed=_SEED, min_points_per_centroid=1
    )
    kmeans.train(vectors_ND.take(np.sort(sample)))
    nearest_NP = np.empty((count, min(PROBES, cells)), dtype=np.int32)
    for start in range(0, count, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        _, nearest_NP[block] = faiss.knn(
            vectors_ND.take(block),
            np.asarray(kmeans.centroids),
            nearest_NP.shape[1],
            metric=faiss.METRIC_INNER_PRODUCT,
        )
    return nearest_NP


def _merge(graph: Graph, queries: Rows, others: Rows, vectors_ND: Vectors) -> None:
    """Lets the best of `others` into the neighbours of `queries`."""
    k = graph.rows.shape[1]
    wanted = min(k + 1, len(others))  # one more, as the query itself may be among them
    scores, places = faiss.knn(
        vectors_ND.take(queries),
        vectors_ND.take(others),
        wanted,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    rows = others[places]
    scores[rows == queries[:, None]] = -np.inf
    all_rows = np.concatenate([graph.rows[queries], rows.astype(np.int32)], axis=1)
    all_scores = np.concatenate([graph.scores[queries], scores], axis=1)
    best = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
    graph.scores[queries] = kept = np.take_along_axis(all_scores, best, axis=1)
    graph.rows[queries] = np.where(np.isneginf(kept), -1, np.take_along_axis(all_rows, best, axis=1))
