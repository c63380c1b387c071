"""A folder measured by a model: its `val/` by its `train/`, or each tenth by the rest.

Dimension key: N images · M queries · D embedding
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from training.data.images import Images
from training.errors import DataError
from training.evaluation.embedding import EmbeddedImages, Embedder, embed_images
from training.evaluation.intervals import Estimate
from training.evaluation.measures import Measures, measure, measure_within, spread_of


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What a model is worth on a folder.

    Attributes:
        images: How many were measured.
        kind: Which images were classified by which.
        means: k-NN, linear probe and retrieval, with intervals.
        by_class: k-NN accuracy by the name of the class.
        spread: Spread and rank of all embeddings.
        skipped: Unreadable files by path, with the reason.
        names: Of everything that was read, in the order of names; with two parts they begin with their part.
        features_ND: The vectors of these.
    """

    images: int
    kind: str
    means: dict[str, Estimate]
    by_class: dict[str, Estimate]
    spread: dict[str, float]
    skipped: dict[str, str]
    names: list[str]
    features_ND: Tensor


def evaluate_folder(
    model: Embedder,
    images: Images,
    val_images: Images | None,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> FolderReport:
    """Embeds a folder and measures what comes out.

    Args:
        model: On any device.
        images: The folder, or its `train/`.
        val_images: Its `val/`; without one, each tenth of the images is classified by the other nine.
        batch_size: Images that go through the network together.
        workers: Threads that decode; none takes one for each core.
        on_progress: Told how many more files are done.

    Raises:
        DataError: No image can be read, or val/ has a class that train/ lacks.
    """
    embed = partial(embed_images, model, batch_size=batch_size, workers=workers, on_progress=on_progress)
    val_labels = labels_in(val_images, images.class_names) if val_images is not None else None
    train = embed(images)
    names = [images.names[index] for index in train.indices_N.tolist()]
    labels_N = None if images.labels_N is None else images.labels_N[train.indices_N]
    if val_images is None:
        measures = None if labels_N is None else measure_within(train.features_ND, labels_N, names=names)
        kind = "each tenth by the other nine"
        return _report(images, measures, kind, [("", names, train)])
    val = embed(val_images)
    val_names = [val_images.names[index] for index in val.indices_N.tolist()]
    measures = None
    if val_labels is not None and labels_N is not None:
        measures = measure(
            train.features_ND, labels_N, val.features_ND, val_labels[val.indices_N], train_names=names
        )
    kind = f"{len(val_names)} images of val/ by {len(names)} of train/"
    return _report(images, measures, kind, [("train/", names, train), ("val/", val_names, val)])


def _report(
    images: Images,
    measures: Measures | None,
    kind: str,
    parts: Sequence[tuple[str, list[str], EmbeddedImages]],
) -> FolderReport:
    features_ND = torch.cat([part.features_ND for _, _, part in parts])
    by_class = measures.by_class if measures is not None else {}
    return FolderReport(
        images=len(features_ND),
        kind=kind if measures is not None else "not measured: folders are no classes",
        means=measures.means if measures is not None else {},
        by_class={images.class_names[label]: share for label, share in by_class.items()},
        spread=spread_of(features_ND),
        skipped={
            f"{prefix}{name}": reason for prefix, _, part in parts for name, reason in part.skipped.items()
        },
        names=[f"{prefix}{name}" for prefix, names, _ in parts for name in names],
        features_ND=features_ND,
    )


def labels_in(images: Images, class_names: Sequence[str]) -> Tensor | None:
    """The labels of a list as places among the classes of another.

    Returns:
        int64 [N], or none if either has no classes.

    Raises:
        DataError: The list has a class that the other one lacks.
    """
    if images.labels_N is None or not class_names:
        return None
    places = {name: place for place, name in enumerate(class_names)}
    unknown = [name for name in images.class_names if name not in places]
    if unknown:
        raise DataError(
            f"{images.origin} has the class {unknown[0]!r}, which the training folder lacks: "
            "give folders with the same class names"
        )
    translated = torch.tensor([places[name] for name in images.class_names])
    return translated[images.labels_N]
