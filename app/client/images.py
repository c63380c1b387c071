"""Images as a client takes them, files or their bytes, and as requests carry them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

PICTURE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff")

Image = bytes | Path


def bytes_of(image: Image) -> bytes:
    """An image's file.

    Raises:
        OSError: It can't be read.
    """
    return image.read_bytes() if isinstance(image, Path) else image


def image_parts(images: Iterable[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Files as parts of a form, as httpx takes them."""
    return [("images", ("image", data, "application/octet-stream")) for data in images]


def pictures_below(folder: Path) -> list[Path]:
    """The pictures in a folder and below it, by their suffix, in order of path.

    Raises:
        NotADirectoryError: It is no folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
