"""What an embedding is worth: k-NN, linear probe, retrieval where folders are classes; spread and rank.

Images go through `dino_core.preprocess.load_pixels` and `EmbeddingModel`, which is all that the service
does, so that vectors measured here are the ones it gives.

Dimension key: N images · B images of a batch · D embedding · C channels · H W pixels
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from dino_core.collapse import feature_std, rank_me
from dino_core.embedding import EmbeddingModel
from dino_core.errors import ImageError
from dino_core.knn import knn_accuracy
from dino_core.preprocess import Preprocessing, load_pixels
from training.data.images import Images, UnreadableImage
from training.errors import DataError
from training.evaluation.linear_probe import linear_probe
from training.evaluation.retrieval import retrieval
from training.machine import usable_cores

TEMPERATURE = 0.07  # of the votes, as in the paper and its code
NEIGHBOURS = (10, 20, 100, 200)
FOLDS = 10
Z_95 = 1.96  # standard errors to each side of a mean that hold 95 % of it


@dataclass(frozen=True, kw_only=True)
class EmbeddedImages:
    """Embeddings of the images of a list that could be read.

    Attributes:
        features_ND: float32, on the CPU.
        indices_N: int64, places in the list.
        skipped: Unreadable files by name, with the reason.
    """

    features_ND: Tensor
    indices_N: Tensor
    skipped: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Decoded images, ready for any model with the same preprocessing.

    Attributes:
        pixels_NCHW: uint8.
        indices_N: int64, places in the list.
        skipped: Unreadable files by name, with the reason.
    """

    pixels_NCHW: Tensor
    indices_N: Tensor
    skipped: dict[str, str]


def by_hash(images: Images) -> list[int]:
    """Places of the images in an order that depends on their names alone: a draw that never changes."""
    return sorted(range(len(images)), key=lambda index: _hash_of(images.names[index]))


def read_pixels(
    images: Images, indices: Sequence[int], preprocessing: Preprocessing, *, workers: int | None = None
) -> Pixels:
    """Reads images as the service would; a file that cannot be read is named and left out."""
    skipped: dict[str, str] = {}
    read: list[tuple[int, Tensor]] = []
    for index, found in _load(images, indices, preprocessing, workers=workers):
        if isinstance(found, str):
            skipped[images.names[index]] = found
        else:
            read.append((index, found))
    side = preprocessing.crop_px
    return Pixels(
        pixels_NCHW=torch.stack([pixels for _, pixels in read])
        if read
        else torch.empty(0, 3, side, side, dtype=torch.uint8),
        indices_N=torch.tensor([index for index, _ in read], dtype=torch.int64),
        skipped=skipped,
    )


@torch.no_grad()
def embed_pixels(model: EmbeddingModel, pixels_NCHW: Tensor, *, batch_size: int = 64) -> Tensor:
    """Embeds images that are in memory.

    Returns:
        float32 [N,D] on the CPU.
    """
    if len(pixels_NCHW) == 0:
        return torch.empty(0, model.dimensions)
    device = next(model.parameters()).device
    batches = torch.split(pixels_NCHW, batch_size)
    return torch.cat([model(pixels_BCHW.to(device)).cpu() for pixels_BCHW in batches])


