"""Databases of schema 1, written by its own statements."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from app.search.embedded.directory import DATABASE_NAME

D = 24
_SCHEMA_1 = """
CREATE TABLE collections (
    cid INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    fingerprint TEXT NOT NULL,
    dimensions INTEGER NOT NULL,
    created_at REAL NOT NULL,
    seq INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE items (
    rid INTEGER PRIMARY KEY AUTOINCREMENT,
    cid INTEGER NOT NULL,
    id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    source TEXT,
    deleted_at REAL,
    UNIQUE (cid, id)
) STRICT;
CREATE INDEX items_deleted ON items (deleted_at) WHERE deleted_at IS NOT NULL;
CREATE TABLE vectors (rid INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT;
CREATE TABLE thumbnails (rid INTEGER PRIMARY KEY, webp BLOB NOT NULL) STRICT;
PRAGMA application_id = 1145654863;
PRAGMA user_version = 1;
"""


def fill_schema_1(directory: Path, *, count: int, deleted_at: float | None = None) -> dict[str, Any]:
    """A directory with a collection "old" whose last item is deleted, and traces of one that was dropped.

    Returns:
        The metadata of each living item.
    """
    directory.mkdir()
    vectors = np.random.default_rng(0).normal(size=(count + 1, D))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with closing(sqlite3.connect(directory / DATABASE_NAME, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size = 8192")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(f"BEGIN; {_SCHEMA_1} COMMIT;")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO collections VALUES (7, 'dropped', 'g', 3, 0.0, 5)")
        connection.execute("DELETE FROM collections")
        connection.execute("INSERT INTO collections VALUES (3, 'old', 'sha256:old', ?, 12.5, 9)", (D,))
        for number, vector in enumerate(vectors):
            rid = 100 + number
            connection.execute(
                "INSERT INTO items VALUES (?, 3, ?, 1, ?, '', 'from', ?)",
                (rid, f"{number:03}", f'{{"number":{number}}}', deleted_at if number == count else None),
            )
            connection.execute("INSERT INTO vectors VALUES (?, ?)", (rid, vector.astype("<f4").tobytes()))
            connection.execute("INSERT INTO thumbnails VALUES (?, ?)", (rid, b"webp"))
        connection.execute("COMMIT")
    kept = count if deleted_at is not None else count + 1
    return {f"{number:03}": {"number": number} for number in range(kept)}
