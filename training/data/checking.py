"""What is wrong with the images of a data set, found before a GPU's time is spent on them.

Every image that is looked at is read and decoded, as some damage shows only at the end of a file; copies are
found by the hash of their bytes.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dino_core.decoding import pillow_picture
from dino_core.errors import ImageError
from dino_core.planes import is_raw, read_planes
from dino_core.preprocess import decode, read_header
from dino_core.randomness import shuffled
from training.data.images import Images, UnreadableImage
from training.data.measuring import holds_planes
from training.machine import usable_cores

_DRAW = 0  # the seed of the sample: the same data is looked at in the same places
_AT_ONCE = 256  # images handed to the threads together: enough to keep them busy, few enough to show progress
_SHRUNK_PX = 64  # JPEGs are decoded at a fraction down to this: all of their data is read none the less


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was found.

    Attributes:
        images: Of the data.
        looked_at: How many of them were read.
        unreadable: Names, with the reason.
        duplicates: Groups of names whose files are the same, byte for byte.
        small: Names of images with a side below the crop, with width and height.
        channels: How many images have how many channels.
        odd_channels: Names of images that no network takes together with the others, with their number of
            channels; none among pictures, as grey and transparent ones become RGB.
    """

    images: int
    looked_at: int
    unreadable: dict[str, str]
    duplicates: list[list[str]]
    small: dict[str, tuple[int, int]]
    channels: dict[int, int]
    odd_channels: dict[str, int]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.unreadable or self.duplicates or self.small or self.odd_channels)

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "images": self.images,
            "looked_at": self.looked_at,
            "unreadable": self.unreadable,
            "duplicates": self.duplicates,
            "small": {name: list(size) for name, size in self.small.items()},
            "channels": {str(count): number for count, number in sorted(self.channels.items())},
            "odd_channels": self.odd_channels,
        }


@dataclass(frozen=True, kw_only=True)
class _Look:
    name: str
    problem: str | None = None
    digest: bytes = b""
    size_px: tuple[int, int] = (0, 0)
    channels: int = 0


def check_images(
    parts: Sequence[tuple[str, Images]],
    *,
    crop_px: int,
    sample: int | None,
    channels: int | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> DataReport:
    """Looks at the images of a data set.

    Args:
        parts: Images, each with what its names begin with, such as `train/` and `val/`.
        crop_px: An image with a side below it is called small.
        sample: How many to look at, over all parts, drawn with a fixed seed; None: all.
        channels: That a network takes of images that are no RGB pictures; None: as most have.
        workers: Threads; None: two for each core, as reading is waiting.
        on_progress: Told how many more are done.

    Raises:
        DataError: A file that holds many images is gone, or is another one now.
    """
    total = sum(len(images) for _, images in parts)
    looks: list[_Look] = []
    with ThreadPoolExecutor(workers or 2 * usable_cores(), thread_name_prefix="check") as pool:
        for prefix, images in parts:
            share = len(images) if sample is None else max(1, round(sample * len(images) / total))
            chosen = sorted(shuffled(len(images), seed=_DRAW, epoch=0)[:share].tolist())
            for some in _slices(chosen):
                looks += pool.map(lambda index, p=prefix, i=images: _look(i, index, p), some)
                on_progress(len(some))
    is_raw_data = holds_planes(parts[0][1], channels=channels or 3)
    return _report(looks, images=total, crop_px=crop_px, channels=channels, as_planes=is_raw_data)


def _slices(chosen: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(chosen), _AT_ONCE):
        yield chosen[start : start + _AT_ONCE]


def _look(images: Images, index: int, prefix: str) -> _Look:
    name = prefix + images.names[index]
    try:
        content = images.read(index)
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if is_raw(content):
            height_px, width_px, channels = read_planes(content).shape
        else:
            header = read_header(content)
            width_px, height_px = header.width_px, header.height_px
            with pillow_picture(content, header.format) as picture:
                channels = len(picture.getbands())
            decode(content, shorter_side_px=_SHRUNK_PX)
    except ImageError as error:
        return _Look(name=name, problem=error.title)
    except UnreadableImage as error:
        return _Look(name=name, problem=str(error))
    except OSError as error:
        return _Look(name=name, problem=error.strerror or type(error).__name__)
    return _Look(name=name, digest=digest, size_px=(width_px, height_px), channels=channels)


def _report(
    looks: Sequence[_Look], *, images: int, crop_px: int, channels: int | None, as_planes: bool
) -> DataReport:
    read = [look for look in looks if look.problem is None]
    same: defaultdict[bytes, list[str]] = defaultdict(list)
    for look in read:
        same[look.digest].append(look.name)
    counts = Counter(look.channels for look in read)
    expected = channels or (counts.most_common(1)[0][0] if counts else 0)
    return DataReport(
        images=images,
        looked_at=len(looks),
        unreadable={look.name: look.problem for look in looks if look.problem is not None},
        duplicates=[names for names in same.values() if len(names) > 1],
        small={look.name: look.size_px for look in read if min(look.size_px) < crop_px},
        channels=dict(counts),
        odd_channels={look.name: look.channels for look in read if as_planes and look.channels != expected},
    )
