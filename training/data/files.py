"""Files that are read by ranges, on this machine or at any address that fsspec knows.

A file is looked at once, when the data is opened. That it is gone or another one later is an error that names
it, as the run would no longer be the one that it began as; a server that does not answer is asked again.
"""

import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar, cast

from fsspec import AbstractFileSystem
from fsspec.core import split_protocol, url_to_fs
from fsspec.registry import known_implementations

from training.data.addresses import Where, expanded, is_pattern
from training.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

WAITS_S = (0.5, 1.0, 2.0, 4.0)  # before each further try
_BLOCK_BYTES = 4 * 2**20  # of a remote file that is read through: twenty of them hide the way to a server
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_PACKAGES |= {
    "http": "fsspec[http]",
    "https": "fsspec[http]",
    "hf": "huggingface_hub",
    "sftp": "fsspec[sftp]",
}
# What stores call the thing that changes with a file's content.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "content_hash")
Result = TypeVar("Result")


class StoredFile(Protocol):
    """A file that holds many images."""

    @property
    def where(self) -> str:
        """Path or address, for messages."""
        ...

    @property
    def name(self) -> str:
        """The last part of it."""
        ...

    @property
    def size_bytes(self) -> int:
        """When it was looked at."""
        ...

    @property
    def stamp(self) -> str:
        """What changes when its content may have changed: its size, with its time or version."""
        ...

    def read(self, offset: int, size: int) -> bytes:
        """A range of it. Called from several threads.

        Raises:
            OSError: This range cannot be read, and others may be.
            DataError: The file is gone, is another one now, or cannot be reached.
        """
        ...

    def open(self) -> BinaryIO:
        """All of it, to be sought and read in; its reads raise what `read` raises.

        Raises:
            DataError: The file is gone, or is another one now.
        """
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine."""

    path: Path
    size_bytes: int
    time_ns: int

    @property
    def where(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.name

    @property
    def stamp(self) -> str:
        """Size and time."""
        return f"{self.size_bytes} {self.time_ns}"

    def read(self, offset: int, size: int) -> bytes:
        """A range of it; see `StoredFile.read`."""
        with self.open() as file:
            return os.pread(file.fileno(), size, offset)

    def open(self) -> BinaryIO:
        """All of it; see `StoredFile.open`."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError as error:
            raise _gone(self.where) from error
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size_bytes, self.time_ns):
            file.close()
            raise _changed(self.where, self.size_bytes, status.st_size)
        return file


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address; `path` is what its file system calls it."""

    where: str
    files: AbstractFileSystem
    path: str
    size_bytes: int
    version: str

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def stamp(self) -> str:
        """Size, and the version or time that the store tells, where it tells one."""
        return f"{self.size_bytes} {self.version}"

    def read(self, offset: int, size: int) -> bytes:
        """A range of it; see `StoredFile.read`."""
        if not size:
            return b""
        content = cast(
            bytes,
            _retried(self.where, lambda: self.files.cat_file(self.path, start=offset, end=offset + size)),
        )
        if len(content) < size:
            now = described(self.where, self.files, self.path).size_bytes
            raise _changed(self.where, self.size_bytes, now)
        if len(content) > size:
            raise DataError(
                f"the server of {self.where} gives the whole file where a part is asked for: use one that "
                "knows ranges, or copy the file to this machine"
            )
        return content

    def open(self) -> BinaryIO:
        """All of it, fetched block by block; see `StoredFile.open`."""
        return cast(BinaryIO, io.BufferedReader(_Ranges(self), _BLOCK_BYTES))


class _Ranges(io.RawIOBase):
    """A remote file as a stream, each read of which is a range, tried again like any other."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size_bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        size = max(0, min(len(view), self._file.size_bytes - self._position))
        view[:size] = self._file.read(self._position, size)
        self._position += size
        return size


