"""Colour and sharpness of a batch, each image by its own amount: jitter, grey, blur, solarise.

Each operation is torchvision's on floats in [0, 1], vectorised over images that all drew something else.

Dimension key: B images · C channels · H W pixels
"""

import math

import torch
from torch import Tensor

from dino_core.resample import Taps, resampled

BRIGHTNESS, CONTRAST, SATURATION = range(3)
_REACH_SIGMAS = 4.0  # what lies further weighs less than 1e-4 of the whole
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, with the digits that torchvision has


def grey(images_BCHW: Tensor) -> Tensor:
    """Luma of RGB images: 0.2989 R + 0.587 G + 0.114 B, float [B, 1, H, W]."""
    luma_B1HW = images_BCHW[:, 0:1] * _LUMA[0]
    return luma_B1HW.add_(images_BCHW[:, 1:2], alpha=_LUMA[1]).add_(images_BCHW[:, 2:3], alpha=_LUMA[2])


def jitter_(
    images_BCHW: Tensor, *, factors_B3: Tensor, order_B3: Tensor, hue_B: Tensor, hue_slot_B: Tensor
) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, in place.

        for each image:
            for slot in 0 … 3:
                if hue_slot == slot: shift the hue
                if slot < 3: apply the adjustment order[slot] with its factor, clamp to [0, 1]

    Brightness, contrast and saturation are one formula, `factor * image + (1 - factor) * base`, where base
    is black, the image's mean luma, or each pixel's luma: so images in different orders go through the same
    product.

    Args:
        images_BCHW: float RGB in [0, 1]; changed.
        factors_B3: Of brightness, contrast and saturation, in this sequence; 1 changes nothing, bit for bit.
        order_B3: int64, a permutation of 0, 1, 2 for each image.
        hue_B: Shift in turns, from -0.5 to 0.5; images with 0 are left alone.
        hue_slot_B: int64, before which adjustment the hue comes; 3: after all.

    Returns:
        The same tensor.
    """
    for slot in range(4):
        rows = torch.nonzero((hue_slot_B == slot) & (hue_B != 0)).squeeze(1)
        if len(rows):
            rows = rows.to(images_BCHW.device)
            shifts = hue_B.to(images_BCHW.device)[rows]
            images_BCHW[rows] = hue_shifted(images_BCHW[rows], shifts)
        if slot < 3:
            operation_B = order_B3[:, slot]
            factor_B = factors_B3.gather(1, operation_B[:, None]).squeeze(1)
            _adjust_(images_BCHW, operation_B, factor_B)
    return images_BCHW


def _adjust_(images_BCHW: Tensor, operation_B: Tensor, factor_B: Tensor) -> None:
    """One of brightness, contrast and saturation on each image, in place."""
    if not bool((operation_B != BRIGHTNESS).any()):
        images_BCHW.mul_(factor_B.to(images_BCHW.device)[:, None, None, None]).clamp_(0, 1)
        return
    on_device = torch.stack(
        [factor_B, (operation_B == CONTRAST).float(), (operation_B == SATURATION).float()]
    )
    factor, is_contrast, is_saturation = on_device.to(images_BCHW.device)[:, :, None, None, None].unbind(0)
    luma = grey(images_BCHW)
    base = luma.mean(dim=(2, 3), keepdim=True).mul_(is_contrast).add(luma.mul_(is_saturation))
    torch.lerp(base, images_BCHW, factor, out=images_BCHW).clamp_(0, 1)


def hue_shifted(images_BCHW: Tensor, turns_B: Tensor) -> Tensor:
    """Turns the hue of RGB images and keeps value and chroma, without the way through HSV and back.

    With v the largest channel, c the distance to the smallest and h the hue in sixths of a turn, channel n of
    (5, 3, 1) for red, green and blue is `v - c * clamp(min(k, 4 - k), 0, 1)` with `k = (n + h) mod 6`.

    Args:
        images_BCHW: float RGB in [0, 1].
        turns_B: Shift, 1 being the whole circle.

    Returns:
        A new tensor of the same shape.

    Reference: https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    """
    red, green, blue = images_BCHW.unbind(1)
    value = images_BCHW.amax(dim=1)
    chroma = value - images_BCHW.amin(dim=1)
    sixths = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, (blue - red).add_(chroma, alpha=2), (red - green).add_(chroma, alpha=4)),
    )
    # Greys have no hue: numerator and chroma are both 0, and the bound makes that 0.
    sixths.div_(chroma.clamp_min(1e-12)).add_(6 * turns_B[:, None, None])
    shifted = torch.empty_like(images_BCHW)
    for channel, phase in enumerate((5, 3, 1)):
        turned = sixths + phase
        turned.sub_(torch.floor(turned / 6), alpha=6)  # mod 6; torch.remainder takes four times as long
        ramp = turned.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)  # min(k, 4 - k) = 2 - |k - 2|
        torch.addcmul(value, ramp, chroma, value=-1, out=shifted[:, channel])
    return shifted


def blurred(images_BCHW: Tensor, sigmas_px_B: Tensor) -> Tensor:
    """Gaussian blur of each image by its own sigma; beyond the border the edge pixel goes on, as in Pillow.

    Args:
        images_BCHW: float, any number of channels.
        sigmas_px_B: Standard deviation in pixels, above 0.

    Returns:
        A new tensor of the same shape.
    """
    height_px, width_px = images_BCHW.shape[-2:]
    down = gaussian_taps(sigmas_px_B, size_px=height_px, device=images_BCHW.device)
    across = (
        down
        if width_px == height_px
        else gaussian_taps(sigmas_px_B, size_px=width_px, device=images_BCHW.device)
    )
    return resampled(images_BCHW, down, across)


def gaussian_taps(sigmas_px_B: Tensor, *, size_px: int, device: torch.device) -> Taps:
    """What blurs a line of `size_px` pixels; taps beyond an end fall on the pixel at that end.

    Returns:
        As many taps for each pixel as the widest kernel of the batch needs.
    """
    reach_px = math.ceil(_REACH_SIGMAS * float(sigmas_px_B.max()))
    sigmas_px_B1 = sigmas_px_B.to(device)[:, None]
    distances_T = torch.arange(-reach_px, reach_px + 1, device=device)
    kernels_BT = torch.exp(-(distances_T.float() ** 2) / (2 * sigmas_px_B1**2))
    # Each kernel ends by its own sigma, so that an image doesn't depend on the batch that it is in.
    kernels_BT *= distances_T.abs() <= torch.ceil(_REACH_SIGMAS * sigmas_px_B1)
    kernels_BT /= kernels_BT.sum(dim=1, keepdim=True)
    pixels_LT = (torch.arange(size_px, device=device)[:, None] + distances_T).clamp(0, size_px - 1)
    shape = (len(sigmas_px_B), size_px, len(distances_T))
    return Taps(pixels_LT.expand(shape), kernels_BT[:, None].expand(shape))


def solarised(images_BCHW: Tensor) -> Tensor:
    """Inverts what is at least half as bright as white, as Pillow's `solarize(threshold=128)`."""
    return torch.where(images_BCHW >= 0.5, 1 - images_BCHW, images_BCHW)
