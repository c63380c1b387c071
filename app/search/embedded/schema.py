"""The tables of the database, and how an older one becomes today's."""

import logging
import sqlite3
from typing import Final

from app.errors import StorageError

logger = logging.getLogger(__name__)

APPLICATION_ID: Final = 0x44494E4F  # "DINO" in ASCII; SQLite keeps it in the file's header
SCHEMA_VERSION: Final = 2

# Vectors and thumbnails are apart from the items, so that a filter, which reads every item's metadata, reads
# only small pages. They are in the same file, because SQLite in WAL mode commits several files one by one: a
# crash between two of them would leave an item without its thumbnail, and so would a copy of one without the
# other. A backup that shall be small can leave the table out.
# A rid is never used twice, and an updated or undeleted item gets a new one: a rid names one vector for ever.
# A successor has no name until it takes its predecessor's.
_COLLECTIONS: Final = """
CREATE TABLE collections (
    cid INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT UNIQUE,
    successor_of INTEGER UNIQUE,
    fingerprint TEXT NOT NULL,
    dimensions INTEGER NOT NULL,
    created_at REAL NOT NULL,
    seq INTEGER NOT NULL DEFAULT 0,
    CHECK ((name IS NULL) <> (successor_of IS NULL))
) STRICT;
"""
_ITEMS: Final = """
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
CREATE TABLE vectors (rid INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT;
CREATE TABLE thumbnails (rid INTEGER PRIMARY KEY, webp BLOB NOT NULL) STRICT;
"""
# `fields` is the index of filters, see `fields.py`. It is written behind the items, many at a time,
# because an item has its rows all over it: `state` says up to which rid, and whether a process has the
# database open. For the same reason what an update replaces is erased later, all but the item's row:
# `garbage` has what. `dropped` has the collections whose items are yet to be erased, up to the rid that was
# reached.
_SINCE_2: Final = """
CREATE TABLE aliases (alias TEXT PRIMARY KEY, cid INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE INDEX items_deleted ON items (cid, deleted_at) WHERE deleted_at IS NOT NULL;
CREATE TABLE paths (
    path INTEGER PRIMARY KEY,
    cid INTEGER NOT NULL,
    keys TEXT NOT NULL,
    UNIQUE (cid, keys)
) STRICT;
CREATE TABLE fields (
    path INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    value ANY NOT NULL,
    rid INTEGER NOT NULL,
    PRIMARY KEY (path, kind, value, rid)
) STRICT, WITHOUT ROWID;
CREATE TABLE garbage (rid INTEGER PRIMARY KEY, cid INTEGER NOT NULL, metadata TEXT NOT NULL) STRICT;
CREATE TABLE state (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO state (name, value) VALUES ('indexed', 0), ('open', 0);
CREATE TABLE dropped (cid INTEGER PRIMARY KEY, reached INTEGER NOT NULL DEFAULT 0) STRICT;
"""
_HEADER: Final = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""
CREATE: Final = f"{_COLLECTIONS} {_ITEMS} {_SINCE_2} {_HEADER}"

_FROM_1: Final = f"""
DROP INDEX items_deleted;
ALTER TABLE collections RENAME TO collections_1;
{_COLLECTIONS}
INSERT INTO collections (cid, name, fingerprint, dimensions, created_at, seq)
    SELECT cid, name, fingerprint, dimensions, created_at, seq FROM collections_1;
DELETE FROM sqlite_sequence WHERE name = 'collections';
UPDATE sqlite_sequence SET name = 'collections' WHERE name = 'collections_1';
DROP TABLE collections_1;
{_SINCE_2}
{_HEADER}
"""


def migrate(connection: sqlite3.Connection) -> None:
    """Makes an older database today's, in one transaction: a crash leaves the old one whole.

    The index of filters is empty at first; it is written behind the items as ever.

    Raises:
        StorageError: It is of a newer version.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == SCHEMA_VERSION:
        return
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"the database was written by a newer dinoserve (schema {version}; this one reads up to "
            f"{SCHEMA_VERSION}): upgrade dinoserve"
        )
    logger.info("bringing the database from schema %d to %d", version, SCHEMA_VERSION)
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in _statements(_FROM_1):
            connection.execute(statement)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _statements(script: str) -> list[str]:
    """One by one, because `executescript` commits first."""
    return [statement for statement in script.split(";") if statement.strip()]
