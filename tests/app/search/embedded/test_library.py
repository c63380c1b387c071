"""The collections of a directory: what is there after it was closed and opened again."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.errors import StorageError
from app.search.collection import GRACE_S, Item
from app.search.embedded.collection import EmbeddedCollection
from app.search.embedded.library import Collections

D = 8
TABLES = ("items", "vectors", "thumbnails", "fields")


def items(count: int) -> list[Item]:
    vectors = np.random.default_rng(0).normal(size=(count, D)).astype(np.float32)
    return [
        Item(id=f"{i:05}", vector=vector, metadata={"i": i}, source=f"/photos/{i}.jpg", thumbnail=b"webp")
        for i, vector in enumerate(vectors)
    ]


def test_everything_is_there_after_closing_and_opening(tmp_path: Path) -> None:
    batch = items(5_000)  # more than are read from disk at once
    with Collections.open(tmp_path) as collections:
        collection = collections.create("default", fingerprint="f", dimensions=D)
        collections.create("empty", fingerprint="g", dimensions=3)
        collection.upsert(batch, fingerprint="f")
        collection.upsert(
            [Item(id="00001", vector=batch[2].vector, metadata={"changed": True})], fingerprint="f"
        )
        collection.delete(["00000"])
        before = collection.search(batch[2].vector[None], k=10)
    with Collections.open(tmp_path) as collections:
        assert [(c.name, c.items, c.fingerprint, c.dimensions) for c in collections.list()] == [
            ("default", 4_999, "f", D),
            ("empty", 0, "g", 3),
        ]
        collection = collections.get("default")
        assert collection.search(batch[2].vector[None], k=10) == before
        assert [n.id for n in before[0][:2]] == ["00001", "00002"]
        assert collection.thumbnail("00002") == b"webp"
        deleted, kept = collection.get(["00000", "04999"])
        assert deleted is None
        assert kept is not None
        assert (kept.metadata, kept.source) == ({"i": 4_999}, "/photos/4999.jpg")
        assert collection.upsert(batch[2:4], fingerprint="f") == ["unchanged"] * 2
        assert collection.upsert([batch[0]], fingerprint="f") == ["added"]
        assert collections.get("empty").search(np.ones((1, 3)), k=1) == [[]]


def test_a_collection_made_while_its_namesake_is_dropped_is_kept_or_gone_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collections.open(tmp_path) as collections:
        collections.create("a", fingerprint="f", dimensions=D)
        look_up, drop = collections.get, collections.drop

        def look_up_and_lose(name: str) -> EmbeddedCollection:
            """Between looking and dropping, others drop it and make it anew."""
            found = look_up(name)
            drop(name)
            return collections.create(name, fingerprint="g", dimensions=D) and found

        monkeypatch.setattr(collections, "get", look_up_and_lose)
        collections.drop("a")
        in_memory = [one.name for one in collections.list()]
    with Collections.open(tmp_path) as collections:
        assert [one.name for one in collections.list()] == in_memory


def test_a_dropped_collection_stays_dropped(tmp_path: Path) -> None:
    with Collections.open(tmp_path) as collections:
        for name in ("kept", "dropped"):
            collections.create(name, fingerprint="f", dimensions=D).upsert(items(10), fingerprint="f")
        collections.drop("dropped")
    with Collections.open(tmp_path) as collections:
        assert [(c.name, c.items) for c in collections.list()] == [("kept", 10)]


def test_closing_twice_is_allowed_and_a_closed_collection_says_that_it_is(tmp_path: Path) -> None:
    collections = Collections.open(tmp_path)
    collection = collections.create("default", fingerprint="f", dimensions=D)
    collections.close()
    collections.close()
    with pytest.raises(StorageError, match="closed"):
        collection.upsert(items(1), fingerprint="f")
    with pytest.raises(StorageError, match="closed"):
        collection.search(np.ones((1, D)), k=1)


def test_what_was_deleted_leaves_the_disk_after_its_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = b"SECRET" * 1_000
    first, second = items(2)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("default", fingerprint="f", dimensions=D)
        collection.upsert([Item(id="a", vector=first.vector, metadata={}, thumbnail=secret)], fingerprint="f")
        collection.upsert([second], fingerprint="f")
        collection.delete(["a"])
    database = tmp_path / "collections.sqlite"
    assert secret in database.read_bytes()
    later = time.time() + GRACE_S + 1
    monkeypatch.setattr(time, "time", lambda: later)
    with Collections.open(tmp_path) as collections:
        collection = collections.get("default")
        assert collection.count() == 1
        assert collection.undelete(["a"]) == 0
        wait_until(lambda: rows_in(database) == each(1) | {"dropped": 0, "paths": 1})
    assert b"SECRET" * 100 not in database.read_bytes()


def rows_in(database: Path) -> dict[str, int]:
    connection = sqlite3.connect(database)
    try:
        return {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in (*TABLES, "dropped", "paths")
        }
    finally:
        connection.close()


def each(count: int) -> dict[str, int]:
    """So many rows in each table."""
    return dict.fromkeys(TABLES, count)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_what_a_dropped_collection_had_leaves_the_disk_bit_by_bit_and_its_room_is_used_again(
    tmp_path: Path,
) -> None:
    database = tmp_path / "collections.sqlite"
    with Collections.open(tmp_path) as collections:
        kept = collections.create("kept", fingerprint="f", dimensions=D)
        kept.upsert(items(10), fingerprint="f")
        sizes = []
        for _ in range(4):
            dropped = collections.create("dropped", fingerprint="f", dimensions=D)
            dropped.upsert(items(1_000), fingerprint="f")
            collections.drop("dropped")
            wait_until(lambda: rows_in(database) == each(10) | {"dropped": 0, "paths": 1})
            sizes.append(collections._store.used_bytes())
            connection = sqlite3.connect(database)
            sizes.append(connection.execute("PRAGMA page_count").fetchone()[0])
            connection.close()
        assert sizes[4:6] == sizes[6:8], "the fourth collection takes the room of the third"
        assert kept.count({"field": "i", "gte": 0}) == 10


def test_adding_what_is_there_costs_no_commit(tmp_path: Path) -> None:
    with Collections.open(tmp_path) as collections:
        collection = collections.create("default", fingerprint="f", dimensions=D)
        collection.upsert(items(10), fingerprint="f")
        onlooker = sqlite3.connect(tmp_path / "collections.sqlite")
        before = onlooker.execute("PRAGMA data_version").fetchone()
        collection.upsert(items(10), fingerprint="f")
        assert onlooker.execute("PRAGMA data_version").fetchone() == before
        collection.delete(["00000"])
        assert onlooker.execute("PRAGMA data_version").fetchone() != before
        onlooker.close()


def test_an_update_in_a_batch_with_unchanged_items_writes_only_itself(tmp_path: Path) -> None:
    batch = items(3)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("default", fingerprint="f", dimensions=D)
        collection.upsert(batch, fingerprint="f")
        batch[1] = Item(id="00001", vector=batch[1].vector, metadata={"new": True})
        assert collection.upsert(batch, fingerprint="f") == ["unchanged", "updated", "unchanged"]
        (neighbours,) = collection.search(batch[1].vector[None], k=3)
        assert neighbours[0].metadata == {"new": True}
        assert sorted(n.id for n in neighbours) == ["00000", "00001", "00002"]


def test_a_note_that_can_not_be_written_splits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit is found by searches and counted even where no file can be opened after it."""
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=4)

        def no_more_files(*_: object) -> int:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as without_files:
            without_files.setattr("app.search.embedded.acknowledged.os.open", no_more_files)
            assert collection.upsert(
                [Item(id="x", vector=np.ones(4, dtype=np.float32), metadata={})], fingerprint="f"
            ) == ["added"]
        assert collection.count() == 1
        assert collection.search(np.ones((1, 4)), k=1)[0][0].id == "x"


def test_dropping_one_collection_keeps_the_note_of_another(tmp_path: Path) -> None:
    with Collections.open(tmp_path) as collections:
        kept = collections.create("kept", fingerprint="f", dimensions=4)
        collections.create("dropped", fingerprint="f", dimensions=4)
        kept.upsert([Item(id="x", vector=np.ones(4, dtype=np.float32), metadata={})], fingerprint="f")
        collections.drop("dropped")
        assert (tmp_path / "acknowledged").exists()
        collections.drop("kept")
        assert not (tmp_path / "acknowledged").exists()
