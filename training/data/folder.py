"""A folder of images, flat or nested.

Dimension key: N images of the data set
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data.names import PackedNames
from training.errors import DataError

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
RAW_SUFFIXES = (".npy", ".tif", ".tiff")
"""Of images that are no pictures. They count only where there are none, as beside pictures they are masks."""
# Between the parts of a path while it is sorted: no name has it, and it comes before every letter.
_DEEPER = "\0"
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class ImageList:
    """The images of a folder, sorted, with labels where sub-folders are classes."""

    root: Path
    names: Sequence[str]
    """Paths below `root`, with forward slashes, sorted part by part."""
    labels_N: Tensor | None = None
    """int64; None where folders are no classes."""
    class_names: tuple[str, ...] = ()
    listed_in: Path | None = None
    """The list that names them, if they were not looked for."""

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return self.root / self.names[index]

    @property
    def origin(self) -> str:
        """The folder, or the list."""
        return str(self.listed_in or self.root)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return self.path(index).read_bytes()

    def stamp(self, index: int) -> str:
        """Size and time of the file; a file that is gone counts as one of size and time 0."""
        try:
            status = self.path(index).stat()
        except OSError:
            return "0 0"
        return f"{status.st_size} {status.st_mtime_ns}"

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where all images lie; made anew each time, as text is a third of the memory of paths."""
        return tuple(self.root / name for name in self.names)


def find_images(root: Path) -> ImageList:
    """Lists the images of a folder, nested or flat.

    Hidden files and folders are left out. Links are followed, but not into a folder that they lie in. The
    names of the first folders are classes if every image lies in one, there are two or more, and they aren't
    called train, val or test.

    Args:
        root: A folder.

    Returns:
        The same list for the same folder on every machine.

    Raises:
        DataError: There is no such folder, or no image in it.
    """
    if not root.is_dir():
        kind = "a file" if root.exists() else "not there"
        raise DataError(f"{root} is {kind}: give a folder of images, flat or with sub-folders")
    files = sorted(_files_below(Path(os.path.realpath(root)), "", frozenset()))
    parts = [path for path in files if path.lower().endswith(IMAGE_SUFFIXES)]
    parts = parts or [path for path in files if path.lower().endswith(RAW_SUFFIXES)]
    if not parts:
        others = Counter(
            Path(path.rpartition(_DEEPER)[2]).suffix or "no ending" for path in files
        ).most_common(3)
        found = ", ".join(f"{count} with {suffix}" for suffix, count in others) or "nothing"
        raise DataError(
            f"found no image in {root} or its sub-folders: looked for names that end in "
            f"{', '.join(IMAGE_SUFFIXES + RAW_SUFFIXES)} and found {found}; names that begin "
            "with a dot are skipped"
        )
    del files  # all of the names again, where there are millions
    names = PackedNames(path.replace(_DEEPER, "/") for path in parts)
    class_names = sorted({path.partition(_DEEPER)[0] for path in parts})
    is_flat = any(_DEEPER not in path for path in parts)
    if is_flat or len(class_names) < 2 or _SPLITS.issuperset(class_names):
        return ImageList(root, names)
    place = {name: label for label, name in enumerate(class_names)}
    labels = (place[path.partition(_DEEPER)[0]] for path in parts)
    labels_N = torch.from_numpy(np.fromiter(labels, np.int64, count=len(parts)))
    return ImageList(root, names, labels_N, tuple(class_names))


def _files_below(folder: Path, below: str, inside: frozenset[Path]) -> Iterator[str]:
    """The files under a folder, their parts joined so that they sort part by part; `inside`: the way down."""
    inside = inside | {folder}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield below + entry.name
                continue
            real = Path(os.path.realpath(entry.path))
            if real not in inside:  # else a link back up, which would never end
                yield from _files_below(real, f"{below}{entry.name}{_DEEPER}", inside)
