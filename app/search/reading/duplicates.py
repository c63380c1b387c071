"""Which items of a collection are (nearly) the same picture: links between them, at every threshold at once.

    copies   = items whose images have the same bytes, or whose vectors are equal: linked in a chain
    graph    = for one of each copies: its LINKS_PER_ITEM nearest
    links    = the heaviest forest of copies and graph (a maximum spanning forest, weights are cosines)
    groups   = at a threshold t: what hangs together by links of at least t

Two items are in one group at t if a path of pairs of at least t joins them in the graph, and the forest keeps
that for every t in N - 1 links. So a threshold is a question to ask, not a computation to wait for.

Only the LINKS_PER_ITEM nearest of an item are looked at (copies of it not counted, which are one). A larger
group is found whole as long as its members' nearest neighbours join it up; more than LINKS_PER_ITEM pictures
that are all nearer to each other than to the rest of their group could be told of as a group of their own.

Dimension key: N items, in order of id · D embedding · E links
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from app.search.reading.duplicate_groups import MIN_THRESHOLD
from app.search.reading.file import Array
from app.search.reading.marks import vector_marks
from app.search.reading.neighbours import Vectors, nearest_neighbours
from app.search.reading.spool import Spool

LINKS_PER_ITEM: Final = 16
_BELOW_ONE: Final = np.nextafter(np.float32(1), np.float32(0))  # 1 is of copies alone


def duplicate_links(spool: Spool, *, report: Callable[[float], None]) -> dict[str, Array]:
    """Links items that are alike, the most alike first.

    Args:
        spool: The items.
        report: Told what share is done.

    Returns:
        `link_rows` int32 [E, 2] and `link_scores` float32 [E], falling, at least `MIN_THRESHOLD`; a score of
        1 means equal bytes or equal vectors.
    """
    first_of_N = _first_copies(spool)
    copies = np.flatnonzero(first_of_N != np.arange(len(spool)))
    firsts = np.flatnonzero(first_of_N == np.arange(len(spool)))
    near_rows, near_scores = _near_links(spool, firsts, report=report)
    copy_rows = np.stack([first_of_N[copies], copies], axis=1)
    rows = np.concatenate([copy_rows, near_rows]).astype(np.int32)
    scores = np.concatenate([np.ones(len(copies), np.float32), near_scores])
    order = np.lexsort((rows[:, 1], rows[:, 0], -scores))
    return {"link_rows": rows[order], "link_scores": scores[order]}


def _first_copies(spool: Spool) -> npt.NDArray[np.int64]:
    """For each item the first that is equal to it, by vector or by bytes: itself, or one before."""
    count = len(spool)
    by_vector = _first_equal(vector_marks(spool.vectors_ND))
    hashed = np.flatnonzero(spool.hashes.any(axis=1))
    by_bytes = hashed[_first_equal(np.ascontiguousarray(spool.hashes[hashed]).view("V32").reshape(-1))]
    # Equal bytes have equal vectors, unless somebody gave others: then both classes are one.
    starts, ends = np.concatenate([np.arange(count), hashed]), np.concatenate([by_vector, by_bytes])
    joined = coo_array((np.ones(len(starts), np.uint8), (starts, ends)), shape=(count, count))
    return _first_equal(connected_components(joined, directed=False)[1])


def _first_equal(keys: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[inverse.reshape(-1)], np.int64)


def _near_links(
    spool: Spool, firsts: npt.NDArray[np.int64], *, report: Callable[[float], None]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    graph = nearest_neighbours(Vectors(spool.vectors_ND, firsts), k=LINKS_PER_ITEM, report=report)
    near = graph.scores >= MIN_THRESHOLD
    if not near.any():
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    # The tree is of least weight and takes 0 for "no edge": 2 - cosine is never 0, and least for the nearest.
    weights = 2.0 - np.minimum(graph.scores[near], _BELOW_ONE).astype(np.float64)
    ends = np.concatenate([[0], near.sum(axis=1).cumsum()])
    links = csr_array((weights, graph.rows[near], ends), shape=(len(firsts), len(firsts)))
    tree = minimum_spanning_tree(links, overwrite=True).tocoo()
    rows = np.stack([firsts[tree.row], firsts[tree.col]], axis=1)
    return rows, (2.0 - tree.data).astype(np.float32)
