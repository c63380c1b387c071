"""The one definition of bytes -> pixels -> model input: for training's evaluation, export and the service.

    bytes ── read_header ──► format and size, checked against the limits before any decoder runs
      └───── decode ───────► uint8 RGB, upright, transparent parts white
                └─ resize_and_crop ─► uint8, crop_px x crop_px
                          └─ normalise ─► float32, on the device, in `EmbeddingModel`

Everything here may be called from many threads; the decoders, the resize and the large copies release the
interpreter's lock. One picture uses one native thread where the caller has set `torch.set_num_threads(1)`.

Dimension key: B images · C channels · H W pixels
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from dino_core.decoding import (
    DEFAULT_LIMITS,
    SUPPORTED_FORMATS,
    ImageHeader,
    ImageLimits,
    decode,
    read_header,
)
from dino_core.planes import Planes, decode_planes

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SUPPORTED_FORMATS",
    "ImageHeader",
    "ImageLimits",
    "Planes",
    "Preprocessing",
    "decode",
    "load_pixels",
    "normalise",
    "read_header",
    "resize_and_crop",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        colour: Everything becomes RGB, where there are no planes; colour profiles are not applied; of 16 bits
            the upper 8 are kept.
        frame: Which frame of an animation counts.
        jpeg_scaling: A JPEG is decoded at 1/2, 1/4 or 1/8, where that divides both sides, while the shorter
            one stays at 2 * resize_px or more.
        planes: Images are no RGB but have these channels, scaled so; None: RGB.
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
    planes: Planes | None = None

    def __post_init__(self) -> None:
        if not 0 < self.crop_px <= self.resize_px:
            raise ValueError(f"crop_px is {self.crop_px}, expected 1 to resize_px ({self.resize_px})")
        if not len(self.mean) == len(self.std) == self.channels:
            kind = "pictures become RGB" if self.planes is None else f"there are {self.channels} channels"
            raise ValueError(
                f"mean {self.mean} and std {self.std} must have {self.channels} numbers each: {kind}"
            )
        if not all(math.isfinite(value) for value in self.mean) or not all(
            0 < value < math.inf for value in self.std
        ):
            raise ValueError(f"mean {self.mean} must be finite and std {self.std} above 0")
        for field in fields(self):
            allowed = get_args(field.type)
            if (
                allowed
                and field.name not in ("mean", "std", "planes")
                and getattr(self, field.name) not in allowed
            ):
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)!r}, this version knows {allowed[0]!r}"
                )

    @property
    def channels(self) -> int:
        """Of the model's input."""
        return 3 if self.planes is None else self.planes.channels

    def to_json(self) -> dict[str, object]:
        """Gives plain values for a JSON file; `from_json` takes them back. RGB says nothing of planes."""
        values: dict[str, object] = json.loads(json.dumps(asdict(self)))
        if self.planes is None:
            del values["planes"]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Preprocessing":
        """Reads what `to_json` gave.

        Raises:
            ValueError: A field is missing, unknown, or has a value that this version does not know.
        """
        names = {field.name for field in fields(cls)} - {"planes"}
        if set(values) - {"planes"} != names:
            raise ValueError(f"preprocessing has {sorted(values)}, expected {sorted(names)}")
        known = {**values, "mean": _numbers(values["mean"]), "std": _numbers(values["std"])}
        if "planes" in values:
            known["planes"] = Planes.from_json(values["planes"])
        try:
            return cls(**known)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(f"preprocessing has a value of the wrong type: {error}") from error


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
    resized_1CHW = as_batch(rgb_CHW)
    if resized_hw != (height_px, width_px):
        resized_1CHW = functional.interpolate(resized_1CHW, size=resized_hw, mode="bicubic", antialias=True)
    # As torchvision's CenterCrop: halves go to the even neighbour.
    top, left = (round((side - preprocessing.crop_px) / 2) for side in resized_hw)
    return resized_1CHW[0, :, top : top + preprocessing.crop_px, left : left + preprocessing.crop_px]


def as_batch(pixels_CHW: Tensor) -> Tensor:
    """A view of one image as a batch [1, C, H, W] that torch takes to be channels-last where the image is.

    A new first axis before rows, not before channels: only so do the strides say "channels last" to torch,
    which otherwise turns pictures into planes, resizes these in twice the time, and turns them back. The
    numbers are the same.
    """
    return pixels_CHW.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def load_pixels(
    data: bytes,
    preprocessing: Preprocessing,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Tensor:
    """Turns the bytes of a picture into a model's input: what every embedding here is computed from.

    Args:
        data: The whole file.
        preprocessing: The model's.
        limits: What is accepted.

    Returns:
        uint8 [C, crop_px, crop_px]; C is 3 where there are no planes.

    Raises:
        ImageError: `code` says why.
    """
    pixels_CHW = (
        decode(data, limits=limits, shorter_side_px=2 * preprocessing.resize_px)
        if preprocessing.planes is None
        else decode_planes(data, preprocessing.planes, limits=limits)
    )
    return resize_and_crop(pixels_CHW, preprocessing)


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
    mean_C = torch.as_tensor(mean, dtype=torch.float32, device=pixels_BCHW.device)
    std_C = torch.as_tensor(std, dtype=torch.float32, device=pixels_BCHW.device)
    shift_C, scale_C = 255 * mean_C, 1 / (255 * std_C)
    on_cpu = pixels_BCHW.device.type == "cpu"
    if on_cpu and pixels_BCHW.is_contiguous(memory_format=torch.channels_last):
        # Row by row. As channels, which are three and lie innermost, a CPU computes three numbers at a time
        # and not sixteen: five times as long (docs/lab-notes.md, 2026-11-28). The numbers are the same.
        width_px = pixels_BCHW.shape[3]
        rows_BHX = pixels_BCHW.permute(0, 2, 3, 1).flatten(2)
        rows_BHX = rows_BHX.float().sub_(shift_C.repeat(width_px)).mul_(scale_C.repeat(width_px))
        return rows_BHX.view(*rows_BHX.shape[:2], width_px, -1).permute(0, 3, 1, 2)
    return (pixels_BCHW - shift_C.reshape(-1, 1, 1)) * scale_C.reshape(-1, 1, 1)


def _numbers(value: object) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(number, (int, float)) for number in value):
        raise ValueError(f"expected a list of numbers, found {value!r}")
    return tuple(float(number) for number in value)
