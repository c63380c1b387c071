"""What tests ask of sources."""

from pathlib import Path

from app.sources.picture import FailedPicture, Picture, Source

ENOUGH_BYTES = 2**20


def taken(source: Source) -> list[Picture]:
    """The pictures of a source, none of which fails."""
    entries = list(source.entries(max_image_bytes=ENOUGH_BYTES))
    pictures = [entry for entry in entries if isinstance(entry, Picture)]
    assert len(pictures) == len(entries), entries
    return pictures


def failures(source: Source) -> list[FailedPicture]:
    """What fails of a source."""
    return [
        entry for entry in source.entries(max_image_bytes=ENOUGH_BYTES) if isinstance(entry, FailedPicture)
    ]


def write(root: Path, **files: str) -> None:
    """Files of a text each, in folders that are made."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
