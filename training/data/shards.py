"""Images in tar files, as WebDataset packs them: members of one stem are one sample.

    shard-000000.tar
        a/0001.jpg      the image
        a/0001.cls      its label, if there are labels: a word or a number
        a/0001.json     anything else is passed over

Shards are indexed once, by their headers; an image is then read from its place in its shard. So shards are
shuffled image by image, as a folder is, and not in a window.

Dimension key: N images
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.folder import IMAGE_SUFFIXES
from training.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ShardImages:
    """The images of some tar files, in their order."""

    origin: str
    names: tuple[str, ...]
    """Shard and member, as in `shard-000000.tar/a/0001.jpg`."""
    labels_N: Tensor | None
    class_names: tuple[str, ...]
    shards: tuple[Path, ...]
    places_N3: NDArray[np.int64]
    """Which shard, and offset and size of the image in it."""
    stamps: tuple[str, ...]
    """Size and time of each shard."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of a member."""
        shard, offset, size = self.places_N3[index].tolist()
        with self.shards[shard].open("rb") as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise OSError(f"{self.shards[shard]} ends in the middle of it")
        return content

    def stamp(self, index: int) -> str:
        """Size and time of its shard, and its place in there."""
        shard, offset, size = self.places_N3[index].tolist()
        return f"{self.stamps[shard]} {offset} {size}"


def shards_in(path: Path) -> list[Path]:
    """The tar files that a path means: itself, those of a folder that has no image, or those of a pattern."""
    if any(sign in path.name for sign in "*?["):
        return sorted(path.parent.glob(path.name))
    if path.suffix == ".tar":
        return [path]
    return sorted(path.glob("*.tar")) if path.is_dir() else []


def shard_images(shards: Sequence[Path], *, origin: str) -> ShardImages:
    """Indexes tar files.

    Raises:
        DataError: One is no tar file, or compressed; or there is no image in them; or some have labels only.
    """
    names: list[str] = []
    labels: list[str] = []
    places: list[tuple[int, int, int]] = []
    for number, shard in enumerate(shards):
        for name, label, offset, size in _samples(shard):
            names.append(f"{shard.name}/{name}")
            labels.append(label)
            places.append((number, offset, size))
    if not names:
        raise DataError(
            f"found no image in the {len(shards)} tar files of {origin}: looked for members whose names end "
            f"in {', '.join(IMAGE_SUFFIXES)}"
        )
    if any(labels) and not all(labels):
        raise DataError(f"{names[labels.index('')]} has no .cls beside it and others have: give all or none")
    class_names = tuple(sorted(set(labels))) if all(labels) else ()
    place = {name: label for label, name in enumerate(class_names)}
    status = [shard.stat() for shard in shards]
    return ShardImages(
        origin=origin,
        names=tuple(names),
        labels_N=torch.tensor([place[label] for label in labels]) if class_names else None,
        class_names=class_names,
        shards=tuple(shards),
        places_N3=np.array(places, dtype=np.int64),
        stamps=tuple(f"{shard.st_size} {shard.st_mtime_ns}" for shard in status),
    )


def _samples(shard: Path) -> Iterator[tuple[str, str, int, int]]:
    """Name, label, offset and size of each image in a tar file."""
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                # WebDataset splits at the first dot of the last part.
                stem = str(path.parent / path.name.split(".")[0])
                if not member.isfile() or path.name.startswith("."):
                    continue
                if path.suffix.lower() in IMAGE_SUFFIXES and stem not in images:
                    images[stem] = (member.name, member.offset_data, member.size)
                elif path.suffix == ".cls":
                    file = tar.extractfile(member)
                    labels[stem] = file.read().decode("utf-8", "replace").strip() if file else ""
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{shard} cannot be read as a tar file ({error}): give plain .tar files, not compressed ones"
        ) from error
    for stem, (name, offset, size) in images.items():
        yield name, labels.get(stem, ""), offset, size
