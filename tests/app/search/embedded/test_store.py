"""The database when the disk says no, and what each commit costs."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.errors import StorageError
from app.search.collection import Item
from app.search.embedded import registry
from app.search.embedded.directory import prepare_database
from app.search.embedded.items import KnownItem, NewItem
from app.search.embedded.library import Collections
from app.search.embedded.store import Store

D = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(prepare_database(tmp_path))
    yield store
    store.close()


def row(rid: int, name: str) -> NewItem:
    return NewItem(rid, name, "{}", "", None, np.eye(1, D, dtype="<f4").tobytes(), b"webp")


def test_a_transaction_that_raises_leaves_nothing_behind(store: Store) -> None:
    with store.writing() as connection:
        cid = registry.add(connection, "a", fingerprint="f", dimensions=D, created_at=0.0).cid

    def interrupted() -> None:
        with store.writing() as connection:
            store.items.replace(connection, cid, seq=1, new=[row(1, "x")], old=[])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with store.reading() as connection:
        assert store.items.after(connection, cid, "", limit=10) == []
    with store.writing() as connection:
        store.items.replace(connection, cid, seq=1, new=[row(1, "x")], old=[])
    with store.reading() as connection:
        assert [item.id for item in store.items.after(connection, cid, "", limit=10)] == ["x"]


def test_a_reader_keeps_its_state_while_others_commit(store: Store) -> None:
    with store.writing() as connection:
        cid = registry.add(connection, "a", fingerprint="f", dimensions=D, created_at=0.0).cid
    with store.reading() as early:
        assert registry.seq(early, cid) == 0
        with store.writing() as connection:
            assert registry.next_seq(connection, cid) == 1
        with store.reading() as late:
            assert registry.seq(late, cid) == 1
        assert registry.seq(early, cid) == 0


def test_every_connection_waits_for_the_disk_at_each_commit(store: Store) -> None:
    """2 is FULL: without it a commit in WAL mode survives a kill, but not a power cut."""
    with store.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_rids_are_never_used_twice_not_even_after_a_restart(tmp_path: Path) -> None:
    path = prepare_database(tmp_path)
    store = Store(path)
    with store.writing() as connection:
        cid = registry.add(connection, "a", fingerprint="f", dimensions=D, created_at=0.0).cid
        (rid,) = store.items.reserve_rids(1)
        store.items.replace(connection, cid, seq=1, new=[row(rid, "x")], old=[])
        store.items.replace(connection, cid, seq=2, new=[], old=[KnownItem(rid, "x", "{}", "", None, False)])
    store.close()
    store = Store(path)
    assert list(store.items.reserve_rids(2)) == [rid + 1, rid + 2]
    store.close()


def test_a_full_disk_refuses_a_write_and_harms_neither_disk_nor_memory(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(2_000, D)).astype(np.float32)
    items = [Item(id=f"{i:04}", vector=v, metadata={"text": "x" * 500}) for i, v in enumerate(vectors)]
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        collection.upsert(items[:100], fingerprint="f")
        before = collection.search(vectors[:1], k=10)
        writer: sqlite3.Connection = collections._store._writer
        (pages,) = writer.execute("PRAGMA page_count").fetchone()
        writer.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageError, match="full; nothing was changed"):
            collection.upsert(items, fingerprint="f")
        assert collection.count() == 100
        assert collection.search(vectors[:1], k=10) == before
        writer.execute("PRAGMA max_page_count = 1000000")
        assert collection.upsert(items, fingerprint="f").count("added") == 1_900
        assert collection.count() == 2_000
    with Collections.open(tmp_path) as collections:
        assert collections.get("a").count() == 2_000


def test_a_database_locked_by_another_program_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.search.embedded.store._BUSY_TIMEOUT_S", 0.01)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        other = sqlite3.connect(tmp_path / "collections.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        item = Item(id="x", vector=np.ones(D, dtype=np.float32), metadata={})
        with pytest.raises(StorageError, match="held by another program"):
            collection.upsert([item], fingerprint="f")
        other.execute("ROLLBACK")
        other.close()
        assert collection.upsert([item], fingerprint="f") == ["added"]
