"""The truth on disk: one SQLite file, in WAL mode, with an fsync for each commit.

All SQL on items is here; nothing here knows how vectors are searched. A commit that returned survives
`kill -9` and, as far as the disk keeps its word, a power cut.

Several connections read at once, each in its own transaction; one writes.
"""

import contextlib
import json
import queue
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.errors import StorageError
from app.search.collection import Vector
from app.search.directory import storage_errors
from app.search.filter_sql import SqlFilter
from app.search.registry import CollectionRow
from app.search.schema import migrate

_BUSY_TIMEOUT_S = (
    5.0  # another program that looks into the file, such as the sqlite3 shell, may hold it shortly
)
_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True)
class ItemRow:
    """An item as it is on disk, without its vector's bytes unless they were asked for.

    Attributes:
        metadata: JSON text.
        vector: float32 bytes, or None.
        has_thumbnail: Whether there is one to read.
        deleted: Whether it is only kept for its grace time.
    """

    rid: int
    id: str
    metadata: str
    sha256: str
    source: str | None
    vector: bytes | None
    has_thumbnail: bool
    deleted: bool


@dataclass(frozen=True)
class NewItem:
    """An item to write."""

    rid: int
    id: str
    metadata: str
    sha256: str
    source: str | None
    vector: bytes
    thumbnail: bytes | None


