"""The data directory: who owns it, and whether the database in it is one of ours."""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from app.errors import DirectoryInUse, StorageError
from app.search.embedded.schema import APPLICATION_ID, CREATE, SCHEMA_VERSION

DATABASE_NAME: Final = "collections.sqlite"
LOCK_NAME: Final = "lock"
_NOT_FOR_WRITING: Final = "can't be opened for writing: check the data directory's owner and permissions"

# Five vectors of 384 float32 fill 7,710 of 8,192 bytes; in pages of 4,096 two would leave a quarter unused.
_PAGE_BYTES = 8_192
_MIN_SQLITE = (3, 38, 0)  # the first with JSON built in and strict tables


class Damage(sqlite3.DatabaseError):
    """What SQLite doesn't notice: a vector that is none, say."""

    sqlite_errorname = "SQLITE_CORRUPT"


def is_damage(error: StorageError) -> bool:
    """Whether the database is damaged, and not full, held or forbidden."""
    name = getattr(error.__cause__, "sqlite_errorname", "")
    return isinstance(error.__cause__, sqlite3.Error) and name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


@contextlib.contextmanager
def storage_errors() -> Iterator[None]:
    """Turns what SQLite and the file system say into a StorageError with a sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(_sentence(error)) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(f"the data directory could not be used: {reason}") from error


_SENTENCES: Final = {
    "SQLITE_FULL": "the disk of the data directory is full; nothing was changed",
    "SQLITE_CORRUPT": f"{DATABASE_NAME} is damaged (cut short, or overwritten)",
    "SQLITE_NOTADB": f"{DATABASE_NAME} is damaged (cut short, or overwritten)",
    "SQLITE_IOERR": "the disk failed, is full, or allows no larger files; nothing was changed",
    "SQLITE_READONLY": f"{DATABASE_NAME} {_NOT_FOR_WRITING}",
    "SQLITE_CANTOPEN": f"{DATABASE_NAME} {_NOT_FOR_WRITING}",
    "SQLITE_PERM": f"{DATABASE_NAME} {_NOT_FOR_WRITING}",
    "SQLITE_BUSY": f"{DATABASE_NAME} is held by another program; close it and try again",
}


def _sentence(error: sqlite3.Error) -> str:
    if isinstance(error, Damage):
        return f"{DATABASE_NAME} is damaged: {error}"
    name = getattr(error, "sqlite_errorname", "") or type(error).__name__
    for beginning, sentence in _SENTENCES.items():
        if name.startswith(beginning):
            return sentence
    return f"the database of the collections failed ({name}); nothing was changed"


def lock_directory(path: Path) -> int:
    """Makes the directory if need be, and takes it for this process.

    Returns:
        A file descriptor; the directory is ours until it is closed or the process ends, however it ends.

    Raises:
        DirectoryInUse: Another process, or another part of this one, has it.
        StorageError: It can't be made or written.
    """
    if path.exists() and not path.is_dir():
        raise StorageError(f"the data directory {path} is a file; name a directory")
    with storage_errors():
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = _read_pid(descriptor)
        os.close(descriptor)
        holder = f"process {pid}" if pid else "another process"
        raise DirectoryInUse(
            f"the data directory {path} is in use by {holder}: stop it, send your requests to it, "
            "or name another directory",
            pid=pid,
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _read_pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).decode("ascii", errors="replace")
    return int(text) if text.isdecimal() else None


def prepare_database(directory: Path) -> Path:
    """Finds the database of a directory, or makes it; call it with the directory locked.

    Returns:
        The path of a database that is ours by its header. Whether it is whole, only reading it tells.

    Raises:
        StorageError: It is cut short, another program's, of a newer version, or only half of it was copied.
    """
    if sqlite3.sqlite_version_info < _MIN_SQLITE:
        least = ".".join(map(str, _MIN_SQLITE))
        raise StorageError(f"Python's SQLite is {sqlite3.sqlite_version}; at least {least} is needed")
    path = directory / DATABASE_NAME
    with storage_errors():
        if path.exists():
            _check_header(path)
        else:
            _refuse_orphaned_journal(path)
            _create_database(path)
    return path


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(100)
    if header[:16] != b"SQLite format 3\0"[: len(header)]:
        raise StorageError(
            f"{path} is not a SQLite database; name a directory of collections, or an empty one"
        )
    if len(header) < 100:
        raise StorageError(f"{path} is cut short: it has {len(header)} bytes; restore it from a copy")
    application_id = int.from_bytes(header[68:72], "big")
    version = int.from_bytes(header[60:64], "big")
    if application_id != APPLICATION_ID:
        raise StorageError(f"{path} is the database of another program; name another directory")
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"{path} was written by a newer dinoserve (schema {version}; this one reads up to "
            f"{SCHEMA_VERSION}): upgrade dinoserve"
        )


def _refuse_orphaned_journal(path: Path) -> None:
    journal = path.with_name(f"{DATABASE_NAME}-wal")
    if journal.exists() and journal.stat().st_size > 0:
        raise StorageError(
            f"{path} is missing, but its journal {journal.name} is here: was the directory copied in part? "
            "Copy both files, with the service stopped"
        )


def _create_database(path: Path) -> None:
    # Made beside and renamed, so that a file of this name is always whole, and an empty one is always damage.
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    connection = sqlite3.connect(new, isolation_level=None)
    try:
        connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(f"BEGIN; {CREATE} COMMIT;")
    finally:
        connection.close()
    os.replace(new, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Waits until the names in a directory are on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
