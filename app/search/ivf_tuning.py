"""Chooses how many lists an IVF compares, by the recall that it measures against comparing everything.

The queries are stored vectors, themselves left out. A neighbour counts as found if its score is as high as
the last of the true ones: copies of one picture are as good as each other.

Dimension key: Q queries · K neighbours · D embedding
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import faiss
import numpy as np

from app.search.chunks import Rows, View, spread
from app.search.collection import Vector
from app.search.ivf import IvfView, Setting
from app.search.ivf_build import living_blocks
from app.search.kmeans import GivenUp
from app.search.products import products_at, rounding_error

TARGET_RECALL = 0.99
LEAST_RECALL = 0.97  # what a search that isn't asked to be exact may fall to
_NEIGHBOURS = (10, 50, 200, 1_000)
_QUERIES = {10: 200, 50: 100, 200: 50, 1_000: 25}
_DEPTHS = {10: (100, 200, 400), 50: (200, 400, 800), 200: (600, 1_200, 2_400), 1_000: (2_000, 4_000, 8_000)}
_SEED = 0


@dataclass(frozen=True)
class _Truth:
    """Queries of stored vectors, and the scores of their nearest living rows, falling: [Q, K]."""

    rids_Q: Rows
    queries_QD: Vector
    scores_QK: Vector


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
    kept = min(rows, _NEIGHBOURS[-1] + 1)
    heap = faiss.ResultHeap(queries, kept, keep_max=True)
    for _, vectors_ND in living_blocks(views):
        if stopped():
            raise GivenUp
        scores, places_QK = faiss.knn(
            queries_QD, vectors_ND, min(kept, len(vectors_ND)), metric=faiss.METRIC_INNER_PRODUCT
        )
        heap.add_result(scores, places_QK)
    heap.finalize()
    # Each query finds itself, or a copy that is as near: one score of 1 is left out.
    return _Truth(np.concatenate(rids)[order], queries_QD, heap.D[:, 1:])


def _setting(
    view: IvfView, views: tuple[View, ...], truth: _Truth, *, k: int, stopped: Callable[[], bool]
) -> Setting | None:
    """The fastest setting that reaches the target, or the best where none does; None for too few rows."""
    if truth.scores_QK.shape[1] < k:
        return None
    best: tuple[float, Setting] | None = None
    fallback: Setting | None = None
    probes = 4
    while True:
        probes = min(probes, view.ivf.lists)
        for depth in _DEPTHS[k]:
            if stopped():
                raise GivenUp
            seconds, recall = _measured(view, views, truth, setting=Setting(k, probes, depth, 0.0))
            setting = Setting(k, probes, depth, recall)
            if recall >= TARGET_RECALL and (best is None or seconds < best[0]):
                best = (seconds, setting)
            if fallback is None or recall > fallback.recall:
                fallback = setting
        # More lists than twice those that are enough only cost more.
        if probes == view.ivf.lists or (best is not None and probes >= 2 * best[1].probes):
            return fallback if best is None else best[1]
        probes *= 2


def _measured(
    view: IvfView, views: tuple[View, ...], truth: _Truth, *, setting: Setting
) -> tuple[float, float]:
    """Seconds and recall of a setting."""
    firsts = np.array([v.chunk.rids[0] for v in views])
    queries = min(len(truth.rids_Q), _QUERIES[setting.k])
    began, found = time.perf_counter(), 0
    for rid, query_D, scores_K in zip(
        truth.rids_Q[:queries], truth.queries_QD[:queries], truth.scores_QK[:queries], strict=True
    ):
        rids = view.rids_near(query_D, probes=setting.probes, depth=setting.depth + 1, chosen=None)
        rids = rids[rids != rid]
        least = scores_K[setting.k - 1] - rounding_error(len(query_D))
        enough = 0
        for number, here in spread(firsts, rids):
            scores = products_at(views[number].chunk.vectors, views[number].rows_of(here), query_D)
            enough += int(np.count_nonzero(scores >= least))
        found += min(enough, setting.k)
    return (time.perf_counter() - began) / queries, found / (queries * setting.k)
