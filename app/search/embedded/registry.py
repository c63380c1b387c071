"""SQL on collections, their aliases and their successors; each call is part of its caller's transaction."""

import sqlite3
from dataclasses import dataclass

_COLUMNS = "cid, name, successor_of, fingerprint, dimensions, created_at, seq"


@dataclass(frozen=True)
class CollectionRow:
    """A collection as it is on disk.

    Attributes:
        name: None for a successor.
        successor_of: The cid of the collection whose place it shall take, or None.
        seq: How many commits it has seen.
    """

    cid: int
    name: str | None
    successor_of: int | None
    fingerprint: str
    dimensions: int
    created_at: float
    seq: int


def collections(connection: sqlite3.Connection) -> list[CollectionRow]:
    """All collections, successors too, in order of cid."""
    return [
        CollectionRow(*row) for row in connection.execute(f"SELECT {_COLUMNS} FROM collections ORDER BY cid")
    ]


def add(
    connection: sqlite3.Connection,
    name: str | None,
    *,
    successor_of: int | None = None,
    fingerprint: str,
    dimensions: int,
    created_at: float,
) -> CollectionRow:
    """Writes a new collection, or a successor."""
    row = connection.execute(
        "INSERT INTO collections (name, successor_of, fingerprint, dimensions, created_at)"
        f" VALUES (?, ?, ?, ?, ?) RETURNING {_COLUMNS}",
        (name, successor_of, fingerprint, dimensions, created_at),
    ).fetchone()
    return CollectionRow(*row)


def remove(connection: sqlite3.Connection, cid: int) -> None:
    """Deletes a collection and the aliases that lead to it; its items are erased bit by bit."""
    connection.execute("INSERT INTO dropped (cid) VALUES (?)", (cid,))
    connection.execute("DELETE FROM aliases WHERE cid = ?", (cid,))
    connection.execute("DELETE FROM collections WHERE cid = ?", (cid,))


def seq(connection: sqlite3.Connection, cid: int) -> int | None:
    """How many commits a collection has seen; None where it was dropped."""
    row = connection.execute("SELECT seq FROM collections WHERE cid = ?", (cid,)).fetchone()
    return None if row is None else int(row[0])


def next_seq(connection: sqlite3.Connection, cid: int) -> int | None:
    """Counts a commit; None where the collection was dropped."""
    row = connection.execute(
        "UPDATE collections SET seq = seq + 1 WHERE cid = ? RETURNING seq", (cid,)
    ).fetchone()
    return None if row is None else int(row[0])


def promote(connection: sqlite3.Connection, *, successor: int, predecessor: int, retired_name: str) -> None:
    """Gives a successor the name and the aliases of its predecessor, and that one another name."""
    (name,) = connection.execute("SELECT name FROM collections WHERE cid = ?", (predecessor,)).fetchone()
    connection.execute("UPDATE collections SET name = ? WHERE cid = ?", (retired_name, predecessor))
    connection.execute(
        "UPDATE collections SET name = ?, successor_of = NULL WHERE cid = ?", (name, successor)
    )
    connection.execute("UPDATE aliases SET cid = ? WHERE cid = ?", (successor, predecessor))


def aliases(connection: sqlite3.Connection) -> dict[str, int]:
    """Alias -> cid."""
    return dict(connection.execute("SELECT alias, cid FROM aliases"))


def set_alias(connection: sqlite3.Connection, alias: str, cid: int) -> None:
    """Lets an alias lead to a collection, wherever it led before."""
    connection.execute(
        "INSERT INTO aliases (alias, cid) VALUES (?, ?) ON CONFLICT (alias) DO UPDATE SET cid = excluded.cid",
        (alias, cid),
    )


def remove_alias(connection: sqlite3.Connection, alias: str) -> None:
    """Forgets an alias."""
    connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,))
