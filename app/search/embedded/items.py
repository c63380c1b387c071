"""SQL on items, their vectors and thumbnails; each call is part of its caller's transaction.

Dimension key: N items · D embedding
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.search.collection import Vector
from app.search.embedded import blocks
from app.search.embedded.directory import Damage
from app.search.embedded.fields import FieldRows, Fields, rows_of
from app.search.embedded.registry import CollectionRow

_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True, slots=True)
class KnownItem:
    """What is on disk of an id, as far as it decides whether an item is written again.

    Attributes:
        metadata: JSON text.
        deleted: Whether it is only kept for its grace time.
    """

    rid: int
    id: str
    metadata: str
    sha256: str
    source: str | None
    deleted: bool


@dataclass(frozen=True, slots=True)
class StoredItem:
    """A living item as it is on disk: metadata are JSON text, the vector float32 bytes."""

    id: str
    metadata: str
    sha256: str
    source: str | None
    vector: bytes


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item to write."""

    rid: int
    id: str
    metadata: str
    sha256: str
    source: str | None
    vector: bytes
    thumbnail: bytes | None


@dataclass(frozen=True)
class Behind:
    """What the index of filters lacks, and what it has too much.

    Attributes:
        indexed: Up to which rid it was written when this was read.
        reached: Up to which it will be.
        new_rows: Rows to write.
        garbage: Rids of what updates replaced.
        garbage_rows: Their rows, which may be there or not.
        is_all: Whether nothing is left after it.
    """

    indexed: int
    reached: int
    new_rows: FieldRows
    garbage: list[int]
    garbage_rows: FieldRows
    is_all: bool

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return self.reached == self.indexed and not self.garbage


