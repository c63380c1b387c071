"""What is done behind the writers: it catches up, it keeps the journal small, and nobody waits for it."""

import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from app.search.collection import Item
from app.search.embedded import upkeep
from app.search.embedded.directory import DATABASE_NAME
from app.search.embedded.library import Collections

D = 16


def items(numbers: range, *, version: int = 0) -> list[Item]:
    vectors = np.random.default_rng(version).normal(size=(len(numbers), D)).astype(np.float32)
    return [
        Item(id=f"{n:05}", vector=vector, metadata={"n": n, "version": version}, thumbnail=b"webp")
        for n, vector in zip(numbers, vectors, strict=True)
    ]


def counted(directory: Path) -> dict[str, int]:
    with closing(sqlite3.connect(directory / DATABASE_NAME)) as connection:
        counts: dict[str, int] = {
            table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("items", "vectors", "thumbnails", "garbage", "fields")
        }
        (counts["indexed"],) = connection.execute("SELECT value FROM state WHERE name = 'indexed'").fetchone()
    return counts


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_what_updates_replaced_is_erased_and_the_index_is_written_once_writers_rest(tmp_path: Path) -> None:
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        for version in range(5):
            collection.upsert(items(range(300), version=version), fingerprint="f")
        assert collection.count({"field": "version", "eq": 4}) == 300
        assert collection.count({"field": "version", "lt": 4}) == 0
        expected = {
            "items": 300,
            "vectors": 300,
            "thumbnails": 300,
            "garbage": 0,
            "fields": 600,
            "indexed": 1_500,
        }
        wait_until(lambda: counted(tmp_path) == expected)
        assert collection.count({"field": "version", "eq": 4}) == 300


def test_writers_that_are_faster_than_the_upkeep_do_its_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 60.0)
    monkeypatch.setattr(upkeep, "INDEX_AT_ONCE", 10_000)  # so that nothing wakes the thread
    monkeypatch.setattr(upkeep, "MAX_BEHIND", 250)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        for start in range(0, 1_000, 100):
            collection.upsert(items(range(start, start + 100)), fingerprint="f")
            counts = counted(tmp_path)
            assert counts["items"] - counts["indexed"] <= 350
        assert collection.count({"field": "n", "lt": 500}) == 500


def test_the_journal_stays_small_while_others_write_without_a_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.002)
    monkeypatch.setattr(upkeep, "JOURNAL_PAGES", 100)
    sizes = []
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        for version in range(150):
            collection.upsert(items(range(100), version=version), fingerprint="f")
            sizes.append((tmp_path / f"{DATABASE_NAME}-wal").stat().st_size)
        assert collection.count() == 100
    written = 150 * 20 * 8_192  # about twenty pages a commit
    assert max(sizes) < written / 2


def test_a_failure_of_the_upkeep_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upkeep, "LOOK_EVERY_S", 0.01)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        collection.upsert(items(range(10)), fingerprint="f")
        wait_until(lambda: counted(tmp_path)["indexed"] == 10)
        writer = collections._store._writer
        (pages,) = writer.execute("PRAGMA page_count").fetchone()
        with caplog.at_level(logging.WARNING, logger="app.search.embedded.upkeep"):
            with collections._store.writer():
                collection.upsert(items(range(10, 400)), fingerprint="f")
                (pages,) = writer.execute("PRAGMA page_count").fetchone()
                writer.execute(f"PRAGMA max_page_count = {pages}")
            wait_until(lambda: "goes on later: the disk" in caplog.text)
            assert collection.count({"field": "n", "gte": 10}) == 390
            writer.execute("PRAGMA max_page_count = 1000000")
            wait_until(lambda: counted(tmp_path)["indexed"] == 400)
