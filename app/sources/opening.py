"""What was named on a command line to the source that it is, or the several."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from app.sources.folder import FolderSource
from app.sources.listing import LIST_SUFFIXES, ListSource
from app.sources.parquet import ParquetSource, is_parquet
from app.sources.picture import Entry, NoPictures, Source, clean, is_image_name
from app.sources.tar import TarSource, is_tar

_WHAT_IS_TAKEN = (
    "a folder, a tar file (also compressed), a Parquet file, or a list: .txt with a path on each line, .csv "
    "or .jsonl with a column `path`"
)


class Sources:
    """Several sources, one after the other.

    Args:
        sources: At least one.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    @property
    def description(self) -> str:
        """What they are, for people."""
        first = self._sources[0].description
        return first if len(self._sources) == 1 else f"{first} and {len(self._sources) - 1:,} more"

    def count(self) -> int | None:
        """How many pictures there are, where each source can tell.

        Raises:
            NoPictures: One has none.
        """
        counts = [source.count() for source in self._sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        """The pictures; see `Source.entries`."""
        for source in self._sources:
            yield from source.entries(max_image_bytes=max_image_bytes)


def open_sources(paths: Sequence[Path]) -> Sources:
    """Finds out what was named; nothing but the beginning of a file is read for it.

    Args:
        paths: At least one.

    Raises:
        NoPictures: One is not there, can't be read, or is nothing that pictures come in.
    """
    return Sources([_open_source(path) for path in paths])


def _open_source(path: Path) -> Source:
    if path.is_dir():
        return FolderSource(path)
    if not path.exists():
        raise NoPictures(f"{path} does not exist; name {_WHAT_IS_TAKEN}")
    if is_parquet(path):
        return ParquetSource(path)
    if path.suffix.lower() in LIST_SUFFIXES:
        return ListSource(path)
    if is_tar(path):
        return TarSource(path)
    what = "a picture: name its folder" if is_image_name(path.name) else "nothing that pictures come in"
    raise NoPictures(f"{clean(str(path))} is {what}; what is taken is {_WHAT_IS_TAKEN}")
