"""The index of filters: a row for each value in an item's metadata, so that a filter reads what it finds.

`{"class": "dog", "camera": {"iso": 100}, "tags": ["beach"]}` of the item 7 is, sorted by path and value:

    class         TEXT           dog    7
    camera        OTHER          0      7
    camera, iso   NUMBER         100    7
    tags          OTHER          0      7
    tags          TEXT + MEMBER  beach  7

Null is no value and has no row. A long text is kept by its beginning; `filter_sql` knows when to look at the
whole. Rows are written and erased behind the items, many at a time, by `upkeep`.
"""

import json
import sqlite3
import time
from collections.abc import Iterable
from typing import Final, TypeAlias

from app.search.embedded import blocks

NUMBER: Final = 0
TEXT: Final = 1
BOOLEAN: Final = 2
CUT: Final = 3  # a text longer than `MAX_TEXT`, by its first characters
OTHER: Final = 4  # a list or an object
MEMBER: Final = 8  # added to the kind of what is in a list
MAX_TEXT: Final = 128  # characters
_ITEMS_A_BREATH: Final = 64
_BREATH_S: Final = 50e-6
_MAX_REMEMBERED: Final = 20_000  # paths; keys that are ids make many

Keys: TypeAlias = tuple[str, ...]
# A collection's cid and a path -> kind, value and rid of each row.
FieldRows: TypeAlias = dict[tuple[int, Keys], list[tuple[int, int | float | str, int]]]


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

    def add(self, connection: sqlite3.Connection, rows: FieldRows) -> None:
        """Writes rows, those that are there already aside."""
        for (cid, keys), values in rows.items():
            path = self.path(connection, cid, keys)
            if path is None:
                path = self._make(connection, cid, keys)
            blocks.insert(
                connection,
                "fields (path, kind, value, rid)",
                [(path, *value) for value in values],
                or_ignore=True,  # a list may have a member twice
            )

    def erase(self, connection: sqlite3.Connection, rows: FieldRows) -> None:
        """Erases rows, as far as they are there."""
        for (cid, keys), values in rows.items():
            path = self.path(connection, cid, keys)
            if path is not None:
                blocks.delete_where(
                    connection,
                    "fields",
                    ("path", "kind", "value", "rid"),
                    [(path, *value) for value in values],
                )

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


def rows_of(items: Iterable[tuple[int, int, str]]) -> FieldRows:
    """The rows of items, of which rids, cids and metadata are given; those of a path in order."""
    rows: FieldRows = {}
    for number, (rid, cid, metadata) in enumerate(items):
        if number % _ITEMS_A_BREATH == _ITEMS_A_BREATH - 1:
            time.sleep(_BREATH_S)  # a search that waits for Python's lock has it now, and not in 5 ms
        _collect(rows, cid, rid, json.loads(metadata), ())
    for values in rows.values():
        values.sort()  # rows of one page follow each other
    return rows


def _collect(rows: FieldRows, cid: int, rid: int, metadata: dict[str, object], outer: Keys) -> None:
    for key, value in metadata.items():
        if value is None:
            continue
        keys = (*outer, key)
        values = rows.get((cid, keys))
        if values is None:
            values = rows[cid, keys] = []
        if type(value) is str and len(value) <= MAX_TEXT:  # by far the most
            values.append((TEXT, value, rid))
        elif isinstance(value, dict):
            values.append((OTHER, 0, rid))
            _collect(rows, cid, rid, value, keys)
        elif isinstance(value, list):
            values.append((OTHER, 0, rid))
            values += [(MEMBER + kind, member, rid) for kind, member in map(_scalar, value) if kind != OTHER]
        else:
            values.append((*_scalar(value), rid))


def _scalar(value: object) -> tuple[int, int | float | str]:
    if isinstance(value, str):
        return (TEXT, value) if len(value) <= MAX_TEXT else (CUT, value[:MAX_TEXT])
    if isinstance(value, bool):
        return BOOLEAN, int(value)
    if isinstance(value, int | float):
        return NUMBER, value
    return OTHER, 0  # in a list: nothing that a filter can ask for
