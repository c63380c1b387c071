"""A map of numbers as colours, over a picture or by itself: the one drawing of attention.

Dimension key: H W pixels · Y X cells of a map
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# From least to most, dark to light, so that it reads without colours too: eight points of "inferno".
_COLOURS: Final = np.array(
    [
        (0, 0, 4),
        (40, 11, 84),
        (101, 21, 110),
        (159, 42, 99),
        (212, 72, 66),
        (245, 125, 21),
        (250, 193, 39),
        (252, 255, 164),
    ],
    dtype=np.float64,
)
_SHARE_OF_HEAT: Final = 0.7  # the rest is the picture, in grey


def heat(map_YX: NDArray[np.floating], *, size_hw: tuple[int, int]) -> NDArray[np.uint8]:
    """Draws a map, stretched from its least to its most, and smoothed to a size in pixels.

    Args:
        map_YX: Finite, any scale; one that is the same everywhere is dark.
        size_hw: Of the drawing.

    Returns:
        [H, W, 3].
    """
    return _rounded(_heat(map_YX, size_hw))


def heat_over(pixels_HW3: NDArray[np.uint8], map_YX: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Draws a map over a picture, which is seen through it in grey.

    Args:
        pixels_HW3: RGB.
        map_YX: As for `heat`.

    Returns:
        [H, W, 3].
    """
    grey_HW1 = np.asarray(Image.fromarray(pixels_HW3).convert("L"), dtype=np.float64)[..., None]
    heat_HW3 = _heat(map_YX, (pixels_HW3.shape[0], pixels_HW3.shape[1]))
    return _rounded((1 - _SHARE_OF_HEAT) * grey_HW1 + _SHARE_OF_HEAT * heat_HW3)


def _heat(map_YX: NDArray[np.floating], size_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Colours from 0 to 255 [H, W, 3]."""
    low, high = float(map_YX.min()), float(map_YX.max())
    scaled_YX = ((map_YX - low) / max(high - low, 1e-12)).astype(np.float32)
    height_px, width_px = size_hw
    smooth = Image.fromarray(scaled_YX).resize((width_px, height_px), Image.Resampling.BICUBIC)
    places_HW = np.asarray(smooth).clip(0, 1) * (len(_COLOURS) - 1)
    return np.stack(
        [np.interp(places_HW, np.arange(len(_COLOURS)), channel) for channel in _COLOURS.T], axis=-1
    )


def _rounded(colours_HW3: NDArray[np.float64]) -> NDArray[np.uint8]:
    pixels_HW3: NDArray[np.uint8] = colours_HW3.round().astype(np.uint8)
    return pixels_HW3
