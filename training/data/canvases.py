"""A canvas: an image squashed to a square of a fixed size, uint8, beside its height and width before.

`dino_core.augment` draws crops in the original's proportions, so nothing is lost but pixels.

Dimension key: C channels · H W pixels
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dino_core.errors import ImageError
from dino_core.planes import Planes, decode_planes
from dino_core.preprocess import as_batch, decode
from training.data.images import Images, UnreadableImage


class Canvas(NamedTuple):
    """One image, squashed."""

    pixels_CHW: Tensor
    """uint8 [C, canvas_px, canvas_px]; the memory may be channels-last."""
    size_px: tuple[int, int]
    """Height and width before it was squashed: upright, and for large JPEGs a half, quarter or eighth."""


def load_canvas(images: Images, index: int, *, canvas_px: int, planes: Planes | None = None) -> Canvas:
    """Reads one image and squashes it to a square: bicubic, antialiased, proportions not kept.

    Large JPEGs are decoded at a half, a quarter or an eighth, as long as no side falls below the canvas.

    Raises:
        UnreadableImage: It cannot be read, or is no image that we take.
    """
    try:
        return canvas_of(images.read(index), canvas_px=canvas_px, planes=planes)
    except ImageError as error:
        raise UnreadableImage(error.title) from error
    except OSError as error:
        raise UnreadableImage(error.strerror or type(error).__name__) from error


def canvas_of(content: bytes, *, canvas_px: int, planes: Planes | None = None) -> Canvas:
    """The canvas of an encoded image, an RGB picture where there are no planes; see `load_canvas`.

    Raises:
        ImageError: It is no image that we take.
    """
    pixels_CHW = (
        decode(content, shorter_side_px=canvas_px) if planes is None else decode_planes(content, planes)
    )
    height_px, width_px = pixels_CHW.shape[-2:]
    # The memory is channels-last as `decode` gives it, for which torch's uint8 bicubic is vectorised.
    size = (canvas_px, canvas_px)
    canvas = torch.nn.functional.interpolate(as_batch(pixels_CHW), size=size, mode="bicubic", antialias=True)
    return Canvas(canvas[0], (height_px, width_px))


class CanvasSource(Protocol):
    """Where canvases come from: files, or the cache that was made of them."""

    @property
    def channels(self) -> int:
        """Of every canvas."""
        ...

    def read(self, index: int) -> Canvas:
        """The canvas of an image; UnreadableImage if it has none. Called from several threads."""
        ...


@dataclass(frozen=True)
class DecodedCanvases:
    """Canvases decoded anew each time."""

    images: Images
    canvas_px: int
    planes: Planes | None = None

    @property
    def channels(self) -> int:
        """Of every canvas."""
        return 3 if self.planes is None else self.planes.channels

    def read(self, index: int) -> Canvas:
        """Decodes one image."""
        return load_canvas(self.images, index, canvas_px=self.canvas_px, planes=self.planes)
