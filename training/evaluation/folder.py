"""A folder measured by a model: its `val/` by its `train/`, or each tenth by the rest.

Dimension key: N images · M queries · D embedding
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.images import Images
from training.errors import DataError
from training.evaluation.drawing import by_hash
from training.evaluation.embedding import Embedder, embed_images
from training.evaluation.intervals import Estimate
from training.evaluation.measures import measure, measure_within, spread_of
from training.evaluation.quantising import Labelled
from training.evaluation.robustness import Queries


@dataclass(frozen=True, kw_only=True)
class Part:
    """A list of images with the embeddings of all that could be read, in the order of names.

    Attributes:
        images: The list.
        features_ND: float32.
        indices_N: int64, places in the list.
        labels_N: int64, places in the classes of the training images; none without classes.
        skipped: Unreadable files by name, with the reason.
    """

    images: Images
    features_ND: Tensor
    indices_N: Tensor
    labels_N: Tensor | None
    skipped: dict[str, str]

    @property
    def names(self) -> list[str]:
        """Of what was read."""
        return [self.images.names[index] for index in self.indices_N.tolist()]

    def rows(self, rows_N: Tensor) -> "Part":
        """Some of it."""
        return Part(
            images=self.images,
            features_ND=self.features_ND[rows_N],
            indices_N=self.indices_N[rows_N],
            labels_N=self.labels_N[rows_N] if self.labels_N is not None else None,
            skipped={},
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddedFolder:
    """A folder's embeddings, made once and measured in many ways.

    Attributes:
        train: All of it, or its `train/`.
        val: Its `val/`, if it has both.
    """

    train: Part
    val: Part | None

    @property
    def features_ND(self) -> Tensor:
        """Of everything that was read."""
        return torch.cat([part.features_ND for _, part in self._parts])

    @property
    def names(self) -> list[str]:
        """Of the same; with two parts they begin with their part."""
        return [f"{prefix}{name}" for prefix, part in self._parts for name in part.names]

    @property
    def skipped(self) -> dict[str, str]:
        """Unreadable files by path, with the reason."""
        return {
            f"{prefix}{name}": reason for prefix, part in self._parts for name, reason in part.skipped.items()
        }

    @property
    def labelled(self) -> Labelled | None:
        """As a gallery and queries, where there are classes."""
        train, val = self.train, self.val
        if train.labels_N is None or (val is not None and val.labels_N is None):
            return None
        return Labelled(
            gallery_ND=train.features_ND,
            gallery_labels_N=train.labels_N,
            names=train.names,
            queries=(val.features_ND, val.labels_N) if val is not None and val.labels_N is not None else None,
        )

    def queries(self, most: int) -> tuple[Queries, Tensor, Tensor | None]:
        """Some pictures to change, drawn by the hash of their names, with the gallery that they look in.

        Args:
            most: How many; of a folder without `val/` at most half are drawn, and the others are the gallery.

        Returns:
            The pictures; the gallery's embeddings, and labels if there are classes.
        """
        source = self.val or self.train
        ranks = {place: rank for rank, place in enumerate(by_hash(source.images))}
        drawn_N = torch.tensor([ranks[index] for index in source.indices_N.tolist()]).argsort()
        count = min(most, len(drawn_N) if self.val is not None else len(drawn_N) // 2)
        asked = source.rows(drawn_N[:count])
        gallery = self.train if self.val is not None else source.rows(drawn_N[count:])
        queries = Queries(
            images=source.images,
            places=asked.indices_N.tolist(),
            features_MD=asked.features_ND,
            labels_M=asked.labels_N,
        )
        return queries, gallery.features_ND, gallery.labels_N

    @property
    def _parts(self) -> list[tuple[str, Part]]:
        return [("", self.train)] if self.val is None else [("train/", self.train), ("val/", self.val)]


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What a model is worth on a folder.

    Attributes:
        kind: Which images were classified by which.
        means: k-NN, linear probe and retrieval, with intervals.
        by_class: k-NN accuracy by the name of the class.
        spread: Spread and rank of all embeddings.
    """

    kind: str
    means: dict[str, Estimate]
    by_class: dict[str, Estimate]
    spread: dict[str, float]


def embed_folder(
    model: Embedder,
    images: Images,
    val_images: Images | None,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> EmbeddedFolder:
    """Embeds a folder.

    Args:
        model: On any device.
        images: The folder, or its `train/`.
        val_images: Its `val/`.
        batch_size: Images that go through the network together.
        workers: Threads that decode; none takes one for each core.
        on_progress: Told how many more files are done.

    Raises:
        DataError: No image can be read, or val/ has a class that train/ lacks.
    """

    def part(one: Images, labels: Tensor | None) -> Part:
        embedded = embed_images(model, one, batch_size=batch_size, workers=workers, on_progress=on_progress)
        return Part(
            images=one,
            features_ND=embedded.features_ND,
            indices_N=embedded.indices_N,
            labels_N=labels[embedded.indices_N] if labels is not None else None,
            skipped=embedded.skipped,
        )

    val_labels = labels_in(val_images, images.class_names) if val_images is not None else None
    train = part(images, images.labels_N)
    return EmbeddedFolder(train=train, val=part(val_images, val_labels) if val_images is not None else None)


def evaluate_folder(folder: EmbeddedFolder, *, probe: bool = True) -> FolderReport:
    """Measures the embeddings of a folder: `val/` by `train/`, or each tenth by the other nine.

    Args:
        folder: Embedded.
        probe: Whether to fit the linear probe, which takes most of the time.
    """
    labelled, train, val = folder.labelled, folder.train, folder.val
    spread = spread_of(folder.features_ND)
    if labelled is None:
        return FolderReport(kind="not measured: folders are no classes", means={}, by_class={}, spread=spread)
    if val is None or labelled.queries is None:
        kind = "each tenth by the other nine"
        measures = measure_within(
            labelled.gallery_ND, labelled.gallery_labels_N, names=labelled.names, probe=probe
        )
    else:
        kind = f"{len(val.indices_N)} images of val/ by {len(train.indices_N)} of train/"
        measures = measure(
            labelled.gallery_ND,
            labelled.gallery_labels_N,
            *labelled.queries,
            train_names=labelled.names,
            probe=probe,
        )
    return FolderReport(
        kind=kind,
        means=measures.means,
        by_class={train.images.class_names[label]: share for label, share in measures.by_class.items()},
        spread=spread,
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
