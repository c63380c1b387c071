"""One image, one crop, step by step with torchvision: what `dino_core.augment` must equal.

Needs the image at its own size (no canvas), and takes what was drawn from a row of `Draws`.
"""

import math

import torch
import torchvision.transforms.v2.functional as tv
from torch import Tensor

from dino_core.augment import Draws

BRIGHTNESS, CONTRAST, SATURATION = range(3)


def augmented(
    image_CHW: Tensor,
    draws: Draws,
    row: int,
    *,
    size_px: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """Crop, flip, jitter, grey, blur, solarise, normalise of one float image in [0, 1]."""
    top, left, height, width = (int(edge) for edge in draws.boxes_B4[row])
    image = cropped_and_resized(image_CHW, top, left, height, width, size_px=size_px).clamp(0, 1)
    if draws.flip_B[row]:
        image = tv.horizontal_flip(image)
    if draws.jitter_B[row]:
        image = jittered(image, draws, row)
    if draws.grey_B[row]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if draws.sigma_px_B[row] > 0:
        image = gaussian_blurred(image, sigma_px=float(draws.sigma_px_B[row]))
    if draws.solarise_B[row]:
        image = tv.solarize(image, threshold=0.5)
    shift, spread = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return (image - shift) / spread


def cropped_and_resized(
    image_CHW: Tensor, top: int, left: int, height: int, width: int, *, size_px: int
) -> Tensor:
    """Slices the box out, then resizes it."""
    box = image_CHW[:, top : top + height, left : left + width]
    size = (size_px, size_px)
    return torch.nn.functional.interpolate(box[None], size=size, mode="bicubic", antialias=True)[0]


def jittered(image_CHW: Tensor, draws: Draws, row: int) -> Tensor:
    """The four adjustments in the drawn order."""
    order: list[int | str] = [int(operation) for operation in draws.order_B3[row]]
    order.insert(int(draws.hue_slot_B[row]), "hue")
    for operation in order:
        if operation == "hue":
            image_CHW = tv.adjust_hue(image_CHW, float(draws.hue_B[row]))
            continue
        factor = float(draws.factors_B3[row, int(operation)])
        adjust = {
            BRIGHTNESS: tv.adjust_brightness,
            CONTRAST: tv.adjust_contrast,
            SATURATION: tv.adjust_saturation,
        }[int(operation)]
        image_CHW = adjust(image_CHW, factor)
    return image_CHW


def gaussian_blurred(image_CHW: Tensor, *, sigma_px: float) -> Tensor:
    """A convolution with the two-dimensional kernel, float64, far tails included, edges continued."""
    reach = math.ceil(8 * sigma_px)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    squared = offsets[:, None] ** 2 + offsets[None, :] ** 2
    kernel = torch.exp(-squared / (2 * sigma_px**2))
    kernel = kernel / kernel.sum()
    padded = torch.nn.functional.pad(image_CHW[:, None].double(), (reach,) * 4, mode="replicate")
    return torch.nn.functional.conv2d(padded, kernel[None, None])[:, 0].float()
