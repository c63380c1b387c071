"""Crop, resize and flip of a whole batch, each image by its own box, as matrix products.

Resizing along one axis is linear, so it is a matrix with one row for each output pixel; crop and flip only
choose which columns and which order. One image is then `down @ image @ across.T`, and a batch is two batched
products: no kernel of our own, the same definition on every device.

Dimension key: B images · C channels · H W source pixels · Y X output pixels · T taps of the kernel
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CUBIC_A = (
    -0.5
)  # Keys' cubic as Pillow and torch's antialiased bicubic have it (torch's plain bicubic has -0.75)
_CUBIC_SUPPORT = 2.0


def crop_and_resize(
    images_BCHW: Tensor,
    boxes_B4: NDArray[np.float64],
    *,
    size_px: int,
    flip_B: NDArray[np.bool_] | None = None,
) -> Tensor:
    """Cuts a box out of each image and resizes it to a square: bicubic, antialiased, optionally mirrored.

    Only pixels that the box touches are read, as when the crop is made first (torchvision), and not the
    neighbourhood outside of it. Values may overshoot the source's range by the cubic's lobes: clamp
    afterwards.

    Args:
        images_BCHW: uint8 or float, any number of channels.
        boxes_B4: top, left, height, width in pixels of these images; fractions allowed.
        size_px: Both sides of the output.
        flip_B: Which images to mirror left to right; None: none.

    Returns:
        float32 [B, C, size_px, size_px] in the source's units.
    """
    height_px, width_px = images_BCHW.shape[-2:]
    tops, lefts, heights, widths = boxes_B4.T
    down_BYH = resize_matrix(tops, heights, size_px=size_px, source_px=height_px, device=images_BCHW.device)
    across_BXW = resize_matrix(lefts, widths, size_px=size_px, source_px=width_px, device=images_BCHW.device)
    if flip_B is not None and flip_B.any():
        flip = torch.from_numpy(flip_B).to(images_BCHW.device)
        across_BXW = torch.where(flip[:, None, None], across_BXW.flip(1), across_BXW)
    if images_BCHW.device.type == "cpu":
        return _window_by_window(images_BCHW, down_BYH, across_BXW, boxes_B4)
    return separable(images_BCHW.to(torch.float32), down_BYH, across_BXW)


def resize_matrix(
    starts_B: NDArray[np.float64],
    extents_B: NDArray[np.float64],
    *,
    size_px: int,
    source_px: int,
    device: torch.device,
) -> Tensor:
    """The matrices that resize [start, start + extent) of a line of `source_px` pixels to `size_px` pixels.

        for each output pixel o:
            centre = start + (o + 0.5) * scale                      with scale = extent / size_px
            weight[o, p] = cubic((p + 0.5 - centre) / max(scale, 1)) for pixels p that the interval touches
            weight[o] /= sum of weight[o]

    Args:
        starts_B: Where each interval begins, in source pixels.
        extents_B: Its length, above 0.
        size_px: Output pixels.
        source_px: Length of the source line.
        device: Where the result is wanted.

    Returns:
        float32 [B, size_px, source_px]; each row sums to 1.
    """
    scales_B = extents_B / size_px
    taps = math.ceil(2 * _CUBIC_SUPPORT * max(float(scales_B.max()), 1.0)) + 1
    # 1e-6 px: an edge at 5.0000000001 is meant to be at 5, and touches no sixth pixel.
    bounds_B = np.stack([np.floor(starts_B + 1e-6), np.ceil(starts_B + extents_B - 1e-6)])
    parameters = np.stack([starts_B, scales_B, *bounds_B]).astype(np.float32)
    start, scale, lower, upper = torch.from_numpy(parameters).to(device)[:, :, None, None].unbind(0)
    stretch = scale.clamp_min(1.0)  # the kernel widens when shrinking: that is the antialiasing

    outputs_Y1 = torch.arange(size_px, device=device, dtype=torch.float32)[:, None]
    taps_T = torch.arange(taps, device=device, dtype=torch.float32)
    centres_BY1 = start + (outputs_Y1 + 0.5) * scale
    pixels_BYT = torch.ceil(centres_BY1 - _CUBIC_SUPPORT * stretch - 0.5) + taps_T
    weights_BYT = _cubic((pixels_BYT + 0.5 - centres_BY1) / stretch)
    weights_BYT = weights_BYT * ((pixels_BYT >= lower) & (pixels_BYT < upper))
    weights_BYT = weights_BYT / weights_BYT.sum(dim=-1, keepdim=True)

    matrix = torch.zeros(len(starts_B), size_px, source_px, device=device)
    # Taps outside of the line have weight 0: clamped, they add nothing to the pixel at the edge.
    return matrix.scatter_add_(2, pixels_BYT.clamp(0, source_px - 1).long(), weights_BYT)


def separable(images_BCHW: Tensor, down_BYH: Tensor, across_BXW: Tensor) -> Tensor:
    """Applies a matrix along each axis of each image: `down @ image @ across.T`.

    Args:
        images_BCHW: float32.
        down_BYH: What becomes of the rows.
        across_BXW: What becomes of the columns.

    Returns:
        float32 [B, C, Y, X].
    """
    batch, channels, height, width = images_BCHW.shape
    lines = images_BCHW.reshape(batch, channels * height, width)
    across_BCHX = torch.bmm(lines, across_BXW.mT).view(batch, channels, height, -1)
    # One product for each channel: broadcasting the matrices over channels would copy them.
    return torch.stack([torch.bmm(down_BYH, channel_BHX) for channel_BHX in across_BCHX.unbind(1)], dim=1)


def _window_by_window(
    images_BCHW: Tensor, down_BYH: Tensor, across_BXW: Tensor, boxes_B4: NDArray[np.float64]
) -> Tensor:
    """`separable` on each image's own box: on a CPU a product costs by its size, not by its launch."""
    height_px, width_px = images_BCHW.shape[-2:]
    tops, lefts = np.floor(boxes_B4[:, :2] + 1e-6).astype(int).clip(0).T.tolist()
    ends = np.ceil(boxes_B4[:, :2] + boxes_B4[:, 2:] - 1e-6).astype(int)
    bottoms, rights = ends.clip(None, [height_px, width_px]).T.tolist()
    channels = images_BCHW.shape[1]
    resized = torch.empty(len(images_BCHW), channels, down_BYH.shape[1], across_BXW.shape[1])
    for row, (top, left, bottom, right) in enumerate(zip(tops, lefts, bottoms, rights, strict=True)):
        window_CHW = images_BCHW[row, :, top:bottom, left:right].to(torch.float32)
        lines = window_CHW.reshape(channels * (bottom - top), right - left)
        across_CHX = (lines @ across_BXW[row, :, left:right].T).view(channels, bottom - top, -1)
        torch.matmul(down_BYH[row, :, top:bottom], across_CHX, out=resized[row])
    return resized


def _cubic(distances: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, zero from a distance of 2 on (Keys 1981, eq. 4)."""
    near = distances.abs().clamp_max(_CUBIC_SUPPORT)
    inside = ((_CUBIC_A + 2) * near - (_CUBIC_A + 3)) * near * near + 1
    outside = _CUBIC_A * (((near - 5) * near + 8) * near - 4)
    return torch.where(near < 1, inside, outside)
