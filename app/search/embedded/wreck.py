"""A database that may be damaged, read as far as it can be.

SQLite gives up at the first damaged page that it meets. Here each table is asked for ranges of rids, and a
range that fails is halved, until only the rows of damaged pages are missing.

Dimension key: D embedding
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from app.search.collection import Item, Vector

_RIDS_AT_ONCE: Final = 1_024
UNKNOWN_FINGERPRINT: Final = "unknown"


@dataclass
class WreckedCollection:
    """What is known of a collection of a damaged database.

    Attributes:
        name: Its own, or one that is made up.
        successor_of: The cid of its predecessor, or None.
        fingerprint: "unknown" where the table of collections can't be read.
        dimensions: None where that can't be read.
        ids: rid -> id, of all living items; None where the index can't be read.
    """

    cid: int
    name: str
    successor_of: int | None
    fingerprint: str
    dimensions: int | None
    ids: dict[int, str] | None = None
    read: set[int] = field(default_factory=set)

    @property
    def lost(self) -> list[str] | None:
        """The ids of items that could not be read, once all were tried; None where nobody knows."""
        if self.ids is None:
            return None
        return sorted(item_id for rid, item_id in self.ids.items() if rid not in self.read)


class Wreck:
    """A database, opened to be read only; close it, or use it as a context manager.

    Args:
        path: Of the database; nobody else may write to it.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        self._connection.text_factory = bytes  # text may be damaged, too
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA cell_size_check = ON")
            self._connection.execute(
                "PRAGMA writable_schema = ON"
            )  # or a file that was cut is not read at all

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def complaints(self, *, limit: int = 3) -> list[str]:
        """What SQLite's own check finds, at most so much."""
        try:
            rows = self._connection.execute(f"PRAGMA quick_check({limit})").fetchall()
        except sqlite3.Error as error:
            return [str(error)]
        texts = [" ".join(text.decode(errors="replace").split()) for (text,) in rows]
        return [text.removeprefix("*** in database main *** ")[:120] for text in texts if text != "ok"]

    def aliases(self) -> dict[str, int]:
        """Alias -> cid, as far as they can be read."""
        rows = self._tried("SELECT alias, cid FROM aliases") or []
        return {alias.decode(): cid for alias, cid in rows}

    def collections(self) -> list[WreckedCollection]:
        """All collections that the database tells of, or, where it can't, those that have items."""
        columns = "cid, name, {}, fingerprint, dimensions"
        rows = self._tried(f"SELECT {columns.format('successor_of')} FROM collections ORDER BY cid")
        if rows is None:
            rows = self._tried(f"SELECT {columns.format('NULL')} FROM collections ORDER BY cid")
        if rows is None:
            cids = sorted({cid for _, cid in self._rows("items", "cid") if isinstance(cid, int)})
            found = [
                WreckedCollection(cid, f"rescued-{cid}", None, UNKNOWN_FINGERPRINT, None) for cid in cids
            ]
        else:
            found = [
                WreckedCollection(cid, (name or b"").decode(), successor_of, fingerprint.decode(), dimensions)
                for cid, name, successor_of, fingerprint, dimensions in rows
            ]
        for collection in found:
            collection.ids = self._ids(collection.cid)
        return found

    def _ids(self, cid: int) -> dict[int, str] | None:
        """From two indexes, which are apart from the items."""
        everything = self._tried(
            "SELECT rid, id FROM items INDEXED BY sqlite_autoindex_items_1 WHERE cid = ?", cid
        )
        deleted = self._tried(
            "SELECT rid FROM items INDEXED BY items_deleted WHERE cid = ? AND deleted_at IS NOT NULL", cid
        )
        if everything is None or deleted is None:
            return None
        gone = {rid for (rid,) in deleted}
        return {rid: item_id.decode(errors="replace") for rid, item_id in everything if rid not in gone}

    def items(self, collections: list[WreckedCollection]) -> Iterator[tuple[WreckedCollection, Item]]:
        """All living items that are whole; each is marked as read."""
        by_cid = {collection.cid: collection for collection in collections}
        for first in range(1, self._last_rid() + 1, _RIDS_AT_ONCE):
            last = first + _RIDS_AT_ONCE - 1
            vectors = dict(self._range("vectors", "vector", first, last))
            thumbnails = dict(self._range("thumbnails", "webp", first, last))
            for rid, *values in self._range(
                "items", "cid, id, metadata, sha256, source, deleted_at", first, last
            ):
                collection = by_cid.get(values[0])
                if collection is None or values[-1] is not None:
                    continue
                item = _item(values, vectors.get(rid), thumbnails.get(rid), collection)
                if item is not None:
                    collection.read.add(rid)
                    yield collection, item

    def _last_rid(self) -> int:
        """The greatest rid that anything tells of."""
        found = [0]
        for statement in (
            "SELECT seq FROM sqlite_sequence WHERE name = 'items'",
            "SELECT max(rid) FROM items",
            "SELECT max(rid) FROM vectors",
            "SELECT max(rid) FROM items INDEXED BY sqlite_autoindex_items_1",
        ):
            found += [rid for (rid,) in self._tried(statement) or [] if isinstance(rid, int)]
        return max(found)

    def _rows(self, table: str, columns: str) -> Iterator[tuple[Any, ...]]:
        for first in range(1, self._last_rid() + 1, _RIDS_AT_ONCE):
            yield from self._range(table, columns, first, first + _RIDS_AT_ONCE - 1)

    def _range(self, table: str, columns: str, first: int, last: int) -> Iterator[tuple[Any, ...]]:
        """The rows of some rids that can be read."""
        rows = self._tried(
            f"SELECT rid, {columns} FROM {table} WHERE rid BETWEEN ? AND ? ORDER BY rid", first, last
        )
        if rows is not None:
            yield from rows
        elif first < last:
            middle = (first + last) // 2
            yield from self._range(table, columns, first, middle)
            yield from self._range(table, columns, middle + 1, last)

    def _tried(self, statement: str, *parameters: int) -> list[Any] | None:
        """The rows; None where they can't be read."""
        try:
            return self._connection.execute(statement, parameters).fetchall()
        except (sqlite3.Error, OverflowError):
            return None


