"""A folder of pictures, flat or nested.

Only the names of one folder at a time are in memory, and nothing but names: a folder of a million files takes
some 80 MB, a tree of a million files in many folders next to nothing.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from app.client.items import Failure
from app.sources.picture import (
    IMAGE_SUFFIXES,
    Entry,
    FailedPicture,
    NoPictures,
    clean,
    file_entry,
    id_of,
    is_image_name,
    path_metadata,
)


class FolderSource:
    """Every picture below a folder, in order of path; names that begin with a dot are passed over.

    Links to folders are followed, but not in circles.

    Args:
        root: The folder.

    Raises:
        NoPictures: It isn't one.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise NoPictures(f"{root} {what}; name a folder of pictures")
        self._root = root

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"the folder {self._root}"

    def count(self) -> int:
        """How many pictures there are below it.

        Raises:
            NoPictures: None; the message says what else there is.
        """
        others: Counter[str] = Counter()
        count = 0
        for found in _walk(self._root, "", inside=frozenset(), others=others):
            if isinstance(found, FailedPicture):
                others[f"folder that can't be read ({found.where})"] += 1
            else:
                count += 1
        if not count:
            listed = ", ".join(f"{n} {kind}" for kind, n in others.most_common(4)) or "no files"
            raise NoPictures(
                f"no pictures below {self._root}: looked for {', '.join(IMAGE_SUFFIXES)}; found {listed}"
            )
        return count

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        """The pictures; see `Source.entries`."""
        del max_image_bytes  # nothing is held
        for found in _walk(self._root, "", inside=frozenset(), others=Counter()):
            if isinstance(found, FailedPicture):
                yield found
            else:
                yield file_entry(self._root / found, id=id_of(found), metadata=path_metadata(found))


def _walk(
    folder: Path, prefix: str, *, inside: frozenset[tuple[int, int]], others: Counter[str]
) -> Iterator[str | FailedPicture]:
    """Paths below the folder, with slashes; a folder that can't be read in its place.

    Args:
        folder: To walk.
        prefix: Of its paths.
        inside: The folders that it is in, to notice circles.
        others: Counts the suffixes of what is no picture.
    """
    try:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in inside:
            return
        with os.scandir(folder) as listing:
            names = _wanted_names(listing, others)
    except OSError as error:
        title = f"the folder can't be read: {error.strerror}"
        yield FailedPicture("", clean(str(folder)), Failure(code="unreadable_folder", title=title))
        return
    names.sort()
    for name in names:
        if name.endswith("/"):
            yield from _walk(folder / name, prefix + name, inside=inside | {here}, others=others)
        else:
            yield prefix + name


def _wanted_names(listing: "Iterator[os.DirEntry[str]]", others: Counter[str]) -> list[str]:
    """Of pictures, and of folders with a slash at their end: so the order is that of whole paths."""
    names: list[str] = []
    for entry in listing:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names.append(f"{entry.name}/")
        elif entry.is_file():
            if is_image_name(entry.name):
                names.append(entry.name)
            else:
                others[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
    return names
