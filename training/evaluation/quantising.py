"""Smaller embeddings, and what they cost: a byte or a bit for each dimension instead of a float32.

    int8      round(x / scale), with the scale of a dimension such that its largest in the gallery is 127
    binary    whether x lies above the gallery's mean of its dimension; the score counts bits that agree

Scales and means are fitted on the gallery, which is all that a collection knows.

Dimension key: N gallery · M queries · D embedding
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from training.evaluation.copies import Copies, find_copies
from training.evaluation.intervals import Estimate, Resampling
from training.evaluation.measures import Measures, measure, measure_within
from training.evaluation.retrieval import neighbour_overlap

NEIGHBOURS_KEPT = 10
_KEPT = ("top1_k20", "top1_k10", "p_at_1", "map", "copies_p_at_1", "copies_map", "copies_micro_ap")


@dataclass(frozen=True, kw_only=True)
class Form:
    """Embeddings as they would be stored.

    Attributes:
        bytes_per_vector: Of the vector alone.
        measures: Those of the tasks; and `recall_at_10`, how many of the ten nearest by float32 are found.
    """

    bytes_per_vector: int
    measures: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Embeddings of a folder with classes: a gallery and queries, or a gallery that asks itself.

    Attributes:
        gallery_ND: float32.
        gallery_labels_N: int64.
        names: Of the gallery.
        queries: Embeddings [M, D] and labels [M]; none: each image asks for the others.
    """

    gallery_ND: Tensor
    gallery_labels_N: Tensor
    names: list[str]
    queries: tuple[Tensor, Tensor] | None

    def measured(self, change: Callable[[Tensor], Tensor]) -> Measures:
        """k-NN and retrieval, without the probe."""
        gallery_ND = change(self.gallery_ND)
        if self.queries is None:
            return measure_within(gallery_ND, self.gallery_labels_N, names=self.names, probe=False)
        queries_MD, labels_M = self.queries
        return measure(gallery_ND, self.gallery_labels_N, change(queries_MD), labels_M, probe=False)


def quantised(labelled: Labelled | None, copies: tuple[Copies, Tensor] | None) -> dict[str, Form]:
    """Measures every form on the tasks.

    Args:
        labelled: Of the folder, if there are classes.
        copies: With the embeddings of all images of their list.

    Returns:
        By name of the form; `float32` is what the others are compared with.
    """
    found: dict[str, dict[str, Estimate]] = {}
    dimensions = 0
    if labelled is not None:
        dimensions = labelled.gallery_ND.shape[1]
        for name, change in _forms(labelled.gallery_ND).items():
            recall = _recall(labelled, change) if name != "float32" else {}  # which is the measure
            found[name] = dict(labelled.measured(change).means) | recall
    if copies is not None:
        table, features_ND = copies
        dimensions = features_ND.shape[1]
        for name, change in _forms(features_ND[table.gallery_N]).items():
            found.setdefault(name, {}).update(find_copies(change(features_ND), table).measures)
    sizes = {"float32": 4 * dimensions, "int8": dimensions, "binary": -(-dimensions // 8)}
    return {
        name: Form(bytes_per_vector=sizes[name], measures=_kept(measures)) for name, measures in found.items()
    }


def _forms(gallery_ND: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, from embeddings to what is compared in their place, of length 1."""
    unit_ND = functional.normalize(gallery_ND, dim=1)
    scale_D = unit_ND.abs().amax(dim=0).clamp_min(1e-12) / 127
    mean_D = unit_ND.mean(dim=0)

    def float32(rows_ND: Tensor) -> Tensor:
        return functional.normalize(rows_ND, dim=1)

    def int8(rows_ND: Tensor) -> Tensor:
        codes_ND = (functional.normalize(rows_ND, dim=1) / scale_D).round().clamp(-127, 127)
        return functional.normalize(codes_ND * scale_D, dim=1)

    def binary(rows_ND: Tensor) -> Tensor:
        above_ND = functional.normalize(rows_ND, dim=1) > mean_D
        return functional.normalize(torch.where(above_ND, 1.0, -1.0), dim=1)

    return {"float32": float32, "int8": int8, "binary": binary}


def _recall(labelled: Labelled, change: Callable[[Tensor], Tensor]) -> dict[str, Estimate]:
    gallery_ND = labelled.gallery_ND
    alone = labelled.queries is None
    queries_MD = gallery_ND if labelled.queries is None else labelled.queries[0]
    k = min(NEIGHBOURS_KEPT, len(gallery_ND) - alone)
    if k < 1:
        return {}
    plain = _forms(gallery_ND)["float32"]
    overlap_M = neighbour_overlap(
        (plain(queries_MD), plain(gallery_ND)), (change(queries_MD), change(gallery_ND)), k=k, alone=alone
    )
    return Resampling(torch.arange(len(overlap_M))).estimates({"recall_at_10": overlap_M}, shares=False)


def _kept(measures: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The measures that matter here, in one order; of k-NN only k = 20, or 10 where there are few images."""
    names = [name for name in ("recall_at_10", *_KEPT) if name in measures]
    if {"top1_k10", "top1_k20"} <= set(names):
        names.remove("top1_k10")
    return {name: measures[name] for name in names}
