"""Snapshots: copies of all collections in one file, and collections read back out of them.

A snapshot is a database as `schema` has it, of one moment. It is only read here, never changed, and nothing
in it is believed: its header, its pages and its vectors are checked.
"""

import contextlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from app.errors import StorageError, UnknownCollection, UnknownSnapshot
from app.search.collection import Catalogue, CollectionInfo, Item
from app.search.embedded.schema import APPLICATION_ID, SCHEMA_VERSION

SNAPSHOTS_FOLDER: Final = "snapshots"  # below a data directory
SUFFIX: Final = ".sqlite"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}\.sqlite")
_BATCH_ITEMS = 256


@dataclass(frozen=True, kw_only=True)
class SnapshotInfo:
    """What a listing says of a snapshot.

    Attributes:
        created_at: In seconds since 1970.
        collections: Those in it, in order of name; empty where it can't be read.
        problem: Why it can't be read, or None.
    """

    name: str
    size_bytes: int
    created_at: float
    collections: tuple[CollectionInfo, ...]
    problem: str | None = None


class Snapshots:
    """The snapshots in a folder. Safe to use from many threads.

    Args:
        folder: Made with the first snapshot.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def make(self, catalogue: Catalogue) -> SnapshotInfo:
        """Copies all collections, as they are at one moment, while others read and write.

        Raises:
            Unsupported: The engine has its own tool for that.
            StorageError: It can't be written.
        """
        with self._lock:
            with _writing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                for part in self._folder.glob(f".*{SUFFIX}.part"):
                    part.unlink()  # of a process that was killed while it wrote it
            path = self._free_path()
            catalogue.snapshot(path)
        return _info(path)

    def list(self) -> list[SnapshotInfo]:
        """All snapshots, the oldest first."""
        if not self._folder.is_dir():
            return []
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError, UnknownSnapshot):
                found.append(_info(self.path(path.name)))
        return sorted(found, key=lambda info: (info.created_at, info.name))

    def path(self, name: str) -> Path:
        """Where a snapshot is.

        Raises:
            UnknownSnapshot: There is none of the name, or nothing can have it.
        """
        path = self._folder / name
        if not _NAME.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise UnknownSnapshot(f"there is no snapshot {name[:128]!r}; see the list of snapshots")
        return path

    def delete(self, name: str) -> None:
        """Deletes a snapshot; who reads it at the moment reads it to its end.

        Raises:
            UnknownSnapshot: There is none of the name.
            StorageError: It can't be deleted.
        """
        path = self.path(name)
        with _writing(path):
            path.unlink(missing_ok=True)

    def _free_path(self) -> Path:
        stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        path, number = self._folder / f"{stamp}{SUFFIX}", 1
        while path.exists():
            number += 1
            path = self._folder / f"{stamp}-{number}{SUFFIX}"
        return path


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror or type(error).__name__}") from error


def _info(path: Path) -> SnapshotInfo:
    status = path.stat()
    collections: tuple[CollectionInfo, ...] = ()
    problem = None
    try:
        with SnapshotFile.open(path) as snapshot:
            collections = tuple(snapshot.collections())
    except StorageError as error:
        problem = error.title
    return SnapshotInfo(
        name=path.name,
        size_bytes=status.st_size,
        created_at=status.st_mtime,
        collections=collections,
        problem=problem,
    )


class SnapshotFile:
    """A snapshot that is read; for one thread at a time. Make it with `open`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Opens a file for as long as the block lasts; what SQLite says of it there is a StorageError.

        Raises:
            StorageError: It can't be read, or is no snapshot of ours by its header.
        """
        _check_header(path)
        # Immutable: a database in WAL mode could not be read from a folder that can't be written.
        connection = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        try:
            yield cls(path, connection)
        except sqlite3.Error as error:
            raise StorageError(_damaged(path)) from error
        finally:
            connection.close()

    def check(self) -> None:
        """Reads all pages.

        Raises:
            StorageError: The file is damaged.
        """
        (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise StorageError(_damaged(self._path))

    def collections(self) -> list[CollectionInfo]:
        """Those in it, in order of name; without successors, which are nothing whole."""
        rows = self._connection.execute(
            "SELECT name, fingerprint, dimensions, created_at,"
            " (SELECT count(*) FROM items WHERE items.cid = c.cid AND deleted_at IS NULL)"
            " FROM collections c WHERE name IS NOT NULL ORDER BY name"
        )
        return [
            CollectionInfo(
                name=name, fingerprint=fingerprint, dimensions=dimensions, created_at=created_at, items=items
            )
            for name, fingerprint, dimensions, created_at, items in rows
        ]

    def collection(self, name: str) -> CollectionInfo:
        """One of them.

        Raises:
            UnknownCollection: It has none of the name.
        """
        there = {info.name: info for info in self.collections()}
        if name not in there:
            found = ", ".join(list(there)[:12]) or "none"
            raise UnknownCollection(
                f"the snapshot {self._path.name} has no collection {name[:64]!r}; it has: {found}"
            )
        return there[name]

    def batches(self, info: CollectionInfo) -> Iterator[list[Item]]:
        """The items of a collection, with thumbnails, some at a time.

        Raises:
            StorageError: One of them is damaged.
        """
        rows = self._connection.execute(
            "SELECT i.id, i.metadata, i.sha256, i.source, v.vector, t.webp FROM items i"
            " JOIN collections c USING (cid)"
            " LEFT JOIN vectors v USING (rid) LEFT JOIN thumbnails t USING (rid)"
            " WHERE c.name = ? AND i.deleted_at IS NULL ORDER BY i.rid",
            (info.name,),
        )
        while batch := rows.fetchmany(_BATCH_ITEMS):
            yield [self._item(*row, dimensions=info.dimensions) for row in batch]

    def _item(
        self,
        item_id: str,
        metadata: str,
        sha256: str,
        source: str | None,
        vector: bytes | None,
        webp: bytes | None,
        *,
        dimensions: int,
    ) -> Item:
        if vector is None or len(vector) != 4 * dimensions:
            raise StorageError(_damaged(self._path))
        try:
            said = json.loads(metadata)
        except ValueError:
            raise StorageError(_damaged(self._path)) from None
        return Item(
            id=item_id,
            vector=np.frombuffer(vector, dtype="<f4").astype(np.float32),
            metadata=said,
            sha256=sha256,
            source=source,
            thumbnail=webp,
        )


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except OSError as error:
        raise StorageError(f"the snapshot {path} can't be read: {error.strerror}") from None
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise StorageError(f"{path} is no snapshot: it is not a SQLite database, or cut short")
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise StorageError(f"{path} is no snapshot: it is the database of another program")
    version = int.from_bytes(header[60:64], "big")
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"{path} was written by a newer dinoserve (schema {version}; this one reads up to "
            f"{SCHEMA_VERSION}): upgrade dinoserve"
        )
    journal = path.with_name(f"{path.name}-wal")
    if journal.exists() and journal.stat().st_size > 0:
        raise StorageError(
            f"{path} has a journal beside it ({journal.name}): it was copied from a directory in use, and is "
            "no snapshot. Put both into a directory of their own, and open that"
        )


def _damaged(path: Path) -> str:
    return f"the snapshot {path} is damaged (cut short, or overwritten): take another"