class Store:
    """The connections to one database. Every method takes the connection whose transaction it is part of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        self._readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._writer_lock = threading.RLock()
        self._writer = self._connect()
        with storage_errors():
            migrate(self._writer)
            row = self._writer.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
        self._last_rid: int = row[0] if row else 0

    def _connect(self) -> sqlite3.Connection:
        with storage_errors():
            connection = sqlite3.connect(
                self._path, isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT_S
            )
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA secure_delete = ON")  # an erased picture leaves no bytes behind
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
            if self._closed:
                connection.close()
            else:
                self._readers.put(connection)

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
                raise

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StorageError("the collections are closed: the service is stopping")

    # Items

    def reserve_rids(self, count: int) -> range:
        """Fresh rids, above all that ever were; hold the writer. Those of a failed transaction are lost."""
        first = self._last_rid + 1
        self._last_rid += count
        return range(first, first + count)

    def items_by_id(
        self, connection: sqlite3.Connection, cid: int, ids: Iterable[str], *, with_vectors: bool
    ) -> dict[str, ItemRow]:
        """Items by id, deleted ones included; ids that aren't there are left out."""
        rows = connection.execute(
            f"{_SELECT_ITEM.format(vector='v.vector' if with_vectors else 'NULL')}"
            " WHERE i.cid = ? AND i.id IN (SELECT value FROM json_each(?))",
            (cid, json.dumps(list(ids), ensure_ascii=False)),
        )
        return {row.id: row for row in map(_item_row, rows)}

    def items_after(
        self,
        connection: sqlite3.Connection,
        cid: int,
        after_id: str,
        *,
        condition: SqlFilter | None = None,
        limit: int,
    ) -> list[ItemRow]:
        """Living items in order of id, from the one after an id on."""
        condition = condition or SqlFilter("TRUE", ())
        rows = connection.execute(
            f"{_SELECT_ITEM.format(vector='v.vector')}"
            f" WHERE i.cid = ? AND i.deleted_at IS NULL AND i.id > ? AND {condition.clause}"
            " ORDER BY i.id LIMIT ?",
            (cid, after_id, *condition.parameters, limit),
        )
        return [_item_row(row) for row in rows]

    def ids_of(self, connection: sqlite3.Connection, rids: Iterable[int]) -> dict[int, str]:
        """The ids of some rids."""
        return dict(
            connection.execute(
                "SELECT rid, id FROM items WHERE rid IN (SELECT value FROM json_each(?))",
                (json.dumps(list(rids)),),
            )
        )

    def metadata_of(self, connection: sqlite3.Connection, rids: Iterable[int]) -> dict[int, str]:
        """The metadata of some rids, as JSON text."""
        return dict(
            connection.execute(
                "SELECT rid, metadata FROM items WHERE rid IN (SELECT value FROM json_each(?))",
                (json.dumps(list(rids)),),
            )
        )

    def rids_of(self, connection: sqlite3.Connection, cid: int, ids: Iterable[str]) -> list[int]:
        """The rids of living items, rising."""
        rows = connection.execute(
            "SELECT rid FROM items WHERE cid = ? AND deleted_at IS NULL"
            " AND id IN (SELECT value FROM json_each(?)) ORDER BY rid",
            (cid, json.dumps(list(ids), ensure_ascii=False)),
        )
        return [row[0] for row in rows]

    def rids_where(self, connection: sqlite3.Connection, cid: int, condition: SqlFilter) -> list[int]:
        """The rids of living items that a filter keeps, rising."""
        rows = connection.execute(
            f"SELECT rid FROM items WHERE cid = ? AND deleted_at IS NULL AND {condition.clause} ORDER BY rid",
            (cid, *condition.parameters),
        )
        return [row[0] for row in rows]

    def thumbnail(self, connection: sqlite3.Connection, cid: int, item_id: str) -> bytes | None:
        """The WebP of a living item."""
        row = connection.execute(
            "SELECT webp FROM items JOIN thumbnails USING (rid)"
            " WHERE cid = ? AND id = ? AND deleted_at IS NULL",
            (cid, item_id),
        ).fetchone()
        return None if row is None else bytes(row[0])

    def replace_items(
        self,
        connection: sqlite3.Connection,
        cid: int,
        *,
        seq: int,
        new: Sequence[NewItem],
        old_rids: Sequence[int],
    ) -> None:
        """Writes items, in place of those of the old rids."""
        self._erase(connection, "SELECT value FROM json_each(?)", json.dumps(list(old_rids)))
        connection.executemany(
            "INSERT INTO items (rid, cid, id, seq, metadata, sha256, source) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(item.rid, cid, item.id, seq, item.metadata, item.sha256, item.source) for item in new],
        )
        connection.executemany(
            "INSERT INTO vectors (rid, vector) VALUES (?, ?)", [(item.rid, item.vector) for item in new]
        )
        connection.executemany(
            "INSERT INTO thumbnails (rid, webp) VALUES (?, ?)",
            [(item.rid, item.thumbnail) for item in new if item.thumbnail is not None],
        )

    def mark_deleted(
        self, connection: sqlite3.Connection, rids: Sequence[int], *, seq: int, deleted_at: float
    ) -> None:
        """Hides items from everybody; their rows stay for a grace time."""
        connection.execute(
            "UPDATE items SET deleted_at = ?, seq = ? WHERE rid IN (SELECT value FROM json_each(?))",
            (deleted_at, seq, json.dumps(list(rids))),
        )

    def deleted_rids(
        self, connection: sqlite3.Connection, cid: int, ids: Iterable[str], *, since: float
    ) -> list[int]:
        """The rids of items that were deleted since a time, rising."""
        rows = connection.execute(
            "SELECT rid FROM items WHERE cid = ? AND deleted_at >= ?"
            " AND id IN (SELECT value FROM json_each(?)) ORDER BY rid",
            (cid, since, json.dumps(list(ids), ensure_ascii=False)),
        )
        return [row[0] for row in rows]

    def undelete(
        self, connection: sqlite3.Connection, rids: Sequence[int], *, seq: int
    ) -> tuple[range, list[bytes]]:
        """Brings deleted items back, each with a fresh rid; hold the writer.

        Returns:
            Their new rids, and their vectors.
        """
        fresh = self.reserve_rids(len(rids))
        renumbered = list(zip(fresh, rids, strict=True))
        for table in ("items", "vectors", "thumbnails"):
            connection.executemany(f"UPDATE {table} SET rid = ? WHERE rid = ?", renumbered)
        connection.executemany(
            "UPDATE items SET deleted_at = NULL, seq = ? WHERE rid = ?", [(seq, rid) for rid in fresh]
        )
        vectors = self.vectors_of(connection, fresh)
        return fresh, [vectors[rid] for rid in fresh]

    def erase_collection(self, connection: sqlite3.Connection, cid: int) -> None:
        """Erases all items of a collection."""
        for table in ("vectors", "thumbnails"):
            connection.execute(
                f"DELETE FROM {table} WHERE rid IN (SELECT rid FROM items WHERE cid = ?)", (cid,)
            )
        connection.execute("DELETE FROM items WHERE cid = ?", (cid,))

    def count_deleted(self, connection: sqlite3.Connection, cid: int, *, since: float) -> int:
        """How many items were deleted since a time and are still on disk."""
        (count,) = connection.execute(
            "SELECT count(*) FROM items WHERE cid = ? AND deleted_at >= ?", (cid, since)
        ).fetchone()
        return int(count)

    def vectors_of(self, connection: sqlite3.Connection, rids: Iterable[int]) -> dict[int, bytes]:
        """The vectors of some rids, as float32 bytes."""
        return dict(
            connection.execute(
                "SELECT rid, vector FROM vectors WHERE rid IN (SELECT value FROM json_each(?))",
                (json.dumps(list(rids)),),
            )
        )

    def used_bytes(self, connection: sqlite3.Connection) -> int:
        """Of the database's file, without the pages that wait to be used again."""
        page_bytes, pages, free = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_size", "page_count", "freelist_count")
        )
        return page_bytes * (pages - free)

    def copy_to(self, path: Path) -> None:
        """Writes a copy of the database, of one moment, into a new file, while others read and write."""
        with self.reading() as connection:
            connection.execute("ROLLBACK")  # VACUUM INTO makes its own transaction
            connection.execute("VACUUM INTO ?", (str(path),))

    def erase_deleted(self, connection: sqlite3.Connection, *, before: float) -> None:
        """Erases what was deleted before a time, in seconds since 1970."""
        # The index on (cid, deleted_at) holds deleted items only, so all of it is few.
        self._erase(
            connection, "SELECT rid FROM items WHERE deleted_at IS NOT NULL AND deleted_at < ?", before
        )

    def _erase(self, connection: sqlite3.Connection, which: str, parameter: str | float) -> None:
        for table in ("vectors", "thumbnails", "items"):  # items last: `which` may read it
            connection.execute(f"DELETE FROM {table} WHERE rid IN ({which})", (parameter,))

    def vectors(
        self, connection: sqlite3.Connection, collection: CollectionRow
    ) -> Iterator[tuple[list[int], Vector]]:
        """All living vectors of a collection, in blocks, rids rising.

        Raises:
            StorageError: A vector is missing or damaged.
        """
        rows = connection.execute(
            "SELECT i.rid, v.vector FROM items i LEFT JOIN vectors v USING (rid)"
            " WHERE i.cid = ? AND i.deleted_at IS NULL ORDER BY i.rid",
            (collection.cid,),
        )
        bytes_each = 4 * collection.dimensions
        while block := rows.fetchmany(_ROWS_AT_ONCE):
            if any(vector is None or len(vector) != bytes_each for _, vector in block):
                raise StorageError(
                    f"vectors of the collection {collection.name!r} are damaged: restore a copy"
                )
            joined = b"".join(vector for _, vector in block)
            vectors_ND = np.frombuffer(joined, dtype="<f4").reshape(len(block), collection.dimensions)
            lengths = np.linalg.norm(vectors_ND, axis=1)
            if not np.all(np.abs(lengths - 1.0) < 1e-3):  # NaN fails, too
                raise StorageError(
                    f"vectors of the collection {collection.name!r} are damaged: restore a copy"
                )
            yield [rid for rid, _ in block], vectors_ND


_SELECT_ITEM = (
    "SELECT i.rid, i.id, i.metadata, i.sha256, i.source, {vector}, t.rid IS NOT NULL,"
    " i.deleted_at IS NOT NULL"
    " FROM items i LEFT JOIN vectors v USING (rid) LEFT JOIN thumbnails t USING (rid)"
)


def _item_row(row: tuple[int, str, str, str, str | None, bytes | None, int, int]) -> ItemRow:
    rid, item_id, metadata, sha256, source, vector, has_thumbnail, deleted = row
    return ItemRow(rid, item_id, metadata, sha256, source, vector, bool(has_thumbnail), bool(deleted))
