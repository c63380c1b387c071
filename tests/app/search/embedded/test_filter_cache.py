"""Filters that are asked again: what is remembered, what is asked for, and that no states are mixed."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.search.collection import Item
from app.search.embedded import filter_cache
from app.search.embedded.collection import EmbeddedCollection
from app.search.embedded.library import Collections

D = 8
ONES = np.ones(D, dtype=np.float32)
DOGS: dict[str, Any] = {"field": "class", "eq": "dog"}
NO_DOGS: dict[str, Any] = {"not": DOGS}


@pytest.fixture
def collections(tmp_path: Path) -> Iterator[Collections]:
    with Collections.open(tmp_path) as opened:
        yield opened


@pytest.fixture
def pets(collections: Collections) -> EmbeddedCollection:
    return collections.create("pets", fingerprint="f", dimensions=D)


def add(collection: EmbeddedCollection, numbers: range, *, kind: str) -> None:
    rng = np.random.default_rng(numbers.start)
    vectors = rng.normal(size=(len(numbers), D)).astype(np.float32)
    items = [
        Item(id=f"{n:06}", vector=v, metadata={"class": kind, "n": n})
        for n, v in zip(numbers, vectors, strict=True)
    ]
    collection.upsert(items, fingerprint="f")


def statements(collections: Collections, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the database from now on."""
    seen: list[str] = []
    connect = collections._store._connect

    def watched(**options: int) -> sqlite3.Connection:
        connection = connect(**options)
        connection.set_trace_callback(seen.append)
        return connection

    while not collections._store._readers.empty():
        collections._store._readers.get().close()
    monkeypatch.setattr(collections._store, "_connect", watched)
    return seen


def test_a_filter_that_comes_again_asks_the_database_nothing_but_who_was_found(
    collections: Collections, pets: EmbeddedCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(pets, range(100), kind="dog")
    add(pets, range(100, 200), kind="cat")
    assert pets.count(DOGS) == 100
    seen = statements(collections, monkeypatch)
    assert len(pets.search(np.ones((1, D)), k=3, filter=DOGS)[0]) == 3
    assert not any("fields" in statement for statement in seen)
    assert sum("metadata" in statement for statement in seen) == 1


def test_only_what_came_since_is_asked_for(
    collections: Collections, pets: EmbeddedCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(pets, range(1_000), kind="dog")
    assert (pets.count(DOGS), pets.count(NO_DOGS)) == (1_000, 0)
    add(pets, range(1_000, 1_010), kind="dog")
    add(pets, range(1_010, 1_030), kind="cat")
    add(pets, range(5), kind="cat")
    pets.delete(["000999", "001029"])
    seen = statements(collections, monkeypatch)
    assert (pets.count(DOGS), pets.count(NO_DOGS)) == (1_004, 24)
    assert not any("FROM fields" in statement for statement in seen)
    assert pets.undelete(["000999", "001029"]) == 2
    assert (pets.count(DOGS), pets.count(NO_DOGS)) == (1_005, 25)


def test_after_much_was_written_the_index_is_asked_again(
    pets: EmbeddedCollection, collections: Collections, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(pets, range(100), kind="dog")
    assert pets.count(DOGS) == 100
    add(pets, range(100, 3_000), kind="dog")
    while collections._store._upkeep._index_some():
        pass
    seen = statements(collections, monkeypatch)
    assert pets.count(DOGS) == 3_000
    assert any("FROM fields" in statement for statement in seen)
    assert not any("rid, id, metadata" in statement for statement in seen)


def test_filters_that_are_equal_in_python_are_not_the_same_filter(pets: EmbeddedCollection) -> None:
    values: list[Any] = [1, 1.0, True, "1"]
    items = [
        Item(id=f"{i}", vector=np.ones(D, dtype=np.float32), metadata={"a": value})
        for i, value in enumerate(values)
    ]
    pets.upsert(items, fingerprint="f")
    assert [pets.count({"field": "a", "eq": value}) for value in values] == [2, 2, 1, 1]
    assert pets.count({"field": "a", "in": [True]}) == 1
    assert pets.count({"field": "a", "in": [1]}) == 2


def test_what_is_remembered_is_bounded(pets: EmbeddedCollection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_cache, "MAX_BYTES", 20_000)
    add(pets, range(1_000), kind="dog")
    for n in range(0, 1_000, 50):
        assert pets.count({"field": "n", "lt": n}) == n
    held = sum(entry.kept.rids.nbytes for entry in pets._filters._entries.values())
    assert 0 < held <= 20_000
    monkeypatch.setattr(filter_cache, "MAX_BYTES", 100)
    assert pets.count(DOGS) == 1_000
    assert len(pets._filters._entries) == 0


def test_searches_through_filters_see_one_state_while_others_write(pets: EmbeddedCollection) -> None:
    """Every item flips between dog and cat; both filters together must always have all of them."""
    numbers = range(60)
    add(pets, numbers, kind="dog")
    stop = threading.Event()
    failures: list[str] = []

    def write() -> None:
        while not stop.is_set():
            for kind in ("cat", "dog"):
                add(pets, numbers, kind=kind)

    def read() -> None:
        for _ in range(150):
            dogs = len(pets.search(np.ones((1, D)), k=100, filter=DOGS)[0])
            if dogs not in {0, 60}:
                failures.append(f"{dogs} dogs")
            cats = pets.count({"field": "class", "eq": "cat"})
            if cats not in {0, 60}:
                failures.append(f"{cats} cats")

    writer = threading.Thread(target=write)
    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    writer.join()
    assert failures == []


@pytest.mark.parametrize("limit", [1, 7, 100])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.5])
def test_pages_of_a_filter_are_in_order_whether_it_keeps_few_or_many(
    pets: EmbeddedCollection, share: float, limit: int
) -> None:
    rng = np.random.default_rng(0)
    chosen = [n for n in range(5_000) if rng.random() < share]
    order = rng.permutation(5_000).tolist()
    items = [
        Item(
            id=f"{n:06}",
            vector=np.ones(D, dtype=np.float32),
            metadata={"class": "dog" if n in chosen else "cat"},
        )
        for n in order
    ]
    pets.upsert(items, fingerprint="f")
    pets.delete([f"{n:06}" for n in chosen[::5]])
    expected = [f"{n:06}" for i, n in enumerate(chosen) if i % 5][:300]
    seen: list[str] = []
    cursor = None
    while len(seen) < len(expected):
        page = pets.scroll(cursor=cursor, limit=limit, filter=DOGS)
        seen += [item.id for item in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen[: len(expected)] == expected
