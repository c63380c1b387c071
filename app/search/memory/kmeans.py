"""Spherical k-means, in steps that can be given up.

faiss has its own, but it can be neither stopped before it is done nor told how many threads to take.

Dimension key: N rows · L lists · E embedding
"""

from collections.abc import Callable

import faiss
import numpy as np
import numpy.typing as npt

from app.search.collection import Vector

ROUNDS = 8
_ROWS_AT_ONCE = 8_192
_SEED = 0


class GivenUp(Exception):
    """The work was no longer wanted."""


def train_centroids(sample_NE: Vector, *, lists: int, stopped: Callable[[], bool]) -> Vector:
    """Directions that the rows gather around: float32 [L, E], of length 1.

    Args:
        sample_NE: Of length 1; at least `lists` of them.
        lists: L.
        stopped: Asked every few milliseconds whether to give up.

    Raises:
        GivenUp: It was told to.
    """
    rng = np.random.default_rng(_SEED)
    centroids_LE = sample_NE[rng.choice(len(sample_NE), lists, replace=False)].copy()
    for _ in range(ROUNDS):
        nearest_N = _assigned(sample_NE, centroids_LE, stopped=stopped)
        order = np.argsort(nearest_N, kind="stable")
        counts_L = np.bincount(nearest_N, minlength=lists)
        used_L = counts_L > 0
        starts = np.concatenate([[0], np.cumsum(counts_L)[:-1]])[used_L]
        centroids_LE[used_L] = np.add.reduceat(sample_NE[order], starts, axis=0)
        # A list that nobody chose begins again at a row of the sample.
        centroids_LE[~used_L] = sample_NE[rng.choice(len(sample_NE), int((~used_L).sum()), replace=False)]
        lengths = np.linalg.norm(centroids_LE, axis=1, keepdims=True)
        centroids_LE /= np.maximum(lengths, np.finfo(np.float32).tiny)
    return centroids_LE


def _assigned(
    sample_NE: Vector, centroids_LE: Vector, *, stopped: Callable[[], bool]
) -> npt.NDArray[np.int64]:
    index = on_gpus(faiss.IndexFlatIP(centroids_LE.shape[1]))
    index.add(centroids_LE)
    nearest_N = np.empty(len(sample_NE), dtype=np.int64)
    for start in range(0, len(sample_NE), _ROWS_AT_ONCE):
        if stopped():
            raise GivenUp
        _, nearest = index.search(sample_NE[start : start + _ROWS_AT_ONCE], 1)
        nearest_N[start : start + _ROWS_AT_ONCE] = nearest[:, 0]
    return nearest_N


def on_gpus(index: faiss.Index) -> faiss.Index:
    """The index on all GPUs, where this faiss was built for them and there are some; else the index."""
    if faiss.get_num_gpus() == 0:
        return index
    return faiss.index_cpu_to_all_gpus(index)