class Items:
    """The items of all collections of a database.

    Args:
        fields: The index of filters, which is kept with them.
        last_rid: The greatest rid that was ever used.
    """

    def __init__(self, fields: Fields, *, last_rid: int) -> None:
        self._fields = fields
        self._last_rid = last_rid

    @property
    def last_rid(self) -> int:
        """The greatest that ever was."""
        return self._last_rid

    def reserve_rids(self, count: int) -> range:
        """Fresh rids, above all that ever were; hold the writer. Those of a failed transaction are lost."""
        first = self._last_rid + 1
        self._last_rid += count
        return range(first, first + count)

    # Reading

    def known(self, connection: sqlite3.Connection, cid: int, ids: Iterable[str]) -> dict[str, KnownItem]:
        """Items by id, deleted ones included; ids that aren't there are left out."""
        rows = connection.execute(
            "SELECT rid, id, metadata, sha256, source, deleted_at IS NOT NULL FROM items"
            " WHERE cid = ? AND id IN (SELECT value FROM json_each(?))",
            (cid, _json_of(ids)),
        )
        return {row[1]: KnownItem(*row) for row in rows}

    def by_id(self, connection: sqlite3.Connection, cid: int, ids: Iterable[str]) -> dict[str, StoredItem]:
        """Living items by id; ids that aren't there are left out."""
        rows = connection.execute(
            f"{_SELECT_STORED} WHERE cid = ? AND deleted_at IS NULL"
            " AND id IN (SELECT value FROM json_each(?))",
            (cid, _json_of(ids)),
        )
        return {row[0]: StoredItem(*row) for row in rows}

    def by_rid(self, connection: sqlite3.Connection, rids: Iterable[int]) -> list[StoredItem]:
        """Items of rids that are there, in order of id."""
        rows = connection.execute(
            f"{_SELECT_STORED} WHERE rid IN (SELECT value FROM json_each(?)) ORDER BY id",
            (json.dumps(list(rids)),),
        )
        return [StoredItem(*row) for row in rows]

    def after(
        self, connection: sqlite3.Connection, cid: int, after_id: str, *, limit: int
    ) -> list[StoredItem]:
        """Living items in order of id, from the one after an id on."""
        rows = connection.execute(
            f"{_SELECT_STORED} WHERE cid = ? AND deleted_at IS NULL AND id > ? ORDER BY id LIMIT ?",
            (cid, after_id, limit),
        )
        return [StoredItem(*row) for row in rows]

    def ids_after(
        self, connection: sqlite3.Connection, cid: int, after_id: str, *, limit: int
    ) -> list[tuple[str, int]]:
        """Ids and rids in order of id, from the one after an id on, deleted ones included."""
        return connection.execute(
            "SELECT id, rid FROM items WHERE cid = ? AND id > ? ORDER BY id LIMIT ?", (cid, after_id, limit)
        ).fetchall()

    def first_ids(
        self, connection: sqlite3.Connection, rids: Iterable[int], after_id: str, *, limit: int
    ) -> list[int]:
        """Of some rids those whose ids are the first above one."""
        rows = connection.execute(
            "SELECT rid FROM items WHERE rid IN (SELECT value FROM json_each(?)) AND id > ?"
            " ORDER BY id LIMIT ?",
            (json.dumps(list(rids)), after_id, limit),
        )
        return [row[0] for row in rows]

    def texts(self, connection: sqlite3.Connection, rids: Iterable[int]) -> dict[int, tuple[str, str]]:
        """Ids and metadata, as JSON text, of some rids."""
        rows = connection.execute(
            "SELECT rid, id, metadata FROM items WHERE rid IN (SELECT value FROM json_each(?))",
            (json.dumps(list(rids)),),
        )
        return {rid: (item_id, metadata) for rid, item_id, metadata in rows}

    def rids(self, connection: sqlite3.Connection, cid: int, ids: Iterable[str]) -> list[int]:
        """The rids of living items, rising."""
        rows = connection.execute(
            "SELECT rid FROM items WHERE cid = ? AND deleted_at IS NULL"
            " AND id IN (SELECT value FROM json_each(?)) ORDER BY rid",
            (cid, _json_of(ids)),
        )
        return [row[0] for row in rows]

    def deleted_rids(
        self, connection: sqlite3.Connection, cid: int, ids: Iterable[str], *, since: float
    ) -> list[int]:
        """The rids of items that were deleted since a time, rising."""
        rows = connection.execute(
            "SELECT rid FROM items WHERE cid = ? AND deleted_at >= ?"
            " AND id IN (SELECT value FROM json_each(?)) ORDER BY rid",
            (cid, since, _json_of(ids)),
        )
        return [row[0] for row in rows]

    def count_deleted(self, connection: sqlite3.Connection, cid: int, *, since: float) -> int:
        """How many items were deleted since a time and are still on disk."""
        (count,) = connection.execute(
            "SELECT count(*) FROM items WHERE cid = ? AND deleted_at >= ?", (cid, since)
        ).fetchone()
        return int(count)

    def thumbnail(self, connection: sqlite3.Connection, cid: int, item_id: str) -> bytes | None:
        """The WebP of a living item."""
        row = connection.execute(
            "SELECT webp FROM items JOIN thumbnails USING (rid)"
            " WHERE cid = ? AND id = ? AND deleted_at IS NULL",
            (cid, item_id),
        ).fetchone()
        return None if row is None else bytes(row[0])

    def having_thumbnails(self, connection: sqlite3.Connection, rids: Iterable[int]) -> set[int]:
        """Which of some rids have thumbnails."""
        rows = connection.execute(
            "SELECT rid FROM thumbnails WHERE rid IN (SELECT value FROM json_each(?))",
            (json.dumps(list(rids)),),
        )
        return {row[0] for row in rows}

    def vectors_of(self, connection: sqlite3.Connection, rids: Iterable[int]) -> dict[int, bytes]:
        """The vectors of some rids, as float32 bytes."""
        return dict(
            connection.execute(
                "SELECT rid, vector FROM vectors WHERE rid IN (SELECT value FROM json_each(?))",
                (json.dumps(list(rids)),),
            )
        )

    def vectors(
        self, connection: sqlite3.Connection, collection: CollectionRow, *, name: str
    ) -> Iterator[tuple[npt.NDArray[np.int64], Vector]]:
        """All living vectors of a collection, in blocks, rids rising.

        Raises:
            Damage: A vector is missing or damaged.
        """
        rids_N = _living_rids(connection, collection.cid)
        for start in range(0, len(rids_N), _ROWS_AT_ONCE):
            block_N = rids_N[start : start + _ROWS_AT_ONCE]
            vectors_ND = _vectors_of_block(connection, block_N, dimensions=collection.dimensions)
            if vectors_ND is None:
                raise Damage(f"vectors of the collection {name!r} are missing or no vectors")
            yield block_N, vectors_ND

    # Writing

    def replace(
        self,
        connection: sqlite3.Connection,
        cid: int,
        *,
        seq: int,
        new: Sequence[NewItem],
        old: Sequence[KnownItem],
    ) -> None:
        """Writes items, in place of others."""
        if old:
            blocks.insert(
                connection,
                "garbage (rid, cid, metadata)",
                sorted((item.rid, cid, item.metadata) for item in old),
            )
            self._delete(connection, "items", [item.rid for item in old])
        blocks.insert(
            connection,
            "items (rid, cid, id, seq, metadata, sha256, source)",
            [(item.rid, cid, item.id, seq, item.metadata, item.sha256, item.source) for item in new],
        )
        blocks.insert(connection, "vectors (rid, vector)", [(item.rid, item.vector) for item in new])
        with_thumbnail = [(item.rid, item.thumbnail) for item in new if item.thumbnail is not None]
        if with_thumbnail:
            blocks.insert(connection, "thumbnails (rid, webp)", with_thumbnail)

    def mark_deleted(
        self, connection: sqlite3.Connection, rids: Sequence[int], *, seq: int, deleted_at: float
    ) -> None:
        """Hides items from everybody; their rows stay for a grace time."""
        connection.execute(
            "UPDATE items SET deleted_at = ?, seq = ? WHERE rid IN (SELECT value FROM json_each(?))",
            (deleted_at, seq, json.dumps(list(rids))),
        )

    def undelete(
        self, connection: sqlite3.Connection, rids: Sequence[int], *, seq: int
    ) -> tuple[range, list[bytes]]:
        """Brings deleted items back, each with a fresh rid; hold the writer.

        Returns:
            Their new rids, and their vectors.
        """
        fresh = self.reserve_rids(len(rids))
        renumbered = list(zip(fresh, rids, strict=True))
        connection.execute(
            "INSERT INTO garbage (rid, cid, metadata)"
            " SELECT rid, cid, metadata FROM items WHERE rid IN (SELECT value FROM json_each(?))",
            (json.dumps(list(rids)),),
        )
        for table in ("items", "vectors", "thumbnails"):
            connection.executemany(f"UPDATE {table} SET rid = ? WHERE rid = ?", renumbered)
        connection.executemany(
            "UPDATE items SET deleted_at = NULL, seq = ? WHERE rid = ?", [(seq, rid) for rid in fresh]
        )
        # SQLite counts what is inserted only.
        connection.execute("UPDATE sqlite_sequence SET seq = ? WHERE name = 'items'", (self._last_rid,))
        vectors = self.vectors_of(connection, fresh)
        if len(vectors) < len(fresh):
            raise Damage("vectors of deleted items are missing")
        return fresh, [vectors[rid] for rid in fresh]

    # Behind the items

    def indexed(self, connection: sqlite3.Connection) -> int:
        """The greatest rid that the index of filters has, with all below it."""
        (rid,) = connection.execute("SELECT value FROM state WHERE name = 'indexed'").fetchone()
        return int(rid)

    def read_behind(self, connection: sqlite3.Connection, *, limit: int) -> Behind:
        """Reads what is to be done next for the index of filters, for so many items at most.

        Args:
            connection: In a transaction, which need not be the writer's.
            limit: How many items at most.
        """
        indexed = self.indexed(connection)
        new = connection.execute(
            "SELECT rid, cid, metadata FROM items WHERE rid > ? ORDER BY rid LIMIT ?", (indexed, limit)
        ).fetchall()
        garbage = connection.execute(
            "SELECT rid, cid, metadata FROM garbage ORDER BY rid LIMIT ?", (limit,)
        ).fetchall()
        (last,) = connection.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'items'").fetchone()
        reached = new[-1][0] if len(new) == limit else max(indexed, last or 0)
        return Behind(
            indexed,
            reached,
            rows_of(new),
            [rid for rid, _, _ in garbage],
            rows_of(garbage),
            is_all=len(new) < limit and len(garbage) < limit,
        )

    def catch_up(self, connection: sqlite3.Connection, behind: Behind) -> None:
        """Writes the index of filters, and erases what updates replaced."""
        if behind.indexed != self.indexed(connection):
            return  # somebody else has done it meanwhile
        # Some may have been replaced since they were read; the upkeep itself erases no others meanwhile.
        gone = {
            rid
            for (rid,) in connection.execute(
                "SELECT rid FROM garbage WHERE rid > ? AND rid <= ?", (behind.indexed, behind.reached)
            )
        }
        if gone:
            for values in behind.new_rows.values():
                values[:] = [value for value in values if value[2] not in gone]
        self._fields.add(connection, behind.new_rows)
        if behind.reached > behind.indexed:
            connection.execute("UPDATE state SET value = ? WHERE name = 'indexed'", (behind.reached,))
        if behind.garbage:
            self._erase(
                connection, behind.garbage, behind.garbage_rows, tables=("vectors", "thumbnails", "garbage")
            )

    def erase_deleted(self, connection: sqlite3.Connection, *, before: float, limit: int) -> int:
        """Erases some of what was deleted before a time, in seconds since 1970.

        Returns:
            How many items.
        """
        rows = connection.execute(
            "SELECT rid, cid, metadata FROM items WHERE deleted_at IS NOT NULL AND deleted_at < ? LIMIT ?",
            (before, limit),
        ).fetchall()
        if rows:
            rids = [rid for rid, _, _ in rows]
            self._erase(connection, rids, rows_of(rows), tables=("vectors", "thumbnails", "items"))
        return len(rows)

    def _erase(
        self,
        connection: sqlite3.Connection,
        rids: Sequence[int],
        rows: FieldRows,
        *,
        tables: Sequence[str],
    ) -> None:
        for table in tables:
            self._delete(connection, table, rids)
        self._fields.erase(connection, rows)

    def _delete(self, connection: sqlite3.Connection, table: str, rids: Iterable[int]) -> None:
        connection.execute(
            f"DELETE FROM {table} WHERE rid IN (SELECT value FROM json_each(?))",
            (json.dumps(sorted(rids)),),
        )

    def erase_dropped(self, connection: sqlite3.Connection, *, limit: int) -> int:
        """Erases some of what dropped collections had.

        Returns:
            0 when nothing was left.
        """
        dropped = connection.execute("SELECT cid, reached FROM dropped LIMIT 1").fetchone()
        if dropped is None:
            return 0
        cid, reached = dropped
        # In order of rid, as their vectors lie: five share a page.
        rows = connection.execute(
            "SELECT rid FROM items NOT INDEXED WHERE rid > ? AND cid = ? ORDER BY rid LIMIT ?",
            (reached, cid, limit),
        ).fetchall()
        if rows:
            for table in ("vectors", "thumbnails", "items"):
                self._delete(connection, table, [rid for (rid,) in rows])
            connection.execute("UPDATE dropped SET reached = ? WHERE cid = ?", (rows[-1][0], cid))
        elif not self._fields.erase_collection(connection, cid, limit=8 * limit):
            connection.execute("DELETE FROM dropped WHERE cid = ?", (cid,))
        return max(1, len(rows))


