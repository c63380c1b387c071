"""The seam of the data: encoded images with names, wherever they lie.

Dimension key: N images of the data set
"""

import hashlib
import os
from collections.abc import Sequence
from statistics import median_low
from typing import Protocol

from torch import Tensor

from dino_core.errors import ImageError
from dino_core.preprocess import read_header

_LOOKED_AT = 32


class UnreadableImage(Exception):
    """One file gives no canvas; the message is the reason, for the user."""


class Images(Protocol):
    """Encoded images with places, names and perhaps labels; the same in the same order each time."""

    @property
    def origin(self) -> str:
        """Where they come from, for messages: a folder, a list, an address."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """A name for each, all different, with forward slashes; the order is the data set's."""
        ...

    @property
    def labels_N(self) -> Tensor | None:
        """int64, places in `class_names`; None where nothing tells classes apart."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Sorted; empty without labels."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded image of a place. Called from several threads.

        Raises:
            OSError: It cannot be read.
            UnreadableImage: It can be read, and holds no image.
        """
        ...

    def stamp(self, index: int) -> str:
        """What changes when the image may have changed, such as size and time of its file; cheap."""
        ...


def digests_of(images: Images) -> dict[str, str | int]:
    """What tells whether data is as it was: its number, a hash of the names and one of the stamps."""
    names, stamps = hashlib.sha256(), hashlib.sha256()
    for index, name in enumerate(images.names):
        names.update(os.fsencode(name) + b"\n")
        stamps.update(images.stamp(index).encode() + b"\n")
    return {"images": len(images), "names": names.hexdigest(), "stamps": stamps.hexdigest()}


def median_side_px(images: Images) -> int | None:
    """The median of the shorter sides of some images, from all over the data; None if none can be read."""
    sides: list[int] = []
    for index in range(0, len(images), max(1, len(images) // _LOOKED_AT)):
        try:
            header = read_header(images.read(index))
        except (OSError, ImageError, UnreadableImage):
            continue
        sides.append(min(header.width_px, header.height_px))
    return median_low(sides) if sides else None
