"""The bytes of an image that is no RGB picture -> planes: 1 to N channels of 8 bits, 16 bits or floats.

    .npy             height, width, channels; or channels, height, width, where only that fits their number
                     (else where the first is the smallest); or height, width
    TIFF             its pages, one after the other, with the channels of each
    PNG and others   their own channels: grey (8 or 16 bits), grey and alpha, RGB, RGBA, CMYK

    bytes ── decode_planes ──► uint8, each channel from its own range: (value - low) / (high - low) * 255

The ranges are the data set's and part of a bundle's preprocessing, so that training, evaluation and export
see the same (docs/decisions/0016-planes.md). What Pillow cannot open, such as more than four channels in a
page, is for .npy. Of 16-bit colour in PNG and TIFF Pillow keeps the upper byte.

Dimension key: C channels · H W pixels
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageOps, ImageSequence
from torch import Tensor

from dino_core.decoding import DEFAULT_LIMITS, ImageLimits, check_limits, pillow_picture
from dino_core.errors import ImageError
from dino_core.headers import sniff_format

_NPY_MARK = b"\x93NUMPY"
_TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST_CHANNELS = 1024


@dataclass(frozen=True, kw_only=True)
class Planes:
    """How images of C channels become uint8; part of a bundle's fingerprint.

    Attributes:
        channels: C.
        low: What becomes 0, for each channel, in the units of the files.
        high: What becomes 255.
    """

    channels: int
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= _MOST_CHANNELS:
            raise ValueError(f"channels is {self.channels}, expected 1 to {_MOST_CHANNELS}")
        if not len(self.low) == len(self.high) == self.channels:
            raise ValueError(f"low {self.low} and high {self.high} must have {self.channels} numbers each")
        if not all(
            math.isfinite(a) and math.isfinite(b) and a < b for a, b in zip(self.low, self.high, strict=True)
        ):
            raise ValueError(
                f"low {self.low} must be below high {self.high} in each channel, and both finite"
            )

    @classmethod
    def from_json(cls, values: object) -> "Planes":
        """Reads what `dataclasses.asdict` gave.

        Raises:
            ValueError: A field is missing, unknown or of another kind.
        """
        if not isinstance(values, Mapping) or set(values) != {"channels", "low", "high"}:
            raise ValueError(f"planes is {values!r}, expected channels, low and high")
        try:
            low, high = (tuple(float(number) for number in values[name]) for name in ("low", "high"))
            return cls(channels=int(values["channels"]), low=low, high=high)
        except TypeError as error:
            raise ValueError(f"planes is {values!r}: {error}") from error


def eight_bit_planes(channels: int) -> Planes:
    """Planes of files that have 8 bits already: nothing is scaled."""
    return Planes(channels=channels, low=(0.0,) * channels, high=(255.0,) * channels)


def is_raw(data: bytes) -> bool:
    """Whether only this module reads such a file: it is .npy or TIFF."""
    return data.startswith((_NPY_MARK, *_TIFF_MARKS))


def read_planes(
    data: bytes, *, channels: int | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> NDArray[np.generic]:
    """Reads the values as the file has them.

    Args:
        data: The whole file.
        channels: How many are expected, which tells the two orders of .npy apart.
        limits: What is accepted, by the header.

    Returns:
        [H, W, C], of any real type.

    Raises:
        ImageError: It is none of these files, is damaged, or is outside the limits.
    """
    if not data:
        raise ImageError("empty_image", "The image is empty.")
    if data.startswith(_NPY_MARK):
        return _npy_planes(data, channels, limits)
    image_format = "TIFF" if data.startswith(_TIFF_MARKS) else sniff_format(data)
    if image_format is None:
        raise ImageError("unsupported_format", "The image is no .npy, no TIFF and in no other known format.")
    pages: list[NDArray[np.generic]] = []
    with pillow_picture(data, image_format) as picture:
        frames = ImageSequence.Iterator(picture) if image_format == "TIFF" else [picture]
        for frame in frames:
            check_limits(*frame.size, limits=limits)
            pages.append(_page(frame))
            if {page.shape[:2] for page in pages} != {pages[0].shape[:2]}:
                raise ImageError("undecodable_image", "The pages of the TIFF have different sizes.")
    return pages[0] if len(pages) == 1 else np.concatenate(pages, axis=2)


def decode_planes(data: bytes, planes: Planes, *, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
    """Reads an image and scales each channel to 0 … 255; values outside of its range are clipped.

    Args:
        data: The whole file.
        planes: How many channels, and their ranges.
        limits: What is accepted.

    Returns:
        uint8 [C, H, W], channels last in memory; not-a-number becomes 0.

    Raises:
        ImageError: As `read_planes`; or it has another number of channels.
    """
    values_HWC = read_planes(data, channels=planes.channels, limits=limits)
    if values_HWC.shape[2] != planes.channels:
        raise ImageError(
            "unsupported_format",
            f"The image has {values_HWC.shape[2]} channels, {planes.channels} are expected.",
            limit=planes.channels,
            actual=values_HWC.shape[2],
        )
    return torch.from_numpy(scaled(values_HWC, planes)).permute(2, 0, 1)


def scaled(values_HWC: NDArray[np.generic], planes: Planes) -> NDArray[np.uint8]:
    """Values of files -> uint8, to the nearest; the last axis is the channels."""
    if values_HWC.dtype == np.uint8 and planes == eight_bit_planes(planes.channels):
        return np.ascontiguousarray(values_HWC, dtype=np.uint8)
    low_C, high_C = np.array(planes.low, np.float32), np.array(planes.high, np.float32)
    levels = (values_HWC.astype(np.float32) - low_C) * (255 / (high_C - low_C))
    return np.clip(np.rint(np.nan_to_num(levels, nan=0.0)), 0, 255).astype(np.uint8)


def _npy_planes(data: bytes, channels: int | None, limits: ImageLimits) -> NDArray[np.generic]:
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.kind not in "buif" or len(shape) not in (2, 3):
            raise ImageError(
                "unsupported_format",
                f"The array is {dtype} {list(shape)}; numbers of height, width and channels are read.",
            )
        shape = (*shape, 1) if len(shape) == 2 else shape
        is_first = channels in shape[::2] and shape[2] != channels
        is_first = is_first or (channels not in shape[::2] and shape[0] < min(shape[1:]))
        height_px, width_px = (shape[1], shape[2]) if is_first else (shape[0], shape[1])
        check_limits(width_px, height_px, limits=limits)
        # By the header alone numpy would take memory for what the file does not hold.
        if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
            raise ImageError("truncated_image", "The image begins as .npy and ends too early.")
        file.seek(0)
        values: NDArray[np.generic] = npy.read_array(file, allow_pickle=False).reshape(shape)
    except (ValueError, EOFError, OSError) as error:
        raise ImageError("undecodable_image", "The image begins as .npy and is damaged.") from error
    return np.moveaxis(values, 0, 2) if is_first else values


def _page(frame: Image.Image) -> NDArray[np.generic]:
    upright = ImageOps.exif_transpose(frame)
    if upright.mode in ("1", "P", "PA"):
        upright = upright.convert("L" if upright.mode == "1" else "RGB")
    values: NDArray[np.generic] = np.array(upright)
    return values[:, :, None] if values.ndim == 2 else values
