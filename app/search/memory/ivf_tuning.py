"""Chooses how many lists an IVF compares, by the recall that it measures against comparing everything.

The queries are stored vectors, themselves left out. A neighbour counts as found if its score is as high as
the last of the true ones: copies of one picture are as good as each other.

Dimension key: Q queries · K neighbours · D embedding
"""

from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np

from app.search.collection import Vector
from app.search.memory.chunks import Rows, View, spread
from app.search.memory.ivf import IvfView, Setting
from app.search.memory.ivf_build import living_blocks
from app.search.memory.kmeans import GivenUp
from app.search.memory.products import products_at, rounding_error

TARGET_RECALL = 0.995  # vectors that aren't stored find a little less
LEAST_RECALL = 0.97  # what a search that isn't asked to be exact may fall to
_NEIGHBOURS = (10, 50, 200, 1_000)
_QUERIES = {10: 200, 50: 100, 200: 50, 1_000: 25}
_DEPTHS = {
    10: (100, 200, 400, 800),
    50: (200, 400, 800, 1_600),
    200: (600, 1_200, 2_400),
    1_000: (2_000, 4_000, 8_000),
}
_LEAST_PROBES = 4
_RECALL_STEP = 0.001  # a neighbour of 1,000; the queries can't tell less
_SEED = 0


@dataclass(frozen=True)
class _Truth:
    """Queries of stored vectors, and the score of their k-th nearest other row: float32 [Q] for each k."""

    rids_Q: Rows
    queries_QD: Vector
    least_Q: dict[int, Vector]


def tuned(view: IvfView, views: tuple[View, ...], *, stopped: Callable[[], bool]) -> tuple[Setting, ...]:
    """Settings for the rows that the IVF has, for rising k; as far as k goes, they reach `LEAST_RECALL`.

    Raises:
        GivenUp: It was told to.
    """
    end, row = view.tail
    covered = views[:end] + ((_until(views[end], row),) if row else ())
    truth = _truth(covered, stopped=stopped)
    settings: list[Setting] = []
    for k in _NEIGHBOURS:
        setting = _setting(view, covered, truth, k=k, stopped=stopped)
        if setting is None or setting.recall < LEAST_RECALL:
            break
        settings.append(setting)
    return tuple(settings)


def _until(view: View, row: int) -> View:
    alive_count = row if view.alive is None else int(np.count_nonzero(view.alive[:row]))
    return View(view.chunk, row, view.alive, alive_count)


def _truth(views: tuple[View, ...], *, stopped: Callable[[], bool]) -> _Truth:
    rows = sum(view.alive_count for view in views)
    queries = min(rows, max(_QUERIES.values()))
    places = np.sort(np.random.default_rng(_SEED).choice(rows, queries, replace=False))
    rids, vectors, before = [], [], 0
    for rids_N, vectors_ND in living_blocks(views):
        here = places[(places >= before) & (places < before + len(rids_N))] - before
        rids.append(rids_N[here])
        vectors.append(vectors_ND[here])
        before += len(rids_N)
    # In another order than the rows', so that the first few of them are from all over.
    order = np.random.default_rng(_SEED).permutation(queries)
    queries_QD = np.concatenate(vectors)[order]
    # Each query finds itself, or a copy that is as near: so one more is kept.
    heaps = {
        k: faiss.ResultHeap(min(queries, _QUERIES[k]), k + 1, keep_max=True) for k in _NEIGHBOURS if k < rows
    }
    for _, vectors_ND in living_blocks(views):
        if stopped():
            raise GivenUp
        if not len(vectors_ND):
            continue
        for k, heap in heaps.items():
            heap.add_result(
                *faiss.knn(
                    queries_QD[: heap.nq],
                    vectors_ND,
                    min(k + 1, len(vectors_ND)),
                    metric=faiss.METRIC_INNER_PRODUCT,
                )
            )
    for heap in heaps.values():
        heap.finalize()
    return _Truth(np.concatenate(rids)[order], queries_QD, {k: heap.D[:, k] for k, heap in heaps.items()})


def _setting(
    view: IvfView, views: tuple[View, ...], truth: _Truth, *, k: int, stopped: Callable[[], bool]
) -> Setting | None:
    """The fewest lists that reach the target, or about the most that can be had; None for too few rows."""
    if k not in truth.least_Q:
        return None
    settings: list[Setting] = []
    probes, before = _LEAST_PROBES, 0.0
    while True:
        if stopped():
            raise GivenUp
        probes = min(probes, view.ivf.lists)
        recalls = _recalls(view, views, truth, probes=probes, k=k)
        settings += [Setting(k, probes, depth, r) for depth, r in zip(_DEPTHS[k], recalls, strict=True)]
        more_is_in_vain = recalls[-1] >= LEAST_RECALL and recalls[-1] - before < _RECALL_STEP
        if recalls[-1] >= TARGET_RECALL or more_is_in_vain or probes == view.ivf.lists:
            break
        probes, before = 2 * probes, recalls[-1]
    best = max(setting.recall for setting in settings)
    target = TARGET_RECALL if best >= TARGET_RECALL else best - _RECALL_STEP
    return next(setting for setting in settings if setting.recall >= target)


def _recalls(view: IvfView, views: tuple[View, ...], truth: _Truth, *, probes: int, k: int) -> list[float]:
    """The recall for each depth: the best that a deep search found are those that a shallow one finds."""
    firsts = np.array([v.chunk.rids[0] for v in views])
    queries = len(truth.least_Q[k])
    turned_QE = view.ivf.rotation.of_many(truth.queries_QD[:queries])
    slots_QK = view.slots_near(turned_QE, probes=probes, depth=_DEPTHS[k][-1] + 1)
    found = np.zeros(len(_DEPTHS[k]))
    for rid, query_D, least, slots_K in zip(
        truth.rids_Q[:queries], truth.queries_QD[:queries], truth.least_Q[k], slots_QK, strict=True
    ):
        rids_K = view.ivf.rids[slots_K[slots_K >= 0]]
        rids_K = rids_K[rids_K != rid]
        order = np.argsort(rids_K)
        rough_K = np.empty(len(rids_K), dtype=np.float32)
        start = 0
        for number, here in spread(firsts, rids_K[order]):
            rows = views[number].rows_of(here)
            places = order[start : start + len(here)]
            rough_K[places] = products_at(views[number].chunk.vectors, rows, query_D)
            start += len(here)
        hits_K = np.cumsum(rough_K >= least - rounding_error(len(query_D)))
        for i, depth in enumerate(_DEPTHS[k]):
            if len(hits_K):
                found[i] += min(k, int(hits_K[min(depth, len(hits_K)) - 1]))
    return [float(share) for share in found / (queries * k)]
