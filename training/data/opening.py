"""What a user names as data -> the images to train on, and those to measure with."""

from pathlib import Path

from training.data.folder import find_images
from training.data.images import Images


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
        find_images(data / "train" if is_split else data),
        find_images(measured) if measured is not None else None,
    )
