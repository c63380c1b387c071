"""The measurements during a run, on pictures that are decoded once and kept.

Where folders are classes: k-NN accuracy. With a validation folder its images are classified by the training
images and the number is called `val`. Without one, a tenth of the training images, drawn by the hash of
their names, is classified by the others; the training has seen their pixels, though never their labels, and
the number is `seen`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dino_core.embedding import EmbeddingModel
from dino_core.knn import knn_accuracy
from dino_core.preprocess import Preprocessing
from training.config import EvaluationConfig
from training.data.images import Images
from training.evaluation.drawing import FOLDS, by_hash, folds_of
from training.evaluation.embedding import embed_pixels, read_pixels
from training.evaluation.folder import labels_in
from training.evaluation.measures import TEMPERATURE, spread_of

# Pixels kept in memory; beyond it fewer images are measured. 64 px: 87,000 images; 224 px: 7,000.
MOST_PIXEL_BYTES = 1024**3


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Images that are classified, and what to call the result."""

    pixels_MCHW: Tensor
    labels_M: Tensor
    kind: Literal["val", "seen"]


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """Images to measure a teacher with.

    Attributes:
        bank_NCHW: Training images, uint8.
        bank_labels_N: Their labels; unused without queries.
        queries: None where folders are no classes: then only spread and rank are measured.
        config: How many neighbours vote.
        skipped: Unreadable files by name, with the reason.
    """

    bank_NCHW: Tensor
    bank_labels_N: Tensor
    queries: Queries | None
    config: EvaluationConfig
    skipped: dict[str, str]

    def measure(self, model: EmbeddingModel) -> dict[str, float | int | str]:
        """Measures a teacher; changes nothing, and uses no randomness."""
        bank_ND = embed_pixels(model, self.bank_NCHW)
        measured: dict[str, float | int | str] = dict(spread_of(bank_ND))
        if self.queries is not None:
            queries_MD = embed_pixels(model, self.queries.pixels_MCHW)
            k = min(self.config.neighbours, len(bank_ND))
            top1, _ = knn_accuracy(
                bank_ND,
                self.bank_labels_N,
                queries_MD,
                self.queries.labels_M,
                k=k,
                temperature=TEMPERATURE,
            )
            measured |= {"knn_percent": top1, "knn_k": k, "knn_kind": self.queries.kind}
            measured |= {"knn_bank": len(bank_ND), "knn_queries": len(queries_MD)}
        return measured


def make_monitor(
    images: Images, val_images: Images | None, preprocessing: Preprocessing, config: EvaluationConfig
) -> Monitor:
    """Draws the images to measure with, and decodes them.

    Raises:
        DataError: The validation folder has a class that the training folder lacks.
    """
    order = by_hash(images)
    most = max(2, MOST_PIXEL_BYTES // (3 * preprocessing.crop_px**2))
    bank_count, query_count = min(config.max_bank_images, most), min(config.max_query_images, most)
    val_labels = labels_in(val_images, images.class_names) if val_images is not None else None
    if images.labels_N is None or (val_images is not None and val_labels is None):
        bank = read_pixels(images, order[:bank_count], preprocessing)
        none = torch.empty(0, dtype=torch.int64)
        return Monitor(
            bank_NCHW=bank.pixels_NCHW, bank_labels_N=none, queries=None, config=config, skipped=bank.skipped
        )

    if val_images is not None and val_labels is not None:
        bank_order, query_list, query_labels, kind = order, val_images, val_labels, "val"
        query_order = by_hash(val_images)
    else:
        in_query = (folds_of(images.names) == FOLDS - 1).tolist()
        bank_order = [index for index in order if not in_query[index]]
        query_order = [index for index in order if in_query[index]]
        query_list, query_labels, kind = images, images.labels_N, "seen"
    bank = read_pixels(images, bank_order[:bank_count], preprocessing)
    queries = read_pixels(query_list, query_order[:query_count], preprocessing)
    return Monitor(
        bank_NCHW=bank.pixels_NCHW,
        bank_labels_N=images.labels_N[bank.indices_N],
        queries=Queries(
            pixels_MCHW=queries.pixels_NCHW,
            labels_M=query_labels[queries.indices_N],
            kind="val" if kind == "val" else "seen",
        )
        if len(queries.indices_N) and len(bank.indices_N)
        else None,
        config=config,
        skipped=bank.skipped | queries.skipped,
    )
