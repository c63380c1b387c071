"""Images in tar files, as WebDataset packs them: members of one stem are one sample.

    shard-000000.tar
        a/0001.jpg      the image
        a/0001.cls      its label, if there are labels: a word or a number
        a/0001.json     anything else is passed over

Shards are indexed once, by their headers, and the index is kept on this machine under the shard's address and
stamp; an image is then read from its place in its shard, by a range. So shards are shuffled image by image,
as a folder is, and not in a window.

Dimension key: N images
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.files import StoredFile
from training.data.folder import IMAGE_SUFFIXES, RAW_SUFFIXES
from training.data.names import PackedNames
from training.errors import DataError

_VERSION = 2  # of the index's form
_INDEXED_AT_ONCE = 8

_Sample = tuple[str, str, int, int]
"""Name, label, offset and size of an image."""


@dataclass(frozen=True, kw_only=True)
class ShardImages:
    """The images of some tar files, in their order."""

    origin: str
    names: Sequence[str]
    """Shard and member, as in `shard-000000.tar/a/0001.jpg`."""
    labels_N: Tensor | None
    class_names: tuple[str, ...]
    shards: tuple[StoredFile, ...]
    places_N3: NDArray[np.int64]
    """Which shard, and offset and size of the image in it."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        """The bytes of a member."""
        shard, offset, size = map(int, self.places_N3[index])
        return self.shards[shard].read(offset, size)

    def stamp(self, index: int) -> str:
        """Size and time of its shard, and its place in there."""
        shard, offset, size = map(int, self.places_N3[index])
        return f"{self.shards[shard].stamp} {offset} {size}"


def shard_images(shards: Sequence[StoredFile], *, origin: str) -> ShardImages:
    """Indexes tar files, several at once; of a shard that was indexed before, the index is read.

    Raises:
        DataError: One is no tar file, or compressed; or there is no image in them; or some have labels only.
    """
    names: list[str] = []
    labels: list[str] = []
    places: list[tuple[int, int, int]] = []
    with ThreadPoolExecutor(_INDEXED_AT_ONCE, thread_name_prefix="index") as pool:
        for number, samples in enumerate(pool.map(_index_of, shards)):
            for name, label, offset, size in samples:
                names.append(f"{shards[number].name}/{name}")
                labels.append(label)
                places.append((number, offset, size))
    if not names:
        raise DataError(
            f"found no image in the {len(shards)} tar files of {origin}: looked for members whose names end "
            f"in {', '.join(IMAGE_SUFFIXES + RAW_SUFFIXES)}"
        )
    if any(labels) and not all(labels):
        raise DataError(f"{names[labels.index('')]} has no .cls beside it and others have: give all or none")
    class_names = tuple(sorted(set(labels))) if all(labels) else ()
    place = {name: label for label, name in enumerate(class_names)}
    return ShardImages(
        origin=origin,
        names=PackedNames(names),
        labels_N=torch.tensor([place[label] for label in labels]) if class_names else None,
        class_names=class_names,
        shards=tuple(shards),
        places_N3=np.array(places, dtype=np.int64),
    )


def _index_of(shard: StoredFile) -> list[_Sample]:
    """What is in a shard: from the index of the same content if there is one, else from its headers."""
    key = hashlib.sha256(f"{_VERSION}\n{shard.where}\n{shard.stamp}".encode()).hexdigest()[:32]
    kept = _index_dir() / f"{key}.json"
    try:
        return _kept_index(kept)
    except (OSError, ValueError, TypeError):  # none yet, or a damaged one
        samples = _samples(shard)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(samples))
        partial.rename(kept)
    except OSError:  # a full or read-only disk costs the next start some time, and nothing else
        pass
    return samples


def _kept_index(path: Path) -> list[_Sample]:
    rows = json.loads(path.read_text())
    return [(str(name), str(label), int(at), int(size)) for name, label, at, size in rows]


def _index_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dinoserve" / "shards"


def _samples(shard: StoredFile) -> list[_Sample]:
    """Reads the headers of a tar file."""
    images: dict[str, tuple[str, int, int]] = {}
    raw: dict[str, tuple[str, int, int]] = {}  # counts where there are no pictures
    labels: dict[str, str] = {}
    try:
        with shard.open() as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                # WebDataset splits at the first dot of the last part.
                stem = str(path.parent / path.name.split(".")[0])
                if not member.isfile() or path.name.startswith("."):
                    continue
                place = (member.name, member.offset_data, member.size)
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    images.setdefault(stem, place)
                elif path.suffix.lower() in RAW_SUFFIXES:
                    raw.setdefault(stem, place)
                elif path.suffix == ".cls":
                    file = tar.extractfile(member)
                    labels[stem] = file.read().decode("utf-8", "replace").strip() if file else ""
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"{shard.where} cannot be read as a tar file ({error}): give plain .tar files, not "
            "compressed ones"
        ) from error
    return [
        (name, labels.get(stem, ""), offset, size) for stem, (name, offset, size) in (images or raw).items()
    ]
