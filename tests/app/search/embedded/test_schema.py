"""A database of an older schema becomes one of today's, with all that was in it."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from app.search.collection import Item
from app.search.embedded import schema
from app.search.embedded.directory import DATABASE_NAME
from app.search.embedded.library import Collections
from tests.app.search.schema_1 import D, fill_schema_1


def test_an_older_database_is_brought_up_to_date_with_all_that_was_in_it(tmp_path: Path) -> None:
    expected = fill_schema_1(tmp_path / "data", count=50, deleted_at=time.time())
    with Collections.open(tmp_path / "data") as collections:
        (info,) = collections.list()
        assert (info.name, info.fingerprint, info.items, info.created_at) == ("old", "sha256:old", 50, 12.5)
        old = collections.get("old")
        page = old.scroll(cursor=None, limit=100)
        assert {item.id: item.metadata for item in page.items} == expected
        assert old.thumbnail("007") == b"webp"
        assert old.seq == 9
        assert old.count({"field": "number", "lt": 10}) == 10
        ((nearest,),) = old.search(page.items[7].vector[None], k=1)
        assert (nearest.id, nearest.score) == ("007", 1.0)
        assert old.undelete(["050"]) == 1
        collections.set_alias("alias", "old")
        collections.begin_successor("old", fingerprint="new", dimensions=D)
        assert collections.create("new", fingerprint="f", dimensions=3).cid > 8, "no number is used twice"
        one = Item(id="051", vector=np.ones(D, dtype=np.float32), metadata={})
        assert old.upsert([one], fingerprint="sha256:old") == ["added"]
    with Collections.open(tmp_path / "data") as collections:
        assert collections.get("alias").count() == 52


def test_a_migration_that_fails_leaves_the_older_database_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fill_schema_1(tmp_path / "data", count=5)
    before = everything_in(tmp_path / "data" / DATABASE_NAME)
    monkeypatch.setattr(schema, "_FROM_1", schema._FROM_1 + "INSERT INTO nowhere VALUES (1);")
    with pytest.raises(Exception, match="nothing was changed"):
        Collections.open(tmp_path / "data")
    assert everything_in(tmp_path / "data" / DATABASE_NAME) == before
    monkeypatch.undo()
    with Collections.open(tmp_path / "data") as collections:
        assert collections.get("old").count() == len(expected)


def everything_in(database: Path) -> list[str]:
    with closing(sqlite3.connect(database)) as connection:
        return [*connection.iterdump(), str(connection.execute("PRAGMA user_version").fetchone())]


def test_a_migrated_database_has_the_tables_of_a_new_one(tmp_path: Path) -> None:
    fill_schema_1(tmp_path / "old", count=5)
    Collections.open(tmp_path / "old").close()
    Collections.open(tmp_path / "new").close()
    assert tables_of(tmp_path / "old") == tables_of(tmp_path / "new")


def tables_of(directory: Path) -> dict[str, list[str]]:
    """Each table and index, by the words of its statement."""
    with closing(sqlite3.connect(directory / DATABASE_NAME)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        return {name: sql.replace('"', "").split() for name, sql in rows}
