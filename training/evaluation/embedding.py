"""Images -> embeddings, through the very pixels that the service uses; and embeddings -> files.

Images go through `dino_core.preprocess.load_pixels` and `EmbeddingModel`, which is all that the service
does, so that vectors measured here are the ones it gives.

Dimension key: N images · B images of a batch · D embedding · C channels · H W pixels
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from dino_core.errors import ImageError
from dino_core.preprocess import Preprocessing, load_pixels
from training.data.images import Images, UnreadableImage
from training.errors import DataError
from training.evaluation.drawing import by_name
from training.machine import usable_cores


class Embedder(Protocol):
    """Anything that makes vectors of pictures: an `EmbeddingModel`, or something simple beside it."""

    @property
    def preprocessing(self) -> Preprocessing:
        """What its pictures go through."""
        ...

    @property
    def dimensions(self) -> int:
        """Length of an embedding."""
        ...

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 pixels -> float32 [B, D]."""
        ...


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
        else torch.empty(0, preprocessing.channels, side, side, dtype=torch.uint8),
        indices_N=torch.tensor([index for index, _ in read], dtype=torch.int64),
        skipped=skipped,
    )


@torch.no_grad()
def embed_pixels(model: Embedder, pixels_NCHW: Tensor, *, batch_size: int = 64) -> Tensor:
    """Embeds images that are in memory.

    Returns:
        float32 [N,D] on the CPU.
    """
    if len(pixels_NCHW) == 0:
        return torch.empty(0, model.dimensions)
    device = next(model.parameters()).device if isinstance(model, nn.Module) else torch.device("cpu")
    batches = torch.split(pixels_NCHW, batch_size)
    return torch.cat([model(pixels_BCHW.to(device)).cpu() for pixels_BCHW in batches])


def embed_images(
    model: Embedder,
    images: Images,
    *,
    places: Sequence[int] | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> EmbeddedImages:
    """Embeds images, a batch at a time: memory does not grow with their number.

    Args:
        model: On any device.
        images: Such as `training.data.opening.open_split` gives.
        places: Which of them, in this order; all in the order of their names if not given.
        batch_size: Images that go through the network together.
        workers: Threads that decode; none takes one for each core.
        on_progress: Told how many more files are done.

    Raises:
        DataError: Not one of them can be read.
    """
    skipped: dict[str, str] = {}
    features: list[Tensor] = []
    kept: list[int] = []
    chosen = by_name(images) if places is None else places
    loaded = _load(images, chosen, model.preprocessing, workers=workers)
    while group := list(islice(loaded, batch_size)):
        readable = [(index, found) for index, found in group if not isinstance(found, str)]
        skipped |= {images.names[index]: found for index, found in group if isinstance(found, str)}
        if readable:
            features.append(embed_pixels(model, torch.stack([pixels for _, pixels in readable])))
            kept += [index for index, _ in readable]
        on_progress(len(group))
    if not features:
        name, reason = next(iter(skipped.items()))
        raise DataError(f"none of the {len(chosen)} images in {images.origin} can be read; {name}: {reason}")
    return EmbeddedImages(features_ND=torch.cat(features), indices_N=torch.tensor(kept), skipped=skipped)


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
