"""What the values of a data set are, measured on some of its images: range, mean and spread of each channel.

Dimension key: P pixels of the sample · C channels
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_core.errors import ImageError
from dino_core.planes import Planes, eight_bit_planes, is_raw, read_planes, scaled
from dino_core.preprocess import decode
from dino_core.randomness import shuffled
from training.data.images import Images, UnreadableImage
from training.errors import DataError
from training.machine import usable_cores

SAMPLE_IMAGES = 256
PERCENTILES = (0.1, 99.9)  # what lies beyond is clipped: single hot pixels would take all levels otherwise
_SAMPLE_VALUES = 3 * 64 * 64  # of each image
_DRAW = 0  # the seed of the sample, whatever the run's: the same data has the same statistics


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """Of a sample of a data set.

    Attributes:
        images: How many were read.
        planes: How values become 0 … 255; None for RGB pictures.
        mean: Of each channel after that, in units of 0 to 1.
        std: As mean.
    """

    images: int
    planes: Planes | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def holds_planes(images: Images, *, channels: int) -> bool:
    """Whether images are read as planes: the network takes no RGB, or they are .npy or TIFF."""
    if channels != 3:
        return True
    try:
        return is_raw(images.read(0))
    except (OSError, UnreadableImage):
        return False


def channel_statistics(images: Images, *, channels: int, as_planes: bool) -> ChannelStatistics:
    """Measures some images from all over the data, the same ones each time.

    Files of 8 bits are not scaled; of others a channel's 0.1st percentile becomes 0 and its 99.9th 255.

    Args:
        images: The data set.
        channels: That the network takes.
        as_planes: Whether they are read by `dino_core.planes`.

    Raises:
        DataError: None of them can be read, or they have other channels.
    """
    chosen = shuffled(len(images), seed=_DRAW, epoch=0)[:SAMPLE_IMAGES].tolist()

    def read(index: int) -> NDArray[np.generic] | str:
        try:
            content = images.read(index)
            values_HWC = (
                read_planes(content, channels=channels)
                if as_planes
                else decode(content, shorter_side_px=64).permute(1, 2, 0).numpy()
            )
        except ImageError as error:
            return error.title
        except (OSError, UnreadableImage) as error:
            return str(error)
        stride = max(1, round((values_HWC.size / _SAMPLE_VALUES) ** 0.5))
        return values_HWC[::stride, ::stride].reshape(-1, values_HWC.shape[2])

    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="measure") as pool:
        found = list(pool.map(read, chosen))
    arrays = [values for values in found if not isinstance(values, str)]
    fitting = [values for values in arrays if values.shape[1] == channels]
    if not fitting:
        raise DataError(_none_fits(images, chosen, found, arrays, channels))
    planes = _planes_of(fitting, channels) if as_planes else None
    levels_PC = (
        np.concatenate([scaled(values, planes or eight_bit_planes(channels)) for values in fitting]) / 255.0
    )
    return ChannelStatistics(
        images=len(fitting),
        planes=planes,
        mean=_rounded(levels_PC.mean(axis=0)),
        # A channel that is the same everywhere has a spread of one level, as it must not be 0.
        std=_rounded(np.maximum(levels_PC.std(axis=0), 1 / 255)),
    )


def _planes_of(values: Sequence[NDArray[np.generic]], channels: int) -> Planes:
    if all(each.dtype == np.uint8 for each in values):
        return eight_bit_planes(channels)
    low_C, high_C = np.nanpercentile(np.concatenate(values).astype(np.float64), PERCENTILES, axis=0)
    low = _rounded(low_C)
    high = tuple(
        top if top > bottom else bottom + 1.0 for bottom, top in zip(low, _rounded(high_C), strict=True)
    )
    return Planes(channels=channels, low=low, high=high)


def _none_fits(
    images: Images,
    chosen: Sequence[int],
    found: Sequence[NDArray[np.generic] | str],
    arrays: Sequence[NDArray[np.generic]],
    channels: int,
) -> str:
    if not arrays:
        first = f"{images.names[chosen[0]]}: {found[0]}"
        return f"none of {len(chosen)} images in {images.origin} can be read; {first}"
    most = Counter(values.shape[1] for values in arrays).most_common(1)[0][0]
    return (
        f"the images in {images.origin} have {most} channels and the network takes {channels}: give "
        f"--backbone.in-channels {most}"
    )


def _rounded(values_C: NDArray[np.float64]) -> tuple[float, ...]:
    """Six digits, so that a settings file can be read."""
    return tuple(float(f"{value:.6g}") for value in values_C.tolist())
