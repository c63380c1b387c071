"""The index of filters: a row for each value in an item's metadata, so that a filter reads what it finds.

`{"class": "dog", "camera": {"iso": 100}, "tags": ["beach"]}` of the item 7 is, sorted by path and value:

    class         TEXT           dog    7
    camera        OTHER          0      7
    camera, iso   NUMBER         100    7
    tags          OTHER          0      7
    tags          TEXT + MEMBER  beach  7

Null is no value and has no row. A long text is kept by its beginning; `app.search.filter_sql` knows when to
look at the whole. Rows are written and erased behind the items, many at a time, by `app.search.upkeep`.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

from app.search import blocks

NUMBER: Final = 0
TEXT: Final = 1
BOOLEAN: Final = 2
CUT: Final = 3  # a text longer than `MAX_TEXT`, by its first characters
OTHER: Final = 4  # a list or an object
MEMBER: Final = 8  # added to the kind of what is in a list
MAX_TEXT: Final = 128  # characters
_MAX_REMEMBERED: Final = 20_000  # paths; keys that are ids make many

Keys: TypeAlias = tuple[str, ...]


class Fields:
    """The rows of all collections of a database, and the numbers of their paths."""

    def __init__(self) -> None:
        self._paths: dict[tuple[int, Keys], int] = {}

    def forget(self) -> None:
        """Forgets the numbers of paths: a transaction that made some was rolled back."""
        self._paths = {}

    def path(self, connection: sqlite3.Connection, cid: int, keys: Keys) -> int | None:
        """The number of a path; None where no item has it."""
        known = self._paths.get((cid, keys))
        if known is not None:
            return known
        row = connection.execute(
            "SELECT path FROM paths WHERE cid = ? AND keys = ?", (cid, _text(keys))
        ).fetchone()
        return None if row is None else self._remember(cid, keys, int(row[0]))

    def add(self, connection: sqlite3.Connection, items: Iterable[tuple[int, int, str]]) -> None:
        """Writes the rows of items, of which rids, cids and metadata are given."""
        rows = []
        for rid, cid, metadata in items:
            for keys, kind, value in field_values(json.loads(metadata)):
                path = self.path(connection, cid, keys)
                if path is None:
                    path = self._make(connection, cid, keys)
                rows.append((path, kind, value, rid))
        # In order, so that rows of one page follow each other. A list may have a member twice.
        blocks.insert(connection, "fields (path, kind, value, rid)", sorted(rows), or_ignore=True)

    def erase(self, connection: sqlite3.Connection, items: Iterable[tuple[int, int, str]]) -> None:
        """Erases the rows of items, of which rids, cids and metadata are given, if there are any."""
        rows = []
        for rid, cid, metadata in items:
            for keys, kind, value in field_values(json.loads(metadata)):
                path = self.path(connection, cid, keys)
                if path is not None:
                    rows.append((path, kind, value, rid))
        blocks.delete_where(connection, "fields", ("path", "kind", "value", "rid"), sorted(rows))

    def erase_collection(self, connection: sqlite3.Connection, cid: int, *, limit: int) -> bool:
        """Erases some rows of a collection, whatever items they are of; False when nothing was left."""
        found = connection.execute("SELECT path FROM paths WHERE cid = ? LIMIT 1", (cid,)).fetchone()
        if found is None:
            return False
        (path,) = found
        beyond = connection.execute(
            "SELECT kind, value, rid FROM fields WHERE path = ? ORDER BY kind, value, rid LIMIT 1 OFFSET ?",
            (path, limit),
        ).fetchone()
        if beyond is not None:
            connection.execute(
                "DELETE FROM fields WHERE path = ? AND (kind, value, rid) < (?, ?, ?)", (path, *beyond)
            )
        else:
            connection.execute("DELETE FROM fields WHERE path = ?", (path,))
            connection.execute("DELETE FROM paths WHERE path = ?", (path,))
        return True

    def _make(self, connection: sqlite3.Connection, cid: int, keys: Keys) -> int:
        cursor = connection.execute("INSERT INTO paths (cid, keys) VALUES (?, ?)", (cid, _text(keys)))
        assert cursor.lastrowid is not None
        return self._remember(cid, keys, cursor.lastrowid)

    def _remember(self, cid: int, keys: Keys, path: int) -> int:
        if len(self._paths) >= _MAX_REMEMBERED:
            self._paths = {}
        self._paths[cid, keys] = path
        return path


def _text(keys: Keys) -> str:
    return json.dumps(keys, ensure_ascii=False)


def field_values(
    metadata: dict[str, object], outer: Keys = ()
) -> Iterator[tuple[Keys, int, int | float | str]]:
    """Path, kind and value of each row that metadata have."""
    for key, value in metadata.items():
        keys = (*outer, key)
        scalar = _scalar(value)
        if scalar is not None:
            yield keys, *scalar
        elif isinstance(value, dict):
            yield keys, OTHER, 0
            yield from field_values(value, keys)
        elif isinstance(value, list):
            yield keys, OTHER, 0
            for member in value:
                scalar = _scalar(member)
                if scalar is not None:
                    yield keys, MEMBER + scalar[0], scalar[1]


def _scalar(value: object) -> tuple[int, int | float | str] | None:
    if isinstance(value, str):
        return (TEXT, value) if len(value) <= MAX_TEXT else (CUT, value[:MAX_TEXT])
    if isinstance(value, bool):
        return BOOLEAN, int(value)
    if isinstance(value, int | float):
        return NUMBER, value
    return None