def embed_images(
    model: EmbeddingModel,
    images: Images,
    *,
    batch_size: int = 64,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> EmbeddedImages:
    """Embeds a list of images, a batch at a time, so that memory does not grow with their number.

    Args:
        model: On any device.
        images: Such as `training.data.opening.open_split` gives.
        batch_size: Images that go through the network together.
        workers: Threads that decode; none takes one for each core.
        on_progress: Told how many more files are done.

    Raises:
        DataError: Not one of them can be read.
    """
    skipped: dict[str, str] = {}
    features: list[Tensor] = []
    kept: list[int] = []
    loaded = _load(images, range(len(images)), model.preprocessing, workers=workers)
    while group := list(islice(loaded, batch_size)):
        readable = [(index, found) for index, found in group if not isinstance(found, str)]
        skipped |= {images.names[index]: found for index, found in group if isinstance(found, str)}
        if readable:
            features.append(embed_pixels(model, torch.stack([pixels for _, pixels in readable])))
            kept += [index for index, _ in readable]
        on_progress(len(group))
    if not features:
        name, reason = next(iter(skipped.items()))
        raise DataError(f"none of the {len(images)} images in {images.origin} can be read; {name}: {reason}")
    return EmbeddedImages(features_ND=torch.cat(features), indices_N=torch.tensor(kept), skipped=skipped)


def knn_by_split(
    train_ND: Tensor, train_labels_N: Tensor, val_MD: Tensor, val_labels_M: Tensor
) -> dict[str, float]:
    """k-NN accuracy in % of one set with another as memory, for every k that the memory allows."""
    return {
        f"top1_k{k}": knn_accuracy(
            train_ND, train_labels_N, val_MD, val_labels_M, k=k, temperature=TEMPERATURE
        )[0]
        for k in NEIGHBOURS
        if k <= len(train_ND)
    }


def knn_by_folds(features_ND: Tensor, labels_N: Tensor, folds_N: Tensor) -> dict[str, float]:
    """k-NN accuracy in % within one set: each tenth is classified by the other nine."""
    totals: dict[str, float] = {}
    counted: dict[str, int] = {}
    for fold in range(FOLDS):
        inside = folds_N == fold
        if not inside.any() or inside.all():
            continue
        accuracies = knn_by_split(
            features_ND[~inside], labels_N[~inside], features_ND[inside], labels_N[inside]
        )
        for name, accuracy in accuracies.items():
            totals[name] = totals.get(name, 0.0) + accuracy * int(inside.sum())
            counted[name] = counted.get(name, 0) + int(inside.sum())
    return {name: total / counted[name] for name, total in totals.items()}


def folds_of(images: Images, indices_N: Tensor) -> Tensor:
    """Which tenth each image is in, by its name alone."""
    return torch.tensor([_hash_of(images.names[index]) % FOLDS for index in indices_N.tolist()])


def spread_of(features_ND: Tensor) -> dict[str, float]:
    """Measures that need no labels: spread 0 or rank 1 is collapse; none where vectors are not finite."""
    if len(features_ND) < 2 or not bool(torch.isfinite(features_ND).all()):
        return {}
    return {"feature_std": float(feature_std(features_ND)), "rank_me": float(rank_me(features_ND))}


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


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """What a model is worth on a folder.

    Attributes:
        images: How many were measured.
        knn_kind: Which images were classified by which.
        measures: Accuracies and retrieval in %, and spread and rank of the embeddings.
        half_widths: Of the 95 % confidence interval of those that are means over images, in %.
        skipped: Unreadable files by path, with the reason.
        embedded: Names and vectors of everything that was read; names begin with the split, if there are two.
    """

    images: int
    knn_kind: str
    measures: dict[str, float]
    half_widths: dict[str, float]
    skipped: dict[str, str]
    embedded: tuple[list[str], Tensor]

    def to_json(self) -> dict[str, object]:
        """All but the vectors."""
        return {
            "images": self.images,
            "knn_kind": self.knn_kind,
            "measures": self.measures,
            "half_widths": self.half_widths,
            "skipped": self.skipped,
        }


def evaluate_folder(
    model: EmbeddingModel,
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
    features_ND, skipped = train.features_ND, train.skipped
    names = [images.names[index] for index in train.indices_N.tolist()]
    labels_N = None if images.labels_N is None else images.labels_N[train.indices_N]
    kind, means = "not measured: folders are no classes", {}
    if val_images is not None:
        val = embed(val_images)
        features_ND = torch.cat([train.features_ND, val.features_ND])
        names = [f"train/{name}" for name in names]
        names += [f"val/{val_images.names[index]}" for index in val.indices_N.tolist()]
        skipped = {f"train/{name}": reason for name, reason in train.skipped.items()}
        skipped |= {f"val/{name}": reason for name, reason in val.skipped.items()}
        if val_labels is not None and labels_N is not None:
            kind = f"{len(val.indices_N)} images of val/ by {len(train.indices_N)} of train/"
            means = measured_by_split(train.features_ND, labels_N, val.features_ND, val_labels[val.indices_N])
    elif labels_N is not None:
        kind = "each tenth by the other nine"
        means = measured_by_folds(train.features_ND, labels_N, folds_of(images, train.indices_N))
    return FolderReport(
        images=len(features_ND),
        knn_kind=kind,
        measures={name: percent for name, (percent, _) in means.items()} | spread_of(features_ND),
        half_widths={name: half_width for name, (_, half_width) in means.items()},
        skipped=skipped,
        embedded=(names, features_ND),
    )


def measured_by_split(
    train_ND: Tensor, train_labels_N: Tensor, val_MD: Tensor, val_labels_M: Tensor
) -> dict[str, tuple[float, float]]:
    """k-NN, linear probe and retrieval of one set by another: percent, and half the width of its interval."""
    count = len(val_MD)
    means = {
        name: (percent, binomial_half_width(percent, count))
        for name, percent in knn_by_split(train_ND, train_labels_N, val_MD, val_labels_M).items()
    }
    if len(torch.unique(train_labels_N)) > 1:
        probe = linear_probe(train_ND, train_labels_N, val_MD, val_labels_M)
        means["linear"] = (probe.percent, binomial_half_width(probe.percent, count))
    return means | _retrieved(*retrieval(train_ND, train_labels_N, val_MD, val_labels_M))


def measured_by_folds(
    features_ND: Tensor, labels_N: Tensor, folds_N: Tensor
) -> dict[str, tuple[float, float]]:
    """The same within one set: k-NN of each tenth by the other nine, the last tenth by a linear probe.

    For retrieval each image asks for the others.
    """
    means = {
        name: (percent, binomial_half_width(percent, len(features_ND)))
        for name, percent in knn_by_folds(features_ND, labels_N, folds_N).items()
    }
    inside = folds_N == FOLDS - 1
    if inside.any() and len(torch.unique(labels_N[~inside])) > 1:
        probe = linear_probe(features_ND[~inside], labels_N[~inside], features_ND[inside], labels_N[inside])
        means["linear"] = (probe.percent, binomial_half_width(probe.percent, int(inside.sum())))
    return means | _retrieved(*retrieval(features_ND, labels_N))


def _retrieved(first_M: Tensor, average_M: Tensor) -> dict[str, tuple[float, float]]:
    if len(first_M) < 2:
        return {}
    error = float(average_M.std()) / math.sqrt(len(average_M))
    first = 100 * float(first_M.mean())
    return {
        "p_at_1": (first, binomial_half_width(first, len(first_M))),
        "map": (100 * float(average_M.mean()), 100 * Z_95 * error),
    }


def binomial_half_width(percent: float, count: int) -> float:
    """Half of Wilson's interval (1927), which is right near 0 and 100 % and for few images too."""
    share, z = percent / 100, Z_95
    inner = share * (1 - share) / count + z * z / (4 * count * count)
    return 100 * z * math.sqrt(inner) / (1 + z * z / count)


def save_embeddings(path: Path, names: Sequence[str], features_ND: Tensor) -> None:
    """Writes vectors with the names of their files, as `.npz` or `.safetensors`.

    Raises:
        DataError: The name ends in neither, or the file cannot be written.
    """
    vectors_ND = features_ND.numpy()
    try:
        match path.suffix:
            case ".npz":
                np.savez(path, embeddings=vectors_ND, paths=np.array(names))
            case ".safetensors":
                save_file({"embeddings": vectors_ND}, path, metadata={"paths": json.dumps(list(names))})
            case suffix:
                raise DataError(
                    f"embeddings can be written as .npz or .safetensors, not as {suffix or 'a bare name'!r}"
                )
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error


def _load(
    images: Images, indices: Sequence[int], preprocessing: Preprocessing, *, workers: int | None
) -> Iterator[tuple[int, Tensor | str]]:
    """Pixels, or the reason why there are none, in the order of the indices; some are read ahead."""

    def load(index: int) -> tuple[int, Tensor | str]:
        try:
            return index, load_pixels(images.read(index), preprocessing)
        except ImageError as error:
            return index, error.title
        except UnreadableImage as error:
            return index, str(error)
        except OSError as error:
            return index, error.strerror or "cannot be read"

    threads = workers or usable_cores()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        # `Executor.map` starts all at once; by slices only so many pictures wait in memory.
        for start in range(0, len(indices), 256):
            yield from pool.map(load, indices[start : start + 256])


def _hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
