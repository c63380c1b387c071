"""Canvases -> augmented views, on the device, with one draw for each image and each crop.

The host decodes an image once and squashes it to a square canvas of a fixed size, so that every batch and
every cache has one shape; the original height and width travel along. Boxes are drawn in the original's
pixels, so that areas and aspect ratios mean what they mean in the paper, and are then laid on the canvas.

Order: crop, flip, jitter, grey, blur, solarise, normalise (facebookresearch/dino, main_dino.py:419-464).

Dimension key: B images · C channels · H W pixels
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_core.colour import blurred, grey, jitter_, solarised
from dino_core.randomness import streams, uniforms
from dino_core.resample import crop_and_resize

_TRIES = 10  # torchvision's RandomResizedCrop draws ten boxes before it gives up

# Which random number is for what. Numbers keep their meaning: a new use takes a new slot.
_SLOT_AREA = 0
_SLOT_ASPECT = _SLOT_AREA + _TRIES
_SLOT_TOP = _SLOT_ASPECT + _TRIES
_SLOT_LEFT = _SLOT_TOP + 1
_SLOT_FLIP = _SLOT_TOP + 2
_SLOT_JITTER = _SLOT_TOP + 3
_SLOT_FACTORS = _SLOT_TOP + 4  # brightness, contrast, saturation, hue
_SLOT_ORDER = _SLOT_FACTORS + 4  # of the four
_SLOT_GREY = _SLOT_ORDER + 4
_SLOT_BLUR = _SLOT_GREY + 1
_SLOT_SIGMA = _SLOT_GREY + 2
_SLOT_SOLARISE = _SLOT_GREY + 3

_HUE = 3  # its place among the four; the others are in dino_core.colour
_RGB = ("red", "green", "blue")


@dataclass(frozen=True, kw_only=True)
class View:
    """How one crop is made: its size, its boxes, and how likely and how strong each change is."""

    size_px: int
    """Both sides of the crop."""
    area: tuple[float, float]
    """Least and greatest share of the image's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width / height of the box, drawn log-uniformly."""
    flip_probability: float = 0.5
    jitter_probability: float = 0.8
    brightness: float = 0.4
    """The factor is drawn from 1 - brightness to 1 + brightness, not below 0."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """The shift is drawn from -hue to hue, in turns of the colour circle."""
    grey_probability: float = 0.2
    blur_probability: float
    """No default: the official views have 1.0, 0.1 and 0.5, and mixing them up goes unnoticed."""
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarise_probability: float = 0.0

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            ValueError: A field is out of its range.
        """
        if self.size_px < 1:
            raise ValueError(f"size_px is {self.size_px}: a crop has at least 1 pixel")
        for name in ("area", "aspect", "blur_sigma_px"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} is {(low, high)}: give (least, greatest), both above 0")
        if self.area[1] > 1:
            raise ValueError(f"area is {self.area}: a crop is at most the whole image, 1.0")
        for name in ("flip", "jitter", "grey", "blur", "solarise"):
            probability = getattr(self, f"{name}_probability")
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}_probability is {probability}: give a number from 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 (no change) or more")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue is {self.hue}: give 0 (no change) to 0.5 (half the colour circle)")


