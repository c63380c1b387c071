"""What a run of `index add` remembers of files: their hashes, so that the next one need not read them again.

The ledger never says what is in a collection; only the collection does. So a ledger that is lost, old, or of
another collection costs time and nothing else, and one ledger serves them all. It believes a file's size and
times, as make, git and rsync do; a file that changed in the last two seconds is not remembered, since its
times may be those of the next change, too.

A million files take 60 MB.
"""

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from app.sources.picture import Picture, Stamp

_SETTLED_AFTER_S: Final = 2.0  # the coarsest clock of a file system that is in use
_FORMAT: Final = 1
_BUSY_TIMEOUT_S: Final = 10.0


class Ledger:
    """Hashes of files, by where they are and how they were stamped. For one thread.

    Args:
        path: Made if it isn't there; made anew if it can't be read. None: nothing is remembered.
        rereads: Whether files are read again, whatever is known of them.
    """

    def __init__(self, path: Path | None, *, rereads: bool = False) -> None:
        self._connection: sqlite3.Connection | None = None
        self._rereads = rereads
        self.problem: str | None = None
        if path is None:
            return
        try:
            self._connection = _opened(path)
        except (OSError, sqlite3.Error) as error:
            # Only time is lost, and the pictures are what matters.
            self.problem = f"files are read again, as {path} can't be used: {error}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Writes what is to be remembered."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.commit()
            self._connection.close()
            self._connection = None

    def hashes(self, pictures: Sequence[Picture]) -> list[str | None]:
        """The SHA-256 of each picture's bytes, in hex, where its file has not changed since it was read."""
        if self._connection is None or self._rereads:
            return [None] * len(pictures)
        try:
            return [self._hash(self._connection, picture) for picture in pictures]
        except sqlite3.Error as error:
            self._give_up(error)
            return [None] * len(pictures)

    def _hash(self, connection: sqlite3.Connection, picture: Picture) -> str | None:
        if picture.stamp is None:
            return None
        row = connection.execute(
            "SELECT sha256 FROM files WHERE file = ? AND stamp = ?",
            (_file_key(picture, picture.stamp), _stamp_key(picture.stamp)),
        ).fetchone()
        return None if row is None else bytes(row[0]).hex()

    def remember(self, read: Iterable[tuple[Picture, str]]) -> None:
        """Keeps the hashes of pictures that were read."""
        before_ns = (time.time() - _SETTLED_AFTER_S) * 1e9
        rows = [
            (_file_key(picture, stamp), _stamp_key(stamp), bytes.fromhex(sha256))
            for picture, sha256 in read
            if (stamp := picture.stamp) is not None and max(stamp.mtime_ns, stamp.ctime_ns) < before_ns
        ]
        if self._connection is None or not rows:
            return
        try:
            self._connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", rows)
            self._connection.commit()
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> None:
        self.problem = f"the ledger of files failed ({error}): files are read again next time"
        with contextlib.suppress(sqlite3.Error):
            assert self._connection is not None
            self._connection.close()
        self._connection = None


class SeenIds:
    """The ids that a run has met, in a temporary file, so that no two pictures become one item in silence."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect("")  # on disk, nameless, gone when it is closed
        self._connection.execute("CREATE TABLE seen (id BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID")

    def close(self) -> None:
        """Forgets them."""
        self._connection.close()

    def first_place(self, item_id: str, place: str) -> str | None:
        """Where the id was met before; None where this is the first time.

        Args:
            item_id: Of a picture.
            place: Where it is, for people.
        """
        key = hashlib.blake2b(item_id.encode(errors="surrogatepass"), digest_size=16).digest()
        cursor = self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, place))
        if cursor.rowcount:
            return None
        (first,) = self._connection.execute("SELECT place FROM seen WHERE id = ?", (key,)).fetchone()
        return str(first)


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connected(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked, or not to be written: it may be whole
            raise
        path.unlink()
        return _connected(path)


def _connected(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is read again
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != _FORMAT:
            connection.execute("DROP TABLE IF EXISTS files")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS files"
            " (file BLOB PRIMARY KEY, stamp BLOB NOT NULL, sha256 BLOB NOT NULL) WITHOUT ROWID"
        )
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _file_key(picture: Picture, stamp: Stamp) -> bytes:
    said = f"{picture.source}\0{stamp.place}"
    return hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=16).digest()


def _stamp_key(stamp: Stamp) -> bytes:
    said = f"{stamp.size_bytes} {stamp.mtime_ns} {stamp.ctime_ns}"
    return hashlib.blake2b(said.encode(), digest_size=16).digest()
