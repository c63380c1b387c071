"""What a user names as data -> the images to train on, and those to measure with.

photos/             a folder, nested or flat; with train/ and val/ in it, val/ measures
photos.txt          a list of files; .csv and .tsv with a column `path`, too
shards/             a folder of tar files; photos.tar, and patterns like shards/train-*.tar, too
"""

from pathlib import Path

from training.data.folder import find_images
from training.data.images import Images
from training.data.listing import LIST_SUFFIXES, listed_images
from training.data.shards import shard_images, shards_in
from training.errors import DataError


def open_split(data: Path, val_data: Path | None = None) -> tuple[Images, Images | None]:
    """Opens data: `train/` and `val/` of a folder that has both, else all of it.

    Args:
        data: What the user names.
        val_data: What to measure with, in place of `val/`.

    Returns:
        The images to train on, and those to measure with, if there are any.

    Raises:
        DataError: There is no image; the message says what was looked for.
    """
    is_split = (data / "train").is_dir() and (data / "val").is_dir()
    measured = val_data or (data / "val" if is_split else None)
    return (
        open_images(data / "train" if is_split else data),
        open_images(measured) if measured is not None else None,
    )


def open_images(data: Path) -> Images:
    """Opens a folder, a list or shards.

    Raises:
        DataError: There is no image in it.
    """
    if data.suffix in LIST_SUFFIXES and not data.is_dir():
        return listed_images(data)
    shards = shards_in(data)
    if shards and not any(path.suffix != ".tar" for path in data.glob("*")):
        return shard_images(shards, origin=str(data))
    if not shards and any(sign in data.name for sign in "*?["):
        raise DataError(f"no file fits {data}: give a pattern of tar files, such as shards/train-*.tar")
    return find_images(data)
