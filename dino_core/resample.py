"""Crop, resize and flip of a whole batch, each image by its own box, as matrix products.

Resizing along one axis is linear, so it is a matrix with one row for each output pixel; crop and flip only
choose which columns and which order. One image is then `down @ image @ across.T`. A row has no more than a
handful of numbers that aren't zero, its taps: a CPU, which pays for each product, goes by them; a GPU, which
pays for each launch, takes two batched products of full matrices.

Dimension key: B images · C channels · H W source pixels · Y X output pixels · L pixels of a line, source or
output · T taps of the kernel
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_CUBIC_A = (
    -0.5
)  # Keys' cubic as Pillow and torch's antialiased bicubic have it (torch's plain bicubic has -0.75)
_CUBIC_SUPPORT = 2.0
_STRIP_PX = 64  # narrower strips have fewer zeros, and more products


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
    device = images_BCHW.device
    down = resize_taps(tops, heights, size_px=size_px, source_px=height_px, device=device)
    across = resize_taps(lefts, widths, size_px=size_px, source_px=width_px, device=device)
    if flip_B is not None and flip_B.any():
        flip_B11 = torch.from_numpy(flip_B).to(device)[:, None, None]
        across = Taps(*(torch.where(flip_B11, part.flip(1), part) for part in across))
    return resampled(images_BCHW, down, across)


class Taps(NamedTuple):
    """The numbers of matrices [B, L output, L source] that aren't zero; several may share a place."""

    pixels_BLT: Tensor
    """int64, source pixels."""
    weights_BLT: Tensor
    """float32; those of an output pixel sum to 1."""

    def matrix(self, source_px: int) -> Tensor:
        """The full matrices, float32 [B, L output, source_px]."""
        batch, outputs = self.pixels_BLT.shape[:2]
        matrix = torch.zeros(batch, outputs, source_px, device=self.weights_BLT.device)
        return matrix.scatter_add_(2, self.pixels_BLT, self.weights_BLT)


def resize_taps(
    starts_B: NDArray[np.float64],
    extents_B: NDArray[np.float64],
    *,
    size_px: int,
    source_px: int,
    device: torch.device,
) -> Taps:
    """What resizes [start, start + extent) of a line of `source_px` pixels to `size_px` pixels.

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
        As many taps for each output pixel as the longest interval needs.
    """
    scales_B = extents_B / size_px
    taps = math.ceil(2 * _CUBIC_SUPPORT * max(float(scales_B.max()), 1.0)) + 1
    # 1e-6 px: an edge at 5.0000000001 is meant to be at 5, and touches no sixth pixel.
    bounds_B = np.stack([np.floor(starts_B + 1e-6), np.ceil(starts_B + extents_B - 1e-6)])
    parameters = np.stack([starts_B, scales_B, *bounds_B]).astype(np.float32)
    start, scale, lower, upper = torch.from_numpy(parameters).to(device)[:, :, None, None].unbind(0)
    stretch = scale.clamp_min(1.0)  # the kernel widens when shrinking: that is the antialiasing

    outputs_L1 = torch.arange(size_px, device=device, dtype=torch.float32)[:, None]
    taps_T = torch.arange(taps, device=device, dtype=torch.float32)
    centres_BL1 = start + (outputs_L1 + 0.5) * scale
    pixels_BLT = torch.ceil(centres_BL1 - _CUBIC_SUPPORT * stretch - 0.5) + taps_T
    weights_BLT = _cubic((pixels_BLT + 0.5 - centres_BL1) / stretch)
    weights_BLT = weights_BLT * ((pixels_BLT >= lower) & (pixels_BLT < upper))
    weights_BLT = weights_BLT / weights_BLT.sum(dim=-1, keepdim=True)
    # Taps outside of the line have weight 0: clamped, they add nothing to the pixel at the edge.
    return Taps(pixels_BLT.clamp(0, source_px - 1).long(), weights_BLT)


def resampled(images_BCHW: Tensor, down: Taps, across: Taps) -> Tensor:
    """Resamples each image along both axes: `down @ image @ across.T`.

    Args:
        images_BCHW: uint8 or float; a CPU is fastest with float32 whose memory is in the order B, H, C, W.
        down: What becomes of the rows.
        across: What becomes of the columns.

    Returns:
        float32 [B, C, Y, X], on a CPU with memory in the order B, Y, C, X.
    """
    if images_BCHW.device.type == "cpu":
        return _resampled_by_taps(images_BCHW, down, across)
    height_px, width_px = images_BCHW.shape[-2:]
    return separable(images_BCHW.to(torch.float32), down.matrix(height_px), across.matrix(width_px))


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


def _resampled_by_taps(images_BCHW: Tensor, down: Taps, across: Taps) -> Tensor:
    """`separable`, but for the zeros.

    Down, each output row is a weighted sum of a few source rows, all channels of which lie together. Across,
    a row's pixels would have to be gathered one by one: there products of narrow strips of the matrix are
    faster.
    """
    batch, channels, height_px, width_px = images_BCHW.shape
    outputs_y, outputs_x = down.pixels_BLT.shape[1], across.pixels_BLT.shape[1]
    rows = images_BCHW.to(torch.float32).permute(0, 2, 1, 3).reshape(batch * height_px, -1)
    first_rows_B11 = torch.arange(0, batch * height_px, height_px)[:, None, None]
    lines = functional.embedding_bag(
        (down.pixels_BLT + first_rows_B11).flatten(0, 1),
        rows,
        per_sample_weights=down.weights_BLT.flatten(0, 1),
        mode="sum",
    ).view(batch, outputs_y * channels, width_px)
    matrix_BXW = across.matrix(width_px)
    resized = torch.empty(batch, outputs_y * channels, outputs_x)
    for left in range(0, outputs_x, _STRIP_PX):
        strip = slice(left, min(left + _STRIP_PX, outputs_x))
        sources = across.pixels_BLT[:, strip]
        firsts, lasts = sources.amin(dim=(1, 2)).tolist(), sources.amax(dim=(1, 2)).tolist()
        for image, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            window = slice(first, last + 1)
            torch.mm(
                lines[image, :, window], matrix_BXW[image, strip, window].T, out=resized[image, :, strip]
            )
    return resized.view(batch, outputs_y, channels, outputs_x).permute(0, 2, 1, 3)


def _cubic(distances: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, zero from a distance of 2 on (Keys 1981, eq. 4)."""
    near = distances.abs().clamp_max(_CUBIC_SUPPORT)
    inside = ((_CUBIC_A + 2) * near - (_CUBIC_A + 3)) * near * near + 1
    outside = _CUBIC_A * (((near - 5) * near + 8) * near - 4)
    return torch.where(near < 1, inside, outside)
