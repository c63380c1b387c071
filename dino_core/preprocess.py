"""The one definition of bytes -> pixels -> model input, used by training's evaluation, by export and by the service.

    bytes ── read_header ──► format and size, checked against the limits before any decoder runs
      └───── decode ───────► uint8 RGB, upright, transparent parts white
                └─ resize_and_crop ─► uint8, crop_px x crop_px
                          └─ normalise ─► float32, on the device, in `EmbeddingModel`

Ordinary JPEGs go to libjpeg-turbo (simplejpeg), all else to Pillow; both give the same pixels. Everything here may be
called from many threads, and the decoders, the resize and the large copies release the interpreter's lock. One picture
uses one native thread where the caller has set `torch.set_num_threads(1)`.

Dimension key: B images · C channels · H W pixels
"""

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

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
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Pillow refuses more than this whatever we say, and its setting is global, so that we leave it alone.
PILLOW_MAX_PIXELS = 2 * 89_478_485


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may ask of us, by its header.

    Attributes:
        max_pixels: Width times height; the default is Pillow's own (a gigabyte of 24-bit pixels, /4 /3).
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
                f"min_side_px ({self.min_side_px}) and max_aspect_ratio ({self.max_aspect_ratio}) must be 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """From a decoded picture to the model's input, in full; part of a bundle's fingerprint.

    Attributes:
        resize_px: What the shorter side becomes.
        crop_px: Side of the square cut from the middle.
        mean: Subtracted from each channel, in units of 0 to 1.
        std: Divides each channel, in units of 0 to 1.
        interpolation: Of the resize.
        antialias: Whether the resize filters what it shrinks.
        orientation: "exif": turned and mirrored as the camera said.
        background: What shows through transparent parts.
        colour: Everything becomes RGB; colour profiles are not applied; of 16 bits the upper 8 are kept.
        frame: Which frame of an animation counts.
        jpeg_scaling: A JPEG is decoded at 1/2, 1/4 or 1/8 while its shorter side stays at 2 * resize_px or more.
    """

    resize_px: int = 256
    crop_px: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Literal["bicubic"] = "bicubic"
    antialias: Literal[True] = True
    orientation: Literal["exif"] = "exif"
    background: Literal["white"] = "white"
    colour: Literal["rgb"] = "rgb"
    frame: Literal["first"] = "first"
    jpeg_scaling: Literal["twice-resize"] = "twice-resize"

    def __post_init__(self) -> None:
        if not 0 < self.crop_px <= self.resize_px:
            raise ValueError(f"crop_px is {self.crop_px}, expected 1 to resize_px ({self.resize_px})")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"mean {self.mean} and std {self.std} must have three numbers each: pictures become RGB"
            )
        if not all(math.isfinite(value) for value in self.mean) or not all(
            0 < value < math.inf for value in self.std
        ):
            raise ValueError(f"mean {self.mean} must be finite and std {self.std} above 0")
        for field in fields(self):
            allowed = get_args(field.type)
            if allowed and field.name not in ("mean", "std") and getattr(self, field.name) not in allowed:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)!r}, this version knows {allowed[0]!r}"
                )

    def to_json(self) -> dict[str, object]:
        """Gives plain values for a JSON file; `from_json` takes them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Preprocessing":
        """Reads what `to_json` gave.

        Raises:
            ValueError: A field is missing, unknown, or has a value that this version does not know.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"preprocessing has {sorted(values)}, expected {sorted(names)}")
        try:
            return cls(**{**values, "mean": _numbers(values["mean"]), "std": _numbers(values["std"])})  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"preprocessing has a value of the wrong type: {error}") from error


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


def read_header(data: bytes, *, limits: ImageLimits = ImageLimits()) -> ImageHeader:
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
        with _pillow_picture(data, image_format) as picture:
            size_px = picture.size
    _check_limits(*size_px, limits=limits)
    return ImageHeader(image_format, *size_px)


def decode(
    data: bytes,
    *,
    limits: ImageLimits = ImageLimits(),
    shorter_side_px: int | None = None,
) -> Tensor:
    """Turns the bytes of a picture into upright RGB pixels.

    Args:
        data: The whole file, in one of SUPPORTED_FORMATS.
        limits: What is accepted; checked by the header, before memory is taken.
        shorter_side_px: Allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size, by the largest factor that keeps
            its shorter side at this or more. Several times faster for photographs that are made small anyway.

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
        _check_limits(*size_px, limits=limits)
    if jpeg is None:
        return _decode_with_pillow(data, image_format, limits=limits)
    divisor = _jpeg_divisor(jpeg, shorter_side_px)
    stored = _decode_common_jpeg(data, jpeg, divisor=divisor)
    if stored is None:
        return _decode_with_pillow(data, image_format, limits=limits, jpeg=jpeg, divisor=divisor)
    return _upright(stored, jpeg.orientation)