def files_at(where: Where, suffixes: Sequence[str]) -> list[StoredFile]:
    """The files that a path or an address means: itself; those of its braces, pattern or folder, sorted.

    Args:
        where: Of a file that ends in one of the suffixes, of several (`train-{000..099}.tar`, `*.tar`), or of
            a folder of them.
        suffixes: Such as `.tar`; of a folder's files only these count.

    Returns:
        Nothing if it means none.

    Raises:
        DataError: A file that is named is not there or cannot be reached, or its protocol is not installed.
    """
    return [file for each in expanded(where) for file in _files_at(each, suffixes)]


def _files_at(where: Where, suffixes: Sequence[str]) -> list[StoredFile]:
    if isinstance(where, Path):
        return [local_file(path) for path in _local_paths(where, suffixes)]
    files, path = file_system(where)
    if is_pattern(where):
        paths = sorted(cast(list[str], _retried(where, lambda: files.glob(path))))
    elif where.split("?")[0].endswith(tuple(suffixes)):
        return [described(where, files, path)]
    else:
        inside = cast(list[str], _retried(where, lambda: files.find(path, maxdepth=2)))
        paths = sorted(found for found in inside if found.endswith(tuple(suffixes)))
    return [described(files.unstrip_protocol(found), files, found) for found in paths]


def _local_paths(where: Path, suffixes: Sequence[str]) -> list[Path]:
    if is_pattern(where):
        # Signs in the name of a folder that is there are just its name.
        in_folder = where.parent.is_dir()
        paths = where.parent.glob(where.name) if in_folder else map(Path, glob(str(where), recursive=True))
        return sorted(path for path in paths if path.name.endswith(tuple(suffixes)))
    if where.is_dir():
        return sorted(path for path in where.iterdir() if path.name.endswith(tuple(suffixes)))
    return [where] if where.name.endswith(tuple(suffixes)) else []


def local_file(path: Path) -> LocalFile:
    """Looks at a file on this machine.

    Raises:
        DataError: It is not there.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the name") from error
    return LocalFile(path, status.st_size, status.st_mtime_ns)


def file_system(address: str) -> tuple[AbstractFileSystem, str]:
    """What reads an address, and what it calls the file.

    Raises:
        DataError: There is no such protocol, or the package that speaks it is not installed.
    """
    protocol = split_protocol(address)[0] or "file"
    try:
        files, path = url_to_fs(address)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "")
        how = f"pip install '{package}'" if package else str(error)
        raise DataError(f"{address} needs a package that is not installed: {how}") from error
    except ValueError as error:
        known = ", ".join(f"{name}://" for name in _PACKAGES if name in known_implementations)
        raise DataError(
            f"there is no protocol {protocol}://, of {address}: give a path or one of {known}"
        ) from error
    return files, str(path)


def described(where: str, files: AbstractFileSystem, path: str) -> RemoteFile:
    """Looks at a remote file.

    Raises:
        DataError: It is not there, or cannot be reached.
    """
    told = cast(dict[str, Any], _retried(where, lambda: files.info(path)))
    if told.get("size") is None:
        raise DataError(f"the server of {where} does not say how large it is: copy it to this machine")
    version = next((str(told[key]) for key in _VERSIONS if told.get(key)), "")
    return RemoteFile(where, files, path, int(told["size"]), version)


def _retried(where: str, action: Callable[[], Result]) -> Result:
    """Does something at a distance; what may pass by itself is tried again, a few times."""
    for wait_s in (*WAITS_S, None):
        try:
            return action()
        except FileNotFoundError as error:
            raise _gone(where) from error
        except PermissionError as error:
            raise DataError(f"{where} may not be read: check the credentials of this machine") from error
        except Exception as error:  # each store's client raises its own
            if wait_s is None:
                words = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise DataError(
                    f"{where} cannot be reached, {len(WAITS_S) + 1} tries in {sum(WAITS_S):g} seconds "
                    f"({words}): check the address and the connection, and go on with --resume"
                ) from error
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _gone(where: str) -> DataError:
    return DataError(f"{where} is not there: check the name, or put it back and go on with --resume")


def _changed(where: str, before_bytes: int, now_bytes: int) -> DataError:
    return DataError(
        f"{where} has changed since it was opened (it had {before_bytes:,} bytes and has {now_bytes:,}): put "
        "the old file back and go on with --resume, or start a new run"
    )