def dino_views(
    *,
    global_px: int = 224,
    local_px: int = 96,
    local_count: int = 8,
    global_area: tuple[float, float] = (0.4, 1.0),
    local_area: tuple[float, float] = (0.05, 0.4),
) -> tuple[View, ...]:
    """The official views: two global ones, always and seldom blurred, then the local ones.

    Reference: facebookresearch/dino, main_dino.py:419-464 (blur 1.0, 0.1, 0.5; solarise 0.2 on the second).
    """
    return (
        View(size_px=global_px, area=global_area, blur_probability=1.0),
        View(size_px=global_px, area=global_area, blur_probability=0.1, solarise_probability=0.2),
        *[View(size_px=local_px, area=local_area, blur_probability=0.5) for _ in range(local_count)],
    )


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What one view does to each image of a batch; on the host, from float64."""

    boxes_B4: NDArray[np.float64]
    """top, left, height, width: whole pixels of the original image."""
    flip_B: NDArray[np.bool_]
    factors_B3: NDArray[np.float64]
    """Of brightness, contrast and saturation; 1 where there is no jitter."""
    order_B3: NDArray[np.int64]
    """In which order these three come."""
    hue_B: NDArray[np.float64]
    """In turns; 0 where there is no jitter."""
    hue_slot_B: NDArray[np.int64]
    """How many of the three come before the hue."""
    jitter_B: NDArray[np.bool_]
    grey_B: NDArray[np.bool_]
    sigma_px_B: NDArray[np.float64]
    """Of the blur; 0 where there is none."""
    solarise_B: NDArray[np.bool_]


def draw(
    view: View,
    sizes_px_B2: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    crop: int,
    indices_B: NDArray[np.int64],
) -> Draws:
    """Draws what a view does to each image: a function of (seed, epoch, index, crop) and the size.

    Args:
        view: The distributions.
        sizes_px_B2: Height and width of the originals.
        seed: The run's.
        epoch: Which pass over the data.
        crop: Which view this is.
        indices_B: The images' places in the data set.
    """
    streams_B = streams(seed=seed, epoch=epoch, crop=crop, indices_B=indices_B)

    def between(low: float, high: float, slot: int) -> NDArray[np.float64]:
        return np.asarray(low + (high - low) * uniforms(streams_B, slot=slot)[:, 0])

    def happens(probability: float, slot: int) -> NDArray[np.bool_]:
        return np.asarray(uniforms(streams_B, slot=slot)[:, 0] < probability)

    jitter_B = happens(view.jitter_probability, _SLOT_JITTER)
    strengths = (view.brightness, view.contrast, view.saturation)
    factors = [between(max(0.0, 1 - s), 1 + s, _SLOT_FACTORS + place) for place, s in enumerate(strengths)]
    order_B4 = np.argsort(uniforms(streams_B, slot=_SLOT_ORDER, count=4), axis=1, kind="stable")
    blur_B = happens(view.blur_probability, _SLOT_BLUR)
    return Draws(
        boxes_B4=_boxes(view, sizes_px_B2, streams_B),
        flip_B=happens(view.flip_probability, _SLOT_FLIP),
        factors_B3=np.where(jitter_B[:, None], np.stack(factors, axis=1), 1.0),
        order_B3=order_B4[order_B4 != _HUE].reshape(-1, 3),
        hue_B=np.where(jitter_B, between(-view.hue, view.hue, _SLOT_FACTORS + _HUE), 0.0),
        hue_slot_B=np.argmax(order_B4 == _HUE, axis=1),
        jitter_B=jitter_B,
        grey_B=happens(view.grey_probability, _SLOT_GREY),
        sigma_px_B=np.where(blur_B, between(*view.blur_sigma_px, _SLOT_SIGMA), 0.0),
        solarise_B=happens(view.solarise_probability, _SLOT_SOLARISE),
    )


def _boxes(view: View, sizes_px_B2: NDArray[np.int64], streams_B: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Boxes as torchvision's RandomResizedCrop.get_params draws them.

    for ten tries: draw area and aspect; the first box that fits is taken, at a uniform place
    none fits: the middle of the image, as much of it as the aspect's bounds allow
    """
    heights_B, widths_B = sizes_px_B2.astype(np.float64).T
    rows = np.arange(len(sizes_px_B2))
    share_BD = view.area[0] + (view.area[1] - view.area[0]) * uniforms(
        streams_B, slot=_SLOT_AREA, count=_TRIES
    )
    low, high = np.log(view.aspect)
    aspect_BD = np.exp(low + (high - low) * uniforms(streams_B, slot=_SLOT_ASPECT, count=_TRIES))
    area_BD = share_BD * (heights_B * widths_B)[:, None]
    box_widths_BD, box_heights_BD = (
        np.rint(np.sqrt(area_BD * aspect_BD)),
        np.rint(np.sqrt(area_BD / aspect_BD)),
    )
    fits_BD = (box_widths_BD >= 1) & (box_widths_BD <= widths_B[:, None])
    fits_BD &= (box_heights_BD >= 1) & (box_heights_BD <= heights_B[:, None])
    first_B, fits_B = np.argmax(fits_BD, axis=1), fits_BD.any(axis=1)

    whole_aspect_B = widths_B / heights_B
    most_heights_B = np.where(whole_aspect_B < view.aspect[0], np.rint(widths_B / view.aspect[0]), heights_B)
    most_widths_B = np.where(whole_aspect_B > view.aspect[1], np.rint(heights_B * view.aspect[1]), widths_B)
    box_heights_B = np.where(fits_B, box_heights_BD[rows, first_B], most_heights_B)
    box_widths_B = np.where(fits_B, box_widths_BD[rows, first_B], most_widths_B)

    spare_heights_B, spare_widths_B = heights_B - box_heights_B, widths_B - box_widths_B
    tops_B = np.floor(uniforms(streams_B, slot=_SLOT_TOP)[:, 0] * (spare_heights_B + 1))
    lefts_B = np.floor(uniforms(streams_B, slot=_SLOT_LEFT)[:, 0] * (spare_widths_B + 1))
    tops_B = np.where(fits_B, tops_B, spare_heights_B // 2)
    lefts_B = np.where(fits_B, lefts_B, spare_widths_B // 2)
    return np.stack([tops_B, lefts_B, box_heights_B, box_widths_B], axis=1)


@torch.no_grad()
def augment(  # noqa: PLR0913  every argument is another part's: the loader's, the recipe's, the run's
    pixels_BCHW: Tensor,
    *,
    sizes_px_B2: Tensor | None,
    views: Sequence[View],
    seed: int,
    epoch: int,
    indices_B: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Tensor]:
    """All views of a batch: crop, flip, jitter, grey, blur, solarise, normalise.

    What an image gets depends on (seed, epoch, its index, the crop) and nothing else. Images that don't have
    three channels keep their colours: jitter and grey are left out; blur and solarise work on any number.

    Args:
        pixels_BCHW: uint8, or float in [0, 1]; canvases, or images of one size.
        sizes_px_B2: int64, height and width before the image was squashed to the canvas; None: as in the
            batch.
        views: One for each crop.
        seed: The run's.
        epoch: Which pass over the data.
        indices_B: int64, the images' places in the data set. Keep sizes and indices on the host: draws are
            made there.
        mean: Of each channel, for values in [0, 1].
        std: Of each channel, above 0.

    Returns:
        One float32 [B, C, size_px, size_px] on the device of the pixels for each view, normalised.

    Raises:
        ValueError: Lengths of the arguments contradict each other.
    """
    batch, channels, height_px, width_px = pixels_BCHW.shape
    if len(indices_B) != batch or (sizes_px_B2 is not None and len(sizes_px_B2) != batch):
        raise ValueError(f"the batch has {batch} images: give as many indices_B and sizes_px_B2")
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"the images have {channels} channels: mean and std need one number for each")
    sizes = np.tile([height_px, width_px], (batch, 1)) if sizes_px_B2 is None else sizes_px_B2.cpu().numpy()
    indices = indices_B.cpu().numpy()
    white = 255.0 if pixels_BCHW.dtype == torch.uint8 else 1.0
    # Once for all views, and in the order of memory in which a CPU resizes fastest.
    pixels_BCHW = pixels_BCHW.permute(0, 2, 1, 3).to(torch.float32).contiguous().permute(0, 2, 1, 3)
    shift = torch.tensor(mean, dtype=torch.float32, device=pixels_BCHW.device)[:, None, None]
    spread = torch.tensor(std, dtype=torch.float32, device=pixels_BCHW.device)[:, None, None]
    crops = []
    for crop, view in enumerate(views):
        draws = draw(view, sizes, seed=seed, epoch=epoch, crop=crop, indices_B=indices)
        to_canvas = np.array([height_px, width_px]) / sizes
        boxes_B4 = draws.boxes_B4 * np.tile(to_canvas, 2)
        images = crop_and_resize(pixels_BCHW, boxes_B4, size_px=view.size_px, flip_B=draws.flip_B)
        images.div_(white).clamp_(0, 1)
        crops.append(_recoloured_(images, draws).sub_(shift).div_(spread))
    return crops


def _recoloured_(images_BCHW: Tensor, draws: Draws) -> Tensor:
    """Jitter, grey, blur and solarise, in place, each only on the images that drew it."""
    device = images_BCHW.device
    if images_BCHW.shape[1] == len(_RGB):
        if draws.jitter_B.any():
            jitter_(
                images_BCHW,
                factors_B3=torch.from_numpy(draws.factors_B3).float(),
                order_B3=torch.from_numpy(draws.order_B3),
                hue_B=torch.from_numpy(draws.hue_B).float(),
                hue_slot_B=torch.from_numpy(draws.hue_slot_B),
            )
        if draws.grey_B.any():
            rows = torch.from_numpy(np.flatnonzero(draws.grey_B)).to(device)
            images_BCHW[rows] = grey(images_BCHW[rows]).expand(-1, len(_RGB), -1, -1)
    if draws.sigma_px_B.any():
        blurry = np.flatnonzero(draws.sigma_px_B)
        rows = torch.from_numpy(blurry).to(device)
        images_BCHW[rows] = blurred(images_BCHW[rows], torch.from_numpy(draws.sigma_px_B[blurry]).float())
    if draws.solarise_B.any():
        rows = torch.from_numpy(np.flatnonzero(draws.solarise_B)).to(device)
        images_BCHW[rows] = solarised(images_BCHW[rows])
    return images_BCHW
