"""Pictures in a tar file, as WebDataset packs them: members that follow each other and have one stem are one.

    a/0001.jpg    the picture; its name is its id
    a/0001.json   its metadata, an object
    a/0001.cls    its class
    a/0001.txt    its text

Nothing is ever unpacked, so that names may be what they like: they are ids, not paths. Pictures of a plain
`.tar` are read from their places, by whoever wants them; those of a compressed one come with the stream.
"""

import contextlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from lzma import LZMAError
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError  # type: ignore[attr-defined]
from typing import Final, Self

import orjson

from app.client.items import Failure
from app.search.collection import Json
from app.sources.picture import (
    Entry,
    FailedPicture,
    Picture,
    Stamp,
    clean,
    id_of,
    is_image_name,
    path_metadata,
    unreadable,
)

_WORDS: Final = (".json", ".cls", ".txt")
_MAX_WORDS_BYTES: Final = 64 * 2**10  # four times what metadata may have
# More of them under one stem are no sample, but photographs whose names happen to begin alike.
_MAX_PICTURES_OF_A_SAMPLE: Final = 16
_DAMAGE: Final = (tarfile.TarError, EOFError, zlib.error, LZMAError, OSError, ValueError, OverflowError)


@dataclass
class _Sample:
    """Members of one stem."""

    stem: str
    pictures: list[Entry] = field(default_factory=list)
    metadata: dict[str, Json] = field(default_factory=dict)
    problem: Failure | None = None

    def entries(self) -> Iterator[Entry]:
        """Its pictures, with what the other members say."""
        for entry in self.pictures:
            if isinstance(entry, Picture):
                if self.problem is not None:
                    yield FailedPicture(entry.id, entry.where, self.problem)
                    continue
                entry.metadata.update(self.metadata)
            yield entry


class _StrictTarInfo(tarfile.TarInfo):
    """TarFile takes a damaged header, or none, for the end of the file; here only zeros are the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        """Reads a member's header.

        Raises:
            ReadError: It is damaged, or missing.
        """
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(str(error)) from None


class TarSource:
    """The pictures of one tar file, plain or compressed, in the order in which they are in it.

    Args:
        path: Of the tar.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = clean(str(path))

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"the tar file {self._name}"

    def count(self) -> None:
        """Unknown: a tar has no table of contents."""
        return

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        """The pictures; see `Source.entries`. What is damaged ends the file, and is told of."""
        try:
            with self._path.open("rb") as file:
                yield from self._samples(file.fileno(), max_image_bytes=max_image_bytes)
        except _DAMAGE as error:
            yield FailedPicture("", self._name, _damage(error))

    def _samples(self, descriptor: int, *, max_image_bytes: int) -> Iterator[Entry]:
        status = os.fstat(descriptor)
        sample = _Sample("")
        damage: FailedPicture | None = None
        with contextlib.ExitStack() as stack:
            archive, is_plain = _opened(self._path, stack)
            members = _members(archive)
            while True:
                try:
                    member = next(members, None)
                    if member is None:
                        break
                    stem = _stem(member.name)
                    if stem != sample.stem or len(sample.pictures) >= _MAX_PICTURES_OF_A_SAMPLE:
                        yield from sample.entries()
                        sample = _Sample(stem)
                    if is_image_name(member.name):
                        sample.pictures.append(
                            self._entry(
                                archive, member, Stamp.of(status) if is_plain else None, max_image_bytes
                            )
                        )
                    elif member.name.lower().endswith(_WORDS) and member.isreg():
                        _take_words(sample, archive, member)
                except _DAMAGE as error:
                    damage = FailedPicture("", self._name, _damage(error))
                    break
            yield from sample.entries()
        if damage is not None:
            yield damage

    def _entry(
        self,
        archive: tarfile.TarFile,
        member: tarfile.TarInfo,
        stamp: Stamp | None,
        max_image_bytes: int,
    ) -> Entry:
        name = member.name.removeprefix("./")
        item_id, where = id_of(name), f"{self._name}#{clean(name)}"
        if not member.isreg() or member.issparse():
            what = "a link" if member.issym() or member.islnk() else "not a plain file"
            title = f"the member is {what}, which is not followed: pack the picture itself"
            return FailedPicture(item_id, where, Failure(code="unreadable_file", title=title))
        source = f"{clean(str(self._path.absolute()))}#{clean(name)}"
        metadata = path_metadata(name)
        if stamp is not None:
            place = f"{member.offset_data}+{member.size}"
            return Picture(
                id=item_id,
                where=where,
                source=source,
                metadata=metadata,
                size_bytes=member.size,
                read=partial(_read_at, self._path, member.offset_data, member.size),
                stamp=Stamp(stamp.size_bytes, stamp.mtime_ns, stamp.ctime_ns, place),
            )
        is_wanted = member.size <= max_image_bytes
        data = _content(archive, member) if is_wanted else b""
        return Picture(
            id=item_id,
            where=where,
            source=source,
            metadata=metadata,
            size_bytes=member.size,
            read=lambda: data,
            held_bytes=len(data),
        )


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar does, plain or compressed."""
    try:
        return tarfile.is_tarfile(path)
    except _DAMAGE:
        return False


def _opened(path: Path, stack: contextlib.ExitStack) -> tuple[tarfile.TarFile, bool]:
    """The archive, and whether it is plain."""
    try:
        return stack.enter_context(tarfile.open(path, "r:", tarinfo=_StrictTarInfo)), True
    except tarfile.ReadError:
        return stack.enter_context(tarfile.open(path, "r|*", tarinfo=_StrictTarInfo)), False


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members whose names begin with no dot, without the list that TarFile would keep of them."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        if not member.isdir() and not member.name.rpartition("/")[2].startswith("."):
            yield member


def _stem(name: str) -> str:
    """The path up to the first dot of its last part: `a/0001` of `a/0001.left.jpg`."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _take_words(sample: _Sample, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    name = clean(member.name.rpartition("/")[2])
    if member.size > _MAX_WORDS_BYTES:
        sample.problem = _no_metadata(f"{name} has {member.size:,} bytes; {_MAX_WORDS_BYTES:,} are read")
        return
    data = _content(archive, member)
    try:
        text = data.decode("utf-8").strip()
        if member.name.lower().endswith(".json"):
            said = orjson.loads(text)
            if not isinstance(said, dict):
                raise ValueError
            sample.metadata.update(said)
        elif member.name.lower().endswith(".cls"):
            sample.metadata["class"] = int(text) if text.isdecimal() and len(text) < 19 else text
        else:
            sample.metadata["text"] = text
    except ValueError:  # orjson's and UTF-8's errors are ValueErrors
        expected = "a JSON object" if member.name.lower().endswith(".json") else "text"
        sample.problem = _no_metadata(f"{name} is not {expected}")


def _no_metadata(reason: str) -> Failure:
    return Failure(code="invalid_metadata", title=f"the picture's metadata can't be read: {reason}")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "only plain files are read"
    data = file.read()
    if len(data) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _read_at(path: Path, offset: int, size_bytes: int) -> bytes:
    with path.open("rb") as file:
        data = os.pread(file.fileno(), size_bytes, offset)
    if len(data) < size_bytes:
        raise OSError(0, f"the tar file ends after {len(data):,} of the picture's {size_bytes:,} bytes")
    return data


def _damage(error: Exception) -> Failure:
    if isinstance(error, OSError) and error.strerror and not isinstance(error, tarfile.TarError):
        return unreadable(error)
    return Failure(
        code="damaged_tar",
        title="the file is cut short or damaged: the pictures before that place were read, and none after it",
    )