_SELECT_STORED = "SELECT id, metadata, sha256, source, vector FROM items JOIN vectors USING (rid)"


def _json_of(ids: Iterable[str]) -> str:
    return json.dumps(list(ids), ensure_ascii=False)


def _living_rids(connection: sqlite3.Connection, cid: int) -> npt.NDArray[np.int64]:
    """Rising. Both questions are answered from indexes, which are a tenth of the items."""
    everything, deleted = (
        np.fromstring(text or "", dtype=np.int64, sep=",")
        for (text,) in (
            connection.execute("SELECT group_concat(rid) FROM items WHERE cid = ?", (cid,)).fetchone(),
            connection.execute(
                "SELECT group_concat(rid) FROM items WHERE cid = ? AND deleted_at IS NOT NULL", (cid,)
            ).fetchone(),
        )
    )
    everything.sort()
    deleted.sort()
    kept: npt.NDArray[np.int64] = everything[~np.isin(everything, deleted, kind="sort")]
    return kept


def _vectors_of_block(
    connection: sqlite3.Connection, rids_N: npt.NDArray[np.int64], *, dimensions: int
) -> Vector | None:
    """None where one is missing or damaged."""
    first, last = int(rids_N[0]), int(rids_N[-1])
    if last - first < 2 * len(rids_N):
        rows = connection.execute(
            "SELECT rid, vector FROM vectors WHERE rid BETWEEN ? AND ? ORDER BY rid", (first, last)
        ).fetchall()
        if len(rows) > len(rids_N):
            wanted = set(rids_N.tolist())
            rows = [row for row in rows if row[0] in wanted]
    else:
        rows = connection.execute(
            "SELECT rid, vector FROM vectors WHERE rid IN (SELECT value FROM json_each(?)) ORDER BY rid",
            (json.dumps(rids_N.tolist()),),
        ).fetchall()
    joined = b"".join([vector for _, vector in rows])
    if len(rows) != len(rids_N) or len(joined) != 4 * dimensions * len(rows):
        return None
    vectors_ND = np.frombuffer(joined, dtype="<f4").reshape(len(rows), dimensions)
    squares_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND)
    return vectors_ND if np.all(np.abs(squares_N - 1.0) < 2e-3) else None  # NaN fails, too