def resize_and_crop(rgb_CHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resizes the shorter side and cuts the square in the middle.

    Args:
        rgb_CHW: uint8, any size; fastest in channels-last memory, as `decode` gives it.
        preprocessing: Sizes in pixels.

    Returns:
        uint8 [C, crop_px, crop_px], a view in channels-last memory: copy it into its batch.
    """
    _, height_px, width_px = rgb_CHW.shape
    shorter_px = min(height_px, width_px)
    # As torchvision's Resize: the longer side is rounded down.
    resized_hw = (
        height_px * preprocessing.resize_px // shorter_px,
        width_px * preprocessing.resize_px // shorter_px,
    )
    resized_1CHW = rgb_CHW[None]
    if resized_hw != (height_px, width_px):
        resized_1CHW = functional.interpolate(resized_1CHW, size=resized_hw, mode="bicubic", antialias=True)
    # As torchvision's CenterCrop: halves go to the even neighbour.
    top, left = (round((side - preprocessing.crop_px) / 2) for side in resized_hw)
    return resized_1CHW[0, :, top : top + preprocessing.crop_px, left : left + preprocessing.crop_px]


def load_pixels(
    data: bytes,
    preprocessing: Preprocessing,
    *,
    limits: ImageLimits = ImageLimits(),
) -> Tensor:
    """Turns the bytes of a picture into a model's input: what every embedding in this project is computed from.

    Args:
        data: The whole file.
        preprocessing: The model's.
        limits: What is accepted.

    Returns:
        uint8 [3, crop_px, crop_px].

    Raises:
        ImageError: `code` says why.
    """
    return resize_and_crop(
        decode(data, limits=limits, shorter_side_px=2 * preprocessing.resize_px), preprocessing
    )


def normalise(
    pixels_BCHW: Tensor, *, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> Tensor:
    """Computes (pixels / 255 - mean) / std on the pixels' device, in two passes over memory.

    Args:
        pixels_BCHW: uint8 (or floats from 0 to 255).
        mean: One number a channel, in units of 0 to 1; a tensor on the pixels' device avoids a transfer.
        std: As mean.

    Returns:
        float32 [B, C, H, W] in the memory order of the pixels.
    """
    mean_C11 = torch.as_tensor(mean, dtype=torch.float32, device=pixels_BCHW.device).reshape(-1, 1, 1)
    std_C11 = torch.as_tensor(std, dtype=torch.float32, device=pixels_BCHW.device).reshape(-1, 1, 1)
    return (pixels_BCHW - 255 * mean_C11) * (1 / (255 * std_C11))


def _format_of(data: bytes) -> str:
    if not data:
        raise ImageError("empty_image", "The image is empty.")
    image_format = sniff_format(data)
    if image_format is None:
        raise ImageError(
            "unsupported_format", f"The image is in none of the formats {', '.join(SUPPORTED_FORMATS)}."
        )
    return image_format


def _check_limits(width_px: int, height_px: int, *, limits: ImageLimits) -> None:
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
            f"The image's longer side is {ratio} times the shorter, at most {limits.max_aspect_ratio} is accepted.",
            limit=limits.max_aspect_ratio,
            actual=ratio,
        )


def _jpeg_divisor(jpeg: JpegHeader, shorter_side_px: int | None) -> int:
    """Picks 8, 4, 2 or 1: the factors that both decoders offer, so that both give the same pixels."""
    if shorter_side_px is None:
        return 1
    stored_px = min(jpeg.width_px, jpeg.height_px)
    return next((divisor for divisor in (8, 4, 2) if stored_px >= divisor * shorter_side_px), 1)


def _decode_common_jpeg(data: bytes, jpeg: JpegHeader, *, divisor: int) -> Tensor | None:
    """Decodes with libjpeg-turbo into memory that we sized; None where Pillow has to look at the picture."""
    if not jpeg.is_common or jpeg.components not in (1, 3):
        return None
    height_px, width_px = -(-jpeg.height_px // divisor), -(-jpeg.width_px // divisor)
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
    with _pillow_picture(data, image_format) as picture:
        _check_limits(*picture.size, limits=limits)
        if divisor > 1 and picture.mode in ("L", "RGB"):
            picture.draft(picture.mode, (-(-picture.width // divisor), -(-picture.height // divisor)))
        picture.load()
        stored = torch.from_numpy(np.array(_on_white(picture))).permute(2, 0, 1)
        orientation = jpeg.orientation if jpeg else exif_orientation(picture.info.get("exif", b""))
    return _upright(stored, orientation)


def _on_white(picture: Image.Image) -> Image.Image:
    """Makes any mode RGB, with white behind what is transparent."""
    if picture.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255; of 16-bit colour it keeps the upper byte, and so do we of grey.
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
def _pillow_picture(data: bytes, image_format: str) -> Iterator[Image.Image]:
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
    except Exception as error:
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

    `warnings.catch_warnings` alone is not safe in threads: the last to leave would restore what the first to leave
    had already undone. So the first thread in sets the filter, and the last one out restores it.
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


def _numbers(value: object) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(number, (int, float)) for number in value):
        raise ValueError(f"expected a list of numbers, found {value!r}")
    return tuple(float(number) for number in value)
