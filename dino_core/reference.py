"""Pictures that everybody can draw, bit for bit, to see whether a model still computes what it did.

Made by integer arithmetic alone, so that no library's rounding or random numbers come into it. Their content
means nothing; it has edges, gradients, texture and flat parts at several scales, so that a wrong resize, a
wrong channel order or a wrong weight shows.

Dimension key: C channels · H W pixels
"""

from collections.abc import Callable

import torch
from torch import Tensor

# One side longer in turn, one square, one smaller than most inputs: the resize works in both directions.
SIZES_HW = ((320, 240), (240, 400), (256, 256), (96, 128))


def reference_pictures(channels: int = 3) -> list[Tensor]:
    """Draws the pictures.

    Args:
        channels: How many; the first three are the same for any number.

    Returns:
        Eight uint8 [channels, H, W], the same on every machine and for every version of the bundle format.
    """
    patterns: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda y, x: x * 255 // 399 + 0 * y,  # a ramp
        lambda y, x: (x // 24 + y // 24) % 2 * 255,  # a chessboard
        lambda y, x: x ^ y,  # squares within squares
        lambda y, x: (x * x + y * y) // 64,  # rings, ever finer
        lambda y, x: x * y // 37,
        lambda y, x: _scrambled(y // 8 * 4096 + x // 8),  # coloured tiles
        lambda y, x: _scrambled(y * 4096 + x),  # noise
        lambda y, x: ((x - 120) ** 2 + (y - 90) ** 2 < 60**2) * 160 + y // 4,  # a disc before a ramp
    )
    return [
        _draw(pattern, *SIZES_HW[index % len(SIZES_HW)], channels=channels)
        for index, pattern in enumerate(patterns)
    ]


def _draw(
    pattern: Callable[[Tensor, Tensor], Tensor], height_px: int, width_px: int, *, channels: int
) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height_px), torch.arange(width_px), indexing="ij")
    # The channels are views of one pattern: as it is, shifted, turned around, then shifted ever further.
    views = [pattern(y, x), pattern(y + 31, x + 17), 255 - pattern(x, y)]
    views += [pattern(y + 31 * number, x + 17 * number) for number in range(3, channels)]
    return torch.stack([view % 256 for view in views[:channels]]).to(torch.uint8)


def _scrambled(values: Tensor) -> Tensor:
    """Mixes the bits of small numbers with a 32-bit generator's constants; int64 never overflows here."""
    mixed = (values * 1_664_525 + 1_013_904_223) % 2**32
    mixed = ((mixed ^ (mixed >> 15)) * 747_796_405) % 2**32
    return (mixed >> 24) % 256
