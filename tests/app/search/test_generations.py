"""Aliases, successors and snapshots of a directory: after it was opened again, and for readers meanwhile."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from app.errors import StorageError, UnknownCollection
from app.search.collection import Item
from app.search.directory import DATABASE_NAME
from app.search.embedded import EmbeddedCollection
from app.search.library import Collections

D = 8


def fill(collection: EmbeddedCollection, count: int) -> None:
    vectors = np.random.default_rng(count).normal(size=(count, D))
    collection.upsert(
        [Item(id=f"{i:04}", vector=vector, metadata={"i": i}) for i, vector in enumerate(vectors)],
        fingerprint=collection.fingerprint,
    )


def test_aliases_and_successors_are_there_after_closing_and_opening(tmp_path: Path) -> None:
    with Collections.open(tmp_path) as collections:
        fill(collections.create("a", fingerprint="sha256:0123456789abcdef", dimensions=D), 5)
        collections.set_alias("current", "a")
        fill(collections.begin_successor("a", fingerprint="new", dimensions=D), 3)
    with Collections.open(tmp_path) as collections:
        (info,) = collections.list()
        assert (info.name, info.aliases, info.items) == ("a", ("current",), 5)
        assert info.successor is not None
        assert info.successor.items == 3
        assert collections.begin_successor("a", fingerprint="new", dimensions=D).count() == 3
        assert collections.finish_successor("a") == "a-01234567"
    with Collections.open(tmp_path) as collections:
        assert [(c.name, c.fingerprint, c.items, c.aliases) for c in collections.list()] == [
            ("a", "new", 3, ("current",)),
            ("a-01234567", "sha256:0123456789abcdef", 5, ()),
        ]
        collections.begin_successor("a", fingerprint="newer", dimensions=D)
        collections.cancel_successor("a")
        collections.drop_alias("current")
    with Collections.open(tmp_path) as collections:
        assert [(c.name, c.aliases, c.successor) for c in collections.list()] == [
            ("a", (), None),
            ("a-01234567", (), None),
        ]


def test_no_reader_finds_neither_or_both_while_successors_take_over(tmp_path: Path) -> None:
    with Collections.open(tmp_path) as collections:
        fill(collections.create("a", fingerprint="f0", dimensions=D), 20)
        collections.set_alias("alias", "a")
        stop = threading.Event()
        failures: list[str] = []

        def read() -> None:
            query = np.ones((1, D))
            while not stop.is_set():
                try:
                    found = collections.get("alias").search(query, k=50)[0]
                    named = [info for info in collections.list() if info.name == "a"]
                except UnknownCollection as error:  # the one that was replaced was dropped meanwhile
                    if "was deleted" not in str(error):
                        failures.append(str(error))
                    continue
                if len(found) != 20 or len(named) != 1 or named[0].aliases != ("alias",):
                    failures.append(f"{len(found)} {named}")

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for generation in range(1, 15):
            fill(collections.begin_successor("a", fingerprint=f"f{generation}", dimensions=D), 20)
            collections.drop(collections.finish_successor("a"))
        stop.set()
        for reader in readers:
            reader.join()
        assert failures == []
        assert collections.get("alias").fingerprint == "f14"


def test_a_snapshot_is_a_directory_s_database_of_one_moment(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    with Collections.open(tmp_path / "a") as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        fill(collection, 50)
        collections.set_alias("alias", "a")
        collection.delete(["0000"])
        collections.snapshot(tmp_path / "b" / DATABASE_NAME)
        collection.delete(["0001"])
        assert [path.name for path in (tmp_path / "b").iterdir()] == [DATABASE_NAME]
    with Collections.open(tmp_path / "b") as collections:
        copied = collections.get("alias")
        assert copied.count() == 49
        assert copied.undelete(["0000"]) == 1
        assert copied.count({"field": "i", "lt": 10}) == 10


def test_snapshots_are_whole_while_others_write_and_writers_go_on(tmp_path: Path) -> None:
    """Each write replaces all items at once, so that a mixture would show."""
    vectors = np.random.default_rng(0).normal(size=(200, D))
    with Collections.open(tmp_path / "a") as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        stop = threading.Event()
        written = 0

        def write() -> None:
            nonlocal written
            while not stop.is_set():
                items = [Item(id=f"{i}", vector=v, metadata={"n": written}) for i, v in enumerate(vectors)]
                collection.upsert(items, fingerprint="f")
                written += 1

        writer = threading.Thread(target=write)
        writer.start()
        before = 0
        for number in range(5):
            collections.snapshot(tmp_path / f"{number}.snapshot")
            assert written >= before
            before = written
        stop.set()
        writer.join()
    for number in range(5):
        with closing(sqlite3.connect(tmp_path / f"{number}.snapshot")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            metadata = connection.execute("SELECT metadata, count(*) FROM items GROUP BY metadata").fetchall()
            assert len(metadata) <= 1
            assert all(count == 200 for _, count in metadata)


def test_a_snapshot_never_writes_over_a_file_and_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    with Collections.open(tmp_path / "a") as collections:
        collections.create("a", fingerprint="f", dimensions=D)
        with pytest.raises(StorageError, match="is there already"):
            collections.snapshot(taken)
        with pytest.raises(StorageError, match="can't be opened for writing"):
            collections.snapshot(tmp_path / "no such directory" / "b")
    assert taken.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "taken"]
