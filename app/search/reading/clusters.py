"""A collection in parts: spherical k-means, and the items that show what a part is.

Dimension key: N items, in order of id · C clusters · D embedding · R representatives · O outliers
"""

import math
from collections.abc import Callable
from typing import Final

import faiss
import numpy as np
import numpy.typing as npt
from sklearn.cluster import kmeans_plusplus

from app.search.collection import Vector
from app.search.reading.file import Array
from app.search.reading.marks import vector_marks
from app.search.reading.spool import Spool

REPRESENTATIVES: Final = 8
OUTLIERS: Final = 4

_MAX_CHOSEN_CLUSTERS: Final = 100  # more rows than that nobody reads
_TRAIN_PER_CLUSTER: Final = 256  # faiss' own bound: more items move a centroid by less than they cost
_TRIES: Final = 3  # k-means ends in a local optimum; the best of three starts
_ITERATIONS: Final = 25
_CANDIDATES: Final = 64
_BLOCK_ROWS: Final = 8_192


def chosen_count(items: int) -> int:
    """How many clusters, where nobody says: sqrt(items / 2), at least 2 and at most 100.

    The old rule of thumb: the number of clusters and their size grow together, 2,000 pictures are 32 groups
    of 63. What is natural in the data no rule knows, so a number can be asked for.
    """
    return max(2, min(_MAX_CHOSEN_CLUSTERS, round(math.sqrt(items / 2))))


def find_clusters(spool: Spool, *, count: int | None, report: Callable[[float], None]) -> dict[str, Array]:
    """Parts the items.

    k-means on at most 256 items for each cluster, the best of three starts by k-means++; then every item
    joins the centroid that is nearest by cosine.

    Args:
        spool: The items.
        count: How many clusters, at least 1; None for `chosen_count`. There are fewer where there are fewer
            different vectors.
        report: Told what share is done.

    Returns:
        The largest first: `sizes` int32 [C]; `cohesion` float32 [C], the mean cosine of members to the
        centroid; `representatives` int32 [C, R] and `outliers` int32 [C, O], rows, -1 where there are no
        more; and `labels` int32 [N], the cluster of each item.
    """
    if not len(spool):
        return _described(np.empty(0, np.int32), np.empty(0, np.float32), spool.vectors_ND)
    marks, first = np.unique(vector_marks(spool.vectors_ND), return_index=True)
    clusters = min(count or chosen_count(len(spool)), len(marks))
    centroids_CD = _centroids(_training_vectors(spool, first, clusters=clusters), clusters=clusters)
    report(0.5)
    labels = np.empty(len(spool), np.int32)
    cosines = np.empty(len(spool), np.float32)
    for start in range(0, len(spool), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        vectors_ND = np.ascontiguousarray(spool.vectors_ND[block])
        scores, nearest = faiss.knn(vectors_ND, centroids_CD, 1, metric=faiss.METRIC_INNER_PRODUCT)
        labels[block], cosines[block] = nearest[:, 0], scores[:, 0]
        report(0.5 + 0.4 * min(1.0, (start + _BLOCK_ROWS) / len(spool)))
    return _described(labels, cosines, spool.vectors_ND)


def _training_vectors(spool: Spool, first: npt.NDArray[np.int64], *, clusters: int) -> Vector:
    rows = np.arange(len(spool))
    if len(rows) > clusters * _TRAIN_PER_CLUSTER:
        rows = np.random.default_rng(0).choice(rows, clusters * _TRAIN_PER_CLUSTER, replace=False)
        # Where few vectors are different, a sample may have fewer of them than there are clusters.
        rows = np.union1d(rows, first[:clusters]) if len(first) < len(rows) else np.sort(rows)
    return np.ascontiguousarray(spool.vectors_ND[rows])


def _centroids(vectors_ND: Vector, *, clusters: int) -> Vector:
    best = -math.inf
    centroids_CD = vectors_ND[:0]
    for seed in range(_TRIES):
        begin_CD, _ = kmeans_plusplus(vectors_ND, clusters, random_state=seed)
        kmeans = faiss.Kmeans(
            vectors_ND.shape[1],
            clusters,
            niter=_ITERATIONS,
            spherical=True,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=2 * _TRAIN_PER_CLUSTER,
        )
        kmeans.train(vectors_ND, init_centroids=begin_CD)
        objective = float(np.asarray(kmeans.obj)[-1])  # the sum of cosines
        if objective > best:
            best, centroids_CD = objective, np.asarray(kmeans.centroids)
    return centroids_CD


def _described(
    labels: npt.NDArray[np.int32], cosines: npt.NDArray[np.float32], vectors_ND: Vector
) -> dict[str, Array]:
    found, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    by_size = np.lexsort((found, -sizes))
    place = np.empty_like(by_size)
    place[by_size] = np.arange(len(by_size))
    labels = place[inverse.reshape(-1)].astype(np.int32)
    # Members of each cluster in a row, those nearest the centroid first.
    order = np.lexsort((-cosines, labels))
    ends = np.cumsum(sizes[by_size])
    shown = np.full((len(found), REPRESENTATIVES), -1, np.int32)
    strange = np.full((len(found), OUTLIERS), -1, np.int32)
    cohesion = np.empty(len(found), np.float32)
    for cluster, members in enumerate(np.split(order, ends[:-1]) if len(found) else []):
        cohesion[cluster] = cosines[members].mean()
        chosen = _representatives(members, cosines, vectors_ND)
        shown[cluster, : len(chosen)] = chosen
        far = members[::-1][: min(OUTLIERS, len(members) // 2)]
        strange[cluster, : len(far)] = far
    return {
        "labels": labels,
        "sizes": sizes[by_size].astype(np.int32),
        "cohesion": cohesion,
        "representatives": shown,
        "outliers": strange,
    }


def _representatives(
    members: npt.NDArray[np.int64], cosines: npt.NDArray[np.float32], vectors_ND: Vector
) -> npt.NDArray[np.int64]:
    """Near the centroid, and not alike.

    Of the nearer half of the members, each next is the one with the greatest cosine to the centroid less
    twice its greatest to those chosen: once would make all equal beside one that is the centroid.
    """
    candidates = members[: max(REPRESENTATIVES, min(_CANDIDATES, len(members) // 2))]
    vectors = np.ascontiguousarray(vectors_ND[candidates])
    chosen = [0]
    nearest_chosen = vectors @ vectors[0]
    while len(chosen) < min(REPRESENTATIVES, len(candidates)):
        worth = cosines[candidates] - 2 * nearest_chosen
        worth[chosen] = -np.inf
        chosen.append(int(np.argmax(worth)))
        nearest_chosen = np.maximum(nearest_chosen, vectors @ vectors[chosen[-1]])
    return candidates[chosen]
