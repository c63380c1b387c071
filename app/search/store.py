"""The truth on disk: one SQLite file, in WAL mode, with an fsync for each commit.

A commit that returned survives `kill -9` and, as far as the disk keeps its word, a power cut. Several
connections read at once, each in its own transaction; one writes. A thread moves the journal into the
database and erases what nobody can reach any more, so that neither a commit nor a deletion waits for that.
"""

import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from app.errors import StorageError
from app.search.acknowledged import Acknowledged
from app.search.directory import Damage, storage_errors
from app.search.fields import Fields
from app.search.items import Items
from app.search.schema import migrate
from app.search.upkeep import Upkeep

logger = logging.getLogger(__name__)

# Another program that looks into the file, such as the sqlite3 shell, may hold it shortly.
_BUSY_TIMEOUT_S = 5.0
_WRITER_CACHE_KIB: Final = 65_536
_READER_CACHE_KIB: Final = 8_192
_READERS_KEPT: Final = 16


class Store:
    """The connections to one database.

    Attributes:
        fields: The index of filters.
        items: SQL on items.
        acknowledged: The last write that was acknowledged.
        weights: How many bytes the items of each collection have, about: by cid.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        self._is_begun = False
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue(_READERS_KEPT)
        self._writer_lock = threading.RLock()
        journal = path.with_name(f"{path.name}-wal")
        has_journal = journal.exists() and journal.stat().st_size > 0
        self._writer = self._connect(cache_kib=_WRITER_CACHE_KIB)
        self.fields = Fields()
        self.weights: dict[int, Callable[[], int]] = {}
        self.acknowledged = Acknowledged(path.parent)
        try:
            with storage_errors():
                migrate(self._writer)
                if not has_journal:
                    _check_if_left_open(self._writer)
                row = self._writer.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
                self.items = Items(self.fields, last_rid=row[0] if row else 0)
                self._upkeep = Upkeep(self, indexed=self.items.indexed(self._writer))
        except BaseException:
            self._writer.close()
            raise

    def begin(self) -> None:
        """Says on disk that the database is open, and starts the upkeep; nothing was written before."""
        with self.transaction() as connection:
            connection.execute("UPDATE state SET value = 1 WHERE name = 'open'")
        self._is_begun = True
        self._upkeep.start()

    def _connect(self, *, cache_kib: int = _READER_CACHE_KIB) -> sqlite3.Connection:
        with storage_errors():
            connection = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT_S
            )
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA secure_delete = ON")  # an erased picture leaves no bytes behind
                connection.execute("PRAGMA wal_autocheckpoint = 0")  # the upkeep's work
                connection.execute(f"PRAGMA cache_size = {-cache_kib}")
            except BaseException:
                connection.close()
                raise
        return connection

    def close(self) -> None:
        """Moves the journal into the database and closes every connection that is not in use."""
        with self._writer_lock:
            if self._closed:
                return
            self._closed = True
        if self._is_begun:
            self._upkeep.stop()
        with self._writer_lock:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._readers.get_nowait().close()
            try:
                if self._is_begun:
                    self._writer.execute("UPDATE state SET value = 0 WHERE name = 'open'")
                    self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    self.acknowledged.clear()
            except sqlite3.Error as error:  # everything acknowledged is in the journal
                logger.warning("the journal could not be moved into the database: %s", error)
            finally:
                self._writer.close()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One unchanging state of the database, for as long as the block lasts; keep it short."""
        try:
            connection = self._readers.get_nowait()
        except queue.Empty:
            connection = self._connect()
        try:
            self._refuse_if_closed()
            with storage_errors():
                connection.execute("BEGIN")
                yield connection
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            self._give_back(connection)

    def _give_back(self, connection: sqlite3.Connection) -> None:
        try:
            if self._closed:
                connection.close()
            else:
                self._readers.put_nowait(connection)
        except queue.Full:
            connection.close()

    @contextlib.contextmanager
    def writer(self) -> Iterator[None]:
        """Keeps every other writer out for as long as the block lasts."""
        with self._writer_lock:
            self._refuse_if_closed()
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: on disk when the block ends, and not at all when it raises."""
        with self.writer():
            self._upkeep.before_commit()
            with self.transaction() as connection:
                yield connection
            self._upkeep.after_commit()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """As `writing`, for the upkeep itself."""
        with self.writer(), storage_errors():
            connection = self._writer
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self.fields.forget()
                raise

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StorageError("the collections are closed: the service is stopping")

    def used_bytes(self) -> int:
        """Of the database's file, without the pages that wait to be used again."""
        with self.reading() as connection:
            page_bytes, pages, free = (
                int(connection.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("page_size", "page_count", "freelist_count")
            )
        return page_bytes * (pages - free)

    def copy_to(self, path: Path) -> None:
        """Writes a copy of the database, of one moment, into a new file, while others read and write."""
        connection = self._connect()
        try:
            with storage_errors():
                connection.execute("VACUUM INTO ?", (str(path),))
        finally:
            connection.close()
        with storage_errors(), contextlib.closing(sqlite3.connect(path, isolation_level=None)) as copy:
            copy.execute("UPDATE state SET value = 0 WHERE name = 'open'")

    def erase_soon(self) -> None:
        """Something was dropped."""
        self._upkeep.erase_soon()

    def checkpoint(self) -> int:
        """Moves the journal into the database while others read and write.

        Returns:
            How many pages the journal has.
        """
        with self.reading() as connection, storage_errors():
            connection.execute("ROLLBACK")  # a reader holds the journal
            _, pages, _ = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return int(pages)


def _check_if_left_open(connection: sqlite3.Connection) -> None:
    """Looks closer where a process had the database open, but its journal isn't here.

    A copy by SQLite's own means is whole nevertheless; one of the file alone, while it was written, may not
    be.

    Raises:
        Damage: It isn't whole.
    """
    (is_open,) = connection.execute("SELECT value FROM state WHERE name = 'open'").fetchone()
    if is_open:
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise Damage("it was copied without its journal, while it was written to")
