"""What a user names as data -> the images to train on, and those to measure with.

photos/             a folder, nested or flat; with train/ and val/ in it, val/ measures
photos.txt          a list of files; .csv and .tsv with a column `path`, too
shards/             a folder of tar files; photos.tar, and patterns like shards/train-*.tar, too
s3://bucket/train-{000..099}.tar    tar files at any address that fsspec knows
"""

from pathlib import Path

from training.data.addresses import Where, is_pattern
from training.data.files import files_at
from training.data.folder import find_images
from training.data.images import Images
from training.data.listing import LIST_SUFFIXES, listed_images
from training.data.shards import shard_images
from training.errors import DataError


def open_split(data: Where, val_data: Where | None = None) -> tuple[Images, Images | None]:
    """Opens data: `train/` and `val/` of a folder that has both, else all of it.

    Args:
        data: What the user names.
        val_data: What to measure with, in place of `val/`.

    Returns:
        The images to train on, and those to measure with, if there are any.

    Raises:
        DataError: There is no image; the message says what was looked for.
    """
    trained: Where = data
    measured = val_data
    if isinstance(data, Path) and (data / "train").is_dir() and (data / "val").is_dir():
        trained, measured = data / "train", val_data or data / "val"
    return open_images(trained), open_images(measured) if measured is not None else None


def open_images(data: Where) -> Images:
    """Opens a folder, a list or shards.

    Raises:
        DataError: There is no image in it.
    """
    if isinstance(data, Path) and data.suffix in LIST_SUFFIXES and not data.is_dir():
        return listed_images(data)
    shards = files_at(data, (".tar",))
    holds_others = isinstance(data, Path) and any(path.suffix != ".tar" for path in data.glob("*"))
    if shards and not holds_others:
        return shard_images(shards, origin=str(data))
    if isinstance(data, str) or (not shards and is_pattern(data)):
        raise DataError(f"no file fits {data}: give tar files, such as shards/train-*.tar")
    return find_images(data)
