"""What embeddings are worth where there are classes: k-NN, linear probe, retrieval; spread and rank without.

`measure` and `measure_within` take matrices, wherever they come from: `evaluate_folder` gives them a model's,
and whoever compares poolings, sizes or whitenings gives them his own.

Dimension key: N reference images · M queries · D embedding
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dino_core.collapse import feature_std, rank_me
from dino_core.knn import knn_hits
from training.evaluation.drawing import FOLDS, folds_of, held_out
from training.evaluation.intervals import Estimate, Resampling
from training.evaluation.linear_probe import linear_probe
from training.evaluation.retrieval import retrieval

TEMPERATURE = 0.07  # of the votes, as in the paper and its code
NEIGHBOURS = (10, 20, 100, 200)
_BY_CLASS = 20  # neighbours, the paper's best; 10 where there are fewer images


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What embeddings are worth.

    Attributes:
        means: By name: `top1_k10` and so on, k-NN accuracy; `linear`, accuracy of the probe; `p_at_1`, the
            nearest is of the class; `map`, mean average precision.
        by_class: k-NN accuracy of each class's queries, by its place.
    """

    means: dict[str, Estimate]
    by_class: dict[int, Estimate]


def measure(
    train_ND: Tensor,
    train_labels_N: Tensor,
    queries_MD: Tensor,
    query_labels_M: Tensor,
    *,
    train_names: Sequence[str] | None = None,
    sources_M: Tensor | None = None,
    probe: bool = True,
) -> Measures:
    """Measures one set of embeddings by another.

        better = measure(whitened, labels, whitened_queries, query_labels).means["map"]
        plain = measure(train, labels, queries, query_labels).means["map"]
        difference(better, plain).verdict        # training.evaluation.intervals

    No number depends on the order of rows, but for the fifth that the probe holds out where there are no
    names, and the draws of the intervals, which go by the order of the queries' sources.

    Args:
        train_ND: Embeddings of any length; what is compared by cosine is scaled to length 1.
        train_labels_N: int64, from 0.
        queries_MD: Embeddings; two at least.
        query_labels_M: int64.
        train_names: All different, for the probe's held-out fifth; their places if there are none.
        sources_M: int64, of which picture each query was made; each of its own if not given.
        probe: Whether to fit the linear probe, which takes most of the time.
    """
    train_unit_ND, unit_MD = functional.normalize(train_ND, dim=1), functional.normalize(queries_MD, dim=1)
    ks = [k for k in NEIGHBOURS if k <= len(train_ND)]
    hits = knn_hits(train_unit_ND, train_labels_N, unit_MD, query_labels_M, ks=ks, temperature=TEMPERATURE)
    right = {f"top1_k{k}": hits_M for k, hits_M in zip(ks, hits, strict=True)}
    if probe and len(torch.unique(train_labels_N)) > 1:
        names = train_names if train_names is not None else [str(place) for place in range(len(train_ND))]
        right["linear"] = linear_probe(
            train_ND, train_labels_N, queries_MD, query_labels_M, held_out_N=held_out(names)
        ).right_M
    return _measured(
        right, query_labels_M, retrieval(train_unit_ND, train_labels_N, unit_MD, query_labels_M), sources_M
    )


def measure_within(
    features_ND: Tensor, labels_N: Tensor, *, names: Sequence[str] | None = None, probe: bool = True
) -> Measures:
    """Measures one set by itself: k-NN of each tenth by the other nine, and the last tenth by a linear probe.

    For retrieval each image asks for the others.

    Args:
        features_ND: Embeddings of any length.
        labels_N: int64, from 0.
        names: All different; their hashes draw the tenths. Places if there are none.
        probe: Whether to fit the linear probe.
    """
    names = names if names is not None else [str(place) for place in range(len(features_ND))]
    folds_N, unit_ND = folds_of(names), functional.normalize(features_ND, dim=1)
    fewest = min(int((folds_N != fold).sum()) for fold in set(folds_N.tolist()))
    ks = [k for k in NEIGHBOURS if k <= fewest]
    hits_kN = torch.zeros(len(ks), len(features_ND), dtype=torch.float64)
    for fold in range(FOLDS if ks else 0):
        inside_N = folds_N == fold
        if bool(inside_N.any()):
            hits_kN[:, inside_N] = torch.stack(
                knn_hits(
                    unit_ND[~inside_N],
                    labels_N[~inside_N],
                    unit_ND[inside_N],
                    labels_N[inside_N],
                    ks=ks,
                    temperature=TEMPERATURE,
                )
            )
    right = {f"top1_k{k}": hits_N for k, hits_N in zip(ks, hits_kN, strict=True)}
    measures = _measured(right, labels_N, retrieval(unit_ND, labels_N), None)
    last_N = folds_N == FOLDS - 1
    if not probe or not bool(last_N.any()) or len(torch.unique(labels_N[~last_N])) < 2:
        return measures
    held_out_N = held_out(names)[~last_N]
    fitted = linear_probe(
        features_ND[~last_N], labels_N[~last_N], features_ND[last_N], labels_N[last_N], held_out_N=held_out_N
    )
    resampling = Resampling(torch.arange(len(fitted.right_M)))
    linear = resampling.estimates({"linear": fitted.right_M}, shares=True)
    return Measures(means=measures.means | linear, by_class=measures.by_class)


def spread_of(features_ND: Tensor) -> dict[str, float]:
    """Measures that need no labels: spread 0 or rank 1 is collapse; none where vectors are not finite."""
    if len(features_ND) < 2 or not bool(torch.isfinite(features_ND).all()):
        return {}
    return {"feature_std": float(feature_std(features_ND)), "rank_me": float(rank_me(features_ND))}


def _measured(
    right: dict[str, Tensor],
    labels_M: Tensor,
    retrieved: tuple[Tensor, Tensor],
    sources_M: Tensor | None,
) -> Measures:
    """Means with intervals; queries without an image of their class count in k-NN and not in retrieval."""
    sources_M = torch.arange(len(labels_M)) if sources_M is None else sources_M
    means = Resampling(sources_M).estimates(right, shares=True) if right else {}
    asked_M = ~retrieved[0].isnan()
    if bool(asked_M.any()):
        resampling = Resampling(sources_M[asked_M])
        means |= resampling.estimates({"p_at_1": retrieved[0][asked_M]}, shares=True)
        means |= resampling.estimates({"map": retrieved[1][asked_M]}, shares=False)
    by_class = {}
    hits_M = right.get(f"top1_k{_BY_CLASS}", right.get(f"top1_k{NEIGHBOURS[0]}"))
    if hits_M is not None:
        for label in torch.unique(labels_M).tolist():
            of_it_M = labels_M == label
            part = Resampling(sources_M[of_it_M]).estimates({"top1": hits_M[of_it_M]}, shares=True)
            by_class[label] = part["top1"]
    return Measures(means=means, by_class=by_class)
