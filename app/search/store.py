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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from app.errors import StorageError
from app.search.collection import GRACE_S
from app.search.directory import storage_errors
from app.search.fields import Fields
from app.search.items import Items
from app.search.schema import migrate

logger = logging.getLogger(__name__)

# Another program that looks into the file, such as the sqlite3 shell, may hold it shortly.
_BUSY_TIMEOUT_S = 5.0
_WRITER_CACHE_KIB: Final = 65_536
_READER_CACHE_KIB: Final = 8_192
_READERS_KEPT: Final = 16
_CHECKPOINT_EVERY_S: Final = 0.25
_JOURNAL_PAGES: Final = 4_096  # 32 MB: above that the writer waits for the rest of a checkpoint
_ERASE_EVERY_S: Final = 600.0
_ERASE_AT_ONCE: Final = 200  # items: a commit of about 10 ms, between those of others


class Store:
    """The connections to one database.

    Attributes:
        fields: The index of filters.
        items: SQL on items.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue(_READERS_KEPT)
        self._writer_lock = threading.RLock()
        self._writer = self._connect(cache_kib=_WRITER_CACHE_KIB)
        self.fields = Fields()
        try:
            with storage_errors():
                migrate(self._writer, fields=self.fields)
                row = self._writer.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
        except BaseException:
            self._writer.close()
            raise
        self.items = Items(self.fields, last_rid=row[0] if row else 0)
        self._commits = 0
        self._wake = threading.Event()
        self._upkeep = threading.Thread(target=self._keep_up, name="collections-upkeep", daemon=True)
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
        self._wake.set()
        self._upkeep.join()
        with self._writer_lock:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._readers.get_nowait().close()
            with storage_errors():
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
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
            self._commits += 1

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

    # Upkeep

    def erase_soon(self) -> None:
        """Something was dropped."""
        self._wake.set()

    def _keep_up(self) -> None:
        connection = self._connect()
        try:
            seen, erased_at = 0, -_ERASE_EVERY_S
            while not self._closed:
                asked = self._wake.wait(timeout=_CHECKPOINT_EVERY_S)
                self._wake.clear()
                if self._commits != seen:
                    seen = self._commits
                    self._checkpoint(connection)
                if asked or time.monotonic() - erased_at > _ERASE_EVERY_S:
                    self._erase()
                    erased_at = time.monotonic()
        finally:
            connection.close()

    def _checkpoint(self, connection: sqlite3.Connection) -> None:
        """Moves the journal into the database while others read and write."""
        try:
            _, pages, moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            if pages < _JOURNAL_PAGES or pages == moved:
                return
            # A journal begins anew only when all of it was moved, which never happens while others commit.
            with self._writer_lock:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as error:
            logger.warning("the journal could not be moved into the database: %s", error)

    def _erase(self) -> None:
        """Erases what nobody can reach any more, bit by bit."""
        try:
            while not self._closed:
                with self.writing() as connection:
                    began = time.monotonic()
                    more = self.items.erase_deleted(
                        connection, before=time.time() - GRACE_S, limit=_ERASE_AT_ONCE
                    ) or self.items.erase_dropped(connection, limit=_ERASE_AT_ONCE)
                if not more:
                    return
                time.sleep(time.monotonic() - began)  # as long for the others
        except StorageError as error:
            logger.warning("erasing deleted items goes on later: %s", error)
