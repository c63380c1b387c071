"""The bytes of a picture -> upright RGB pixels, for bytes that nobody vouches for.

Ordinary JPEGs go to libjpeg-turbo (simplejpeg), all else to Pillow; both give the same pixels. The header is
held against the limits before a decoder runs; whatever a decoder raises becomes an ImageError in our words.

Dimension key: C channels · H W pixels
"""

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from dino_core.errors import ImageError
from dino_core.headers import (
    JpegHeader,
    ends_early,
    exif_orientation,
    scan_jpeg,
    sniff_format,
    stored_size_px,
)

SUPPORTED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
# Pillow refuses more than this whatever we say, and its setting is global, so that we leave it alone.
PILLOW_MAX_PIXELS = 2 * 89_478_485


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may ask of us, by its header.

    Attributes:
        max_pixels: Width times height; the default is Pillow's own, a quarter GiB of RGB: 2**30 / 4 / 3.
        min_side_px: Below this a picture holds nothing to embed.
        max_aspect_ratio: Longer side over shorter; bounds what the resize has to produce.
    """

    max_pixels: int = 89_478_485
    min_side_px: int = 8
    max_aspect_ratio: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= PILLOW_MAX_PIXELS:
            raise ValueError(
                f"max_pixels is {self.max_pixels}, expected 1 to {PILLOW_MAX_PIXELS} (Pillow's bound)"
            )
        if self.min_side_px < 1 or self.max_aspect_ratio < 1:
            raise ValueError(
                f"min_side_px ({self.min_side_px}) and max_aspect_ratio ({self.max_aspect_ratio}) "
                "must be 1 or more"
            )


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class ImageHeader:
    """What a picture says of itself before it is decoded.

    Attributes:
        format: One of SUPPORTED_FORMATS.
        width_px: As stored, before the orientation is applied.
        height_px: As stored, before the orientation is applied.
    """

    format: str
    width_px: int
    height_px: int


def read_header(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS) -> ImageHeader:
    """Reads format and size, and refuses what the limits refuse; decodes no pixel.

    Args:
        data: The whole file.
        limits: What is accepted.

    Returns:
        Format and stored size.

    Raises:
        ImageError: The picture is empty, of an unknown format, unreadable, or outside the limits.
    """
    image_format = _format_of(data)
    jpeg = scan_jpeg(data) if image_format == "JPEG" else None
    size_px = (jpeg.width_px, jpeg.height_px) if jpeg else stored_size_px(data, image_format)
    if size_px is None:
        with pillow_picture(data, image_format) as picture:
            size_px = picture.size
    check_limits(*size_px, limits=limits)
    return ImageHeader(image_format, *size_px)


def decode(
    data: bytes,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
    shorter_side_px: int | None = None,
) -> Tensor:
    """Turns the bytes of a picture into upright RGB pixels.

    Args:
        data: The whole file, in one of SUPPORTED_FORMATS.
        limits: What is accepted; checked by the header, before memory is taken.
        shorter_side_px: Allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size, by the largest factor
            that divides both sides and keeps the shorter one at this or more. Several times faster for
            photographs that are made small anyway.

    Returns:
        uint8 [3, H, W], as shown: orientation applied, transparent parts white. The memory is in rows of RGB
        triples (channels last), which is what the resize wants.

    Raises:
        ImageError: `code` says why; no decoder's own words are repeated.
    """
    image_format = _format_of(data)
    jpeg = scan_jpeg(data) if image_format == "JPEG" else None
    size_px = (jpeg.width_px, jpeg.height_px) if jpeg else stored_size_px(data, image_format)
    if size_px is not None:
        check_limits(*size_px, limits=limits)
    if jpeg is None:
        return _decode_with_pillow(data, image_format, limits=limits)
    divisor = _jpeg_divisor(jpeg, shorter_side_px)
    stored = _decode_common_jpeg(data, jpeg, divisor=divisor)
    if stored is None:
        return _decode_with_pillow(data, image_format, limits=limits, jpeg=jpeg, divisor=divisor)
    return _upright(stored, jpeg.orientation)


def _format_of(data: bytes) -> str:
    if not data:
        raise ImageError("empty_image", "The image is empty.")
    image_format = sniff_format(data)
    if image_format is None:
        raise ImageError(
            "unsupported_format", f"The image is in none of the formats {', '.join(SUPPORTED_FORMATS)}."
        )
    return image_format


def check_limits(width_px: int, height_px: int, *, limits: ImageLimits) -> None:
    """Refuses a size that the limits refuse.

    Raises:
        ImageError: It does.
    """
    pixels = width_px * height_px
    shorter_px, longer_px = sorted((width_px, height_px))
    if pixels > limits.max_pixels:
        raise ImageError(
            "image_too_large",
            f"The image has {pixels:,} pixels, at most {limits.max_pixels:,} are accepted: make it smaller.",
            limit=limits.max_pixels,
            actual=pixels,
        )
    if shorter_px < limits.min_side_px:
        raise ImageError(
            "image_too_small",
            f"The image's shorter side has {shorter_px} px, at least {limits.min_side_px} are needed.",
            limit=limits.min_side_px,
            actual=shorter_px,
        )
    if longer_px > limits.max_aspect_ratio * shorter_px:
        ratio = math.ceil(longer_px / shorter_px)
        raise ImageError(
            "aspect_ratio_too_extreme",
            f"One side of the image is {ratio} times the other, at most {limits.max_aspect_ratio} is taken.",
            limit=limits.max_aspect_ratio,
            actual=ratio,
        )


def _jpeg_divisor(jpeg: JpegHeader, shorter_side_px: int | None) -> int:
    """Picks 8, 4, 2 or 1: the factors that both decoders offer, so that both give the same pixels.

    The factor has to divide both sides, as otherwise the last row or column would stand for less than the
    others and the resize would shift the picture. Cameras' sizes are multiples of 8.
    """
    if shorter_side_px is None:
        return 1
    sides_px = (jpeg.width_px, jpeg.height_px)
    return next(
        (
            d
            for d in (8, 4, 2)
            if min(sides_px) >= d * shorter_side_px and not any(side % d for side in sides_px)
        ),
        1,
    )


def _decode_common_jpeg(data: bytes, jpeg: JpegHeader, *, divisor: int) -> Tensor | None:
    """Decodes with libjpeg-turbo into memory that we sized; None where Pillow has to look at the picture."""
    if not jpeg.is_common or jpeg.components not in (1, 3):
        return None
    height_px, width_px = jpeg.height_px // divisor, jpeg.width_px // divisor
    rgb_HWC = np.empty((height_px, width_px, 3), np.uint8)
    try:
        # Strict: whatever libjpeg warns of goes to Pillow, which tells harmless damage from a lost end.
        simplejpeg.decode_jpeg(data, "RGB", min_height=height_px, min_width=width_px, buffer=rgb_HWC)
    except ValueError:
        return None
    return torch.from_numpy(rgb_HWC).permute(2, 0, 1)


def _decode_with_pillow(
    data: bytes,
    image_format: str,
    *,
    limits: ImageLimits,
    jpeg: JpegHeader | None = None,
    divisor: int = 1,
) -> Tensor:
    with pillow_picture(data, image_format) as picture:
        check_limits(*picture.size, limits=limits)
        if divisor > 1 and picture.mode in ("L", "RGB"):
            picture.draft(picture.mode, (picture.width // divisor, picture.height // divisor))
        picture.load()
        stored = torch.from_numpy(np.array(_on_white(picture))).permute(2, 0, 1)
        orientation = jpeg.orientation if jpeg else exif_orientation(picture.info.get("exif", b""))
    return _upright(stored, orientation)


def _on_white(picture: Image.Image) -> Image.Image:
    """Makes any mode RGB, with white behind what is transparent."""
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255; of 16-bit colour it keeps the upper byte, as we do of grey.
        samples = np.array(picture)
        upper = (samples >> 8).astype(np.uint8)
        if isinstance(transparent := picture.info.get("transparency"), int):
            upper[samples == transparent] = 255
        return Image.fromarray(upper).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    rgba = picture.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _upright(stored_CHW: Tensor, orientation: int) -> Tensor:
    """Undoes an EXIF orientation: 2 to 4 mirror or turn by 180°, 5 to 8 exchange the axes as well."""
    turned_CHW = stored_CHW.transpose(1, 2) if orientation >= 5 else stored_CHW
    match orientation:
        case 2 | 6:
            return turned_CHW.flip(2)
        case 3 | 7:
            return turned_CHW.flip(1, 2)
        case 4 | 8:
            return turned_CHW.flip(1)
        case _:
            return turned_CHW


@contextlib.contextmanager
def pillow_picture(data: bytes, image_format: str) -> Iterator[Image.Image]:
    """Opens a picture with the one Pillow plugin named; whatever goes wrong inside becomes an ImageError."""
    try:
        with _quiet_pillow(), Image.open(io.BytesIO(data), formats=(image_format,)) as picture:
            yield picture
    except ImageError:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            "image_too_large",
            f"The image has more than {PILLOW_MAX_PIXELS:,} pixels: make it smaller.",
            limit=PILLOW_MAX_PIXELS,
        ) from None
    except Exception as error:  # decoders raise anything, from SyntaxError to MemoryError
        raise _why_undecodable(data, image_format, error) from error


def _why_undecodable(data: bytes, image_format: str, error: Exception) -> ImageError:
    jpeg = scan_jpeg(data) if image_format == "JPEG" else None
    if jpeg is not None and not jpeg.is_common:
        return ImageError(
            "unsupported_format", "The image is a JPEG of a kind that is not read: 12-bit or lossless."
        )
    if ends_early(data, image_format) or "truncated" in str(error).lower():
        return ImageError("truncated_image", f"The image begins as {image_format} and ends too early.")
    return ImageError("undecodable_image", f"The image begins as {image_format} and is damaged.")


class _PillowSilence:
    """Keeps Pillow's warnings quiet while any thread decodes.

    `warnings.catch_warnings` alone is not safe in threads: the last to leave would restore what the first to
    leave had already undone. So the first thread in sets the filter, and the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved: warnings.catch_warnings[None] | None = None

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._saved is not None:
                self._saved.__exit__(None, None, None)
                self._saved = None


_silence = _PillowSilence()


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    _silence.enter()
    try:
        yield
    finally:
        _silence.leave()