def _item(values: list[Any], vector: object, thumbnail: object, collection: WreckedCollection) -> Item | None:
    """None where something of it is damaged, its thumbnail aside."""
    _, item_id, metadata, sha256, source, _ = values
    vector_D = _vector(vector, collection.dimensions)
    if vector_D is None:
        return None
    try:
        said = json.loads(metadata)
        item = Item(
            id=item_id.decode(),
            vector=vector_D,
            metadata=said,
            sha256=sha256.decode(),
            source=None if source is None else source.decode(),
            thumbnail=thumbnail if isinstance(thumbnail, bytes) and thumbnail else None,
        )
    except (ValueError, AttributeError, TypeError):  # no UTF-8, no JSON, no text
        return None
    return item if isinstance(said, dict) else None


def _vector(stored: object, dimensions: int | None) -> Vector | None:
    if not isinstance(stored, bytes) or not stored or len(stored) % 4:
        return None
    vector_D = np.frombuffer(stored, dtype="<f4").astype(np.float32)
    if dimensions is not None and len(vector_D) != dimensions:
        return None
    length = float(np.linalg.norm(vector_D.astype(np.float64)))
    return vector_D if abs(length - 1.0) < 1e-3 else None  # NaN fails, too


def what_can_be_saved(path: Path) -> str:
    """What is wrong with a damaged database, and what can be read: a sentence for whoever is refused it."""
    with Wreck(path) as wreck:
        found = wreck.collections()
        for _ in wreck.items(found):
            pass
        complaints = wreck.complaints(limit=1)
    told = []
    for collection in found[:8]:
        lost = "an unknown number" if collection.lost is None else f"{len(collection.lost):,}"
        told.append(f"{collection.name or 'a successor'!r}: {len(collection.read):,} items, and {lost} not")
    if len(found) > 8:
        told.append(f"and {len(found) - 8} more collections")
    wrong = f" ({complaints[0]})" if complaints else ""
    if not told:
        return f"nothing of it can be read{wrong}"
    return (
        f"what can be read{wrong}: {'; '.join(told)}. Restore a copy, or save this with "
        "`dino-serve index rescue`"
    )
