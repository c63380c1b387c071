"""A picture that wants to join a collection, and one that can't; and what all sources promise."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from app.client.items import Failure
from app.search.collection import Json

IMAGE_SUFFIXES: Final = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
MAX_ID_BYTES: Final = 256
_UNFIT_FOR_ID = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class NoPictures(Exception):
    """There is nothing to add; the message says what was looked for and found."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file does, as far as a file system tells without reading it.

    The time of the last change of the inode is in it, as tools that copy can set the time of the content.

    Attributes:
        place: Where in the file the picture is; empty where it is the file.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    place: str = ""

    @classmethod
    def of(cls, status: os.stat_result, *, place: str = "") -> "Stamp":
        """The stamp of a file's status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture that wants to join.

    Attributes:
        id: Of the item that it becomes.
        where: It is, for people: a path, or a place in a file.
        source: Kept with the item.
        metadata: Kept with the item.
        size_bytes: Of its file.
        read: Gives its bytes. May be called from any thread, once; raises OSError.
        stamp: None where nothing but its bytes tells whether it has changed.
        held_bytes: That the picture keeps in memory until it is read: those that came with a stream.
    """

    id: str
    where: str
    source: str
    metadata: dict[str, Json]
    size_bytes: int
    read: Callable[[], bytes]
    stamp: Stamp | None = None
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FailedPicture:
    """A picture that could not be added, or a source that could not be read on, and why.

    Attributes:
        id: Empty where there is no picture to speak of.
        where: It is, for people.
    """

    id: str
    where: str
    failure: Failure


Entry: TypeAlias = Picture | FailedPicture


class Source(Protocol):
    """Pictures in an order that is always the same."""

    @property
    def description(self) -> str:
        """What it is, for people."""
        ...

    def count(self) -> int | None:
        """How many pictures there are; None where only reading it all would tell.

        Raises:
            NoPictures: There are none, as far as can be told.
        """
        ...

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        """The pictures, one after the other, and what can't be read in its place; never raises for them.

        Args:
            max_image_bytes: A larger picture need not be held, as nobody will take it.
        """
        ...


def id_of(relative: str) -> str:
    """The id of a file: its path, as it is wherever that can be an id.

    A path that is too long, or has characters that no id may have, keeps its end, behind a hash of the whole.
    """
    cleaned = clean(relative)
    if cleaned == relative and len(relative.encode()) <= MAX_ID_BYTES:
        return relative
    digest = hashlib.sha256(os.fsencode(relative)).hexdigest()[:16]
    end = cleaned.encode()[-(MAX_ID_BYTES - len(digest) - 1) :].decode(errors="ignore")
    return f"{digest}~{end}"


def clean(text: str) -> str:
    """Text without what no item can keep: control characters, and bytes of a path that are no UTF-8."""
    return _UNFIT_FOR_ID.sub("\N{REPLACEMENT CHARACTER}", text)


def path_metadata(relative: str) -> dict[str, Json]:
    """What a filter can ask of a path: `path`, `folder`, and `class`, the first of the folders."""
    folder, _, _ = relative.strip("/").rpartition("/")
    metadata: dict[str, Json] = {"path": clean(relative)}
    if folder:
        metadata |= {"folder": clean(folder), "class": clean(folder.partition("/")[0])}
    return metadata


def is_image_name(name: str) -> bool:
    """Whether a name has the suffix of a picture."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def file_entry(
    path: Path, *, id: str, metadata: dict[str, Json], where: str | None = None
) -> Picture | FailedPicture:
    """The picture that a file is.

    Args:
        path: Where it is.
        id: Of the item that it becomes.
        metadata: Kept with the item.
        where: For people; None for the path.
    """
    where = clean(str(path)) if where is None else where
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return FailedPicture(id, where, unreadable(error))
    if not path.is_file():
        return FailedPicture(id, where, Failure(code="unreadable_file", title="this is not a file"))
    return Picture(
        id=id,
        where=where,
        source=clean(str(path.absolute())),
        metadata=metadata,
        size_bytes=status.st_size,
        read=path.read_bytes,
        stamp=Stamp.of(status),
    )


def unreadable(error: Exception) -> Failure:
    """Why a file can't be read, in a sentence."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Failure(code="unreadable_file", title=f"the file can't be read: {reason}")
