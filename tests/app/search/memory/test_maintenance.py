"""The background on real directories: what it makes is used, kept, made anew and never in the way."""

import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from app.search.collection import Item, Json, Neighbour
from app.search.embedded.collection import EmbeddedCollection
from app.search.embedded.library import Collections
from app.search.memory import chunks, ivf_tuning, maintenance
from tests.app.search.clustered import Vectors, clustered

D = 32


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All thresholds of a collection of thousands, with what is made for one of millions."""
    monkeypatch.setattr(chunks, "MAX_CHUNK_ROWS", 500)
    monkeypatch.setattr(maintenance, "IVF_MIN_ROWS", 1_000)
    monkeypatch.setattr(maintenance, "TAIL_ROWS", 64)
    monkeypatch.setattr(ivf_tuning, "_QUERIES", {10: 200, 50: 50, 200: 10, 1_000: 5})


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Collections]:
    with Collections.open(tmp_path / "data") as collections:
        yield collections


def upsert(collection: EmbeddedCollection, vectors: Vectors, *, first: int = 0, at_once: int = 500) -> None:
    for start in range(0, len(vectors), at_once):
        collection.upsert(
            [
                Item(
                    id=f"{first + start + i:06}", vector=vector, metadata={"tenth": (first + start + i) % 10}
                )
                for i, vector in enumerate(vectors[start : start + at_once])
            ],
            fingerprint="f",
        )


def recall(collection: EmbeddedCollection, queries: Vectors, **words: object) -> float:
    found = 0
    for query in queries:
        true = {n.id for n in collection.search(query[None], k=10, exact=True, **words)[0]}  # type: ignore[arg-type]
        found += len(true & {n.id for n in collection.search(query[None], k=10, **words)[0]})  # type: ignore[arg-type]
    return found / (10 * len(queries))


def ivf_file(directory: Path, collection: EmbeddedCollection) -> Path:
    return directory / maintenance.DIRECTORY_NAME / f"{collection.cid}.ivf"


def test_a_big_collection_is_indexed_kept_and_found_again(tmp_path: Path) -> None:
    """With the real thresholds, from empty to 60,000 rows and a restart."""
    vectors, _ = clustered(60_200, seed=1, dimensions=48)
    vectors, queries = vectors[:60_000], vectors[60_000:]
    with Collections.open(tmp_path) as collections:
        collection = collections.create("big", fingerprint="f", dimensions=48)
        assert collection.index.snapshot.method() == "exact"
        upsert(collection, vectors)
        assert collections.settle(timeout_s=120)
        snapshot = collection.index.snapshot
        assert snapshot.method() == "ivf"
        assert snapshot.indexed > 57_000
        assert snapshot.recall >= 0.99
        assert recall(collection, queries) >= 0.97
        assert recall(collection, queries[:50], filter={"field": "tenth", "lt": 5}) >= 0.97
        assert recall(collection, queries[:50], filter={"field": "tenth", "eq": 5}) == 1.0
        expected = [collection.search(query[None], k=10) for query in queries[:50]]
    with Collections.open(tmp_path) as collections:
        collection = collections.get("big")
        snapshot = collection.index.snapshot
        assert snapshot.method() == "ivf", "it was read, not made anew"
        assert snapshot.indexed > 57_000
        assert [collection.search(query[None], k=10) for query in queries[:50]] == expected


@pytest.mark.usefixtures("small")
def test_what_was_written_since_is_merged_and_the_dead_are_left_out(opened: Collections) -> None:
    vectors, _ = clustered(6_000, seed=2, dimensions=D)
    collection = opened.create("a", fingerprint="f", dimensions=D)
    # At once: in pieces, a quick background trains on the first half, and again on four times as many.
    upsert(collection, vectors[:2_000], at_once=2_000)
    assert opened.settle(timeout_s=60)
    first = collection.index.snapshot.ivf
    assert first is not None
    upsert(collection, vectors[2_000:4_000], first=2_000)
    assert opened.settle(timeout_s=60)
    second = collection.index.snapshot.ivf
    assert second is not None
    assert second.ivf.trained_rows == first.ivf.trained_rows
    assert collection.index.snapshot.indexed > 3_900
    collection.delete([f"{i:06}" for i in range(3_000)])
    assert opened.settle(timeout_s=60)
    third = collection.index.snapshot
    assert third.ivf is not None
    assert third.ivf.dead_count == 0
    assert third.size < 1_300
    assert third.alive_count == 1_000
    assert recall(collection, vectors[4_000:4_050]) >= 0.97


@pytest.mark.usefixtures("small")
def test_the_lists_are_chosen_anew_after_growth_and_forgotten_after_loss(
    opened: Collections, tmp_path: Path
) -> None:
    vectors, _ = clustered(8_000, seed=3, dimensions=D)
    collection = opened.create("a", fingerprint="f", dimensions=D)
    upsert(collection, vectors[:1_000])
    assert opened.settle(timeout_s=60)
    upsert(collection, vectors[1_000:], first=1_000)
    assert opened.settle(timeout_s=60)
    ivf = collection.index.snapshot.ivf
    assert ivf is not None
    assert ivf.ivf.trained_rows >= 4_000
    assert ivf_file(tmp_path / "data", collection).exists()
    collection.delete([f"{i:06}" for i in range(100, 8_000)])
    assert opened.settle(timeout_s=60)
    assert collection.index.snapshot.ivf is None
    assert collection.index.snapshot.method() in {"exact", "int8"}
    assert not ivf_file(tmp_path / "data", collection).exists()


@pytest.mark.usefixtures("small")
def test_full_chunks_have_codes_only_where_nothing_else_makes_them_fast(
    opened: Collections, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, _ = clustered(1_900, seed=4, dimensions=D)
    monkeypatch.setattr(maintenance, "IVF_MIN_ROWS", 1_500)
    collection = opened.create("a", fingerprint="f", dimensions=D)
    upsert(collection, vectors[:1_200])
    assert opened.settle(timeout_s=60)
    assert collection.index.snapshot.method() == "int8"
    assert [view.chunk.codes is not None for view in collection.index.snapshot.views] == [True, True, False]
    assert recall(collection, vectors[1_200:1_250]) == 1.0
    upsert(collection, vectors[1_200:], first=1_200)
    assert opened.settle(timeout_s=60)
    assert collection.index.snapshot.method() == "ivf"
    assert all(view.chunk.codes is None for view in collection.index.snapshot.views)


@pytest.mark.usefixtures("small")
def test_a_damaged_file_never_keeps_a_collection_from_opening(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, _ = clustered(2_000, seed=5, dimensions=D)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        upsert(collection, vectors)
        assert collections.settle(timeout_s=60)
        path = ivf_file(tmp_path, collection)
    whole = path.read_bytes()
    for content in (b"", whole[:1_000], whole[:-1], whole[:500] + b"?" + whole[501:], b"?" * 100):
        path.write_bytes(content)
        caplog.clear()
        with Collections.open(tmp_path) as collections:
            collection = collections.get("a")
            assert "it is made anew" in caplog.text
            assert recall(collection, vectors[:20]) == 1.0
            assert collections.settle(timeout_s=60)
            assert collection.index.snapshot.method() == "ivf"
            assert recall(collection, vectors[:20]) >= 0.97
        assert path.stat().st_size > len(whole) // 2


@pytest.mark.usefixtures("small")
def test_the_files_of_dropped_collections_are_removed(tmp_path: Path) -> None:
    vectors, _ = clustered(1_500, seed=6, dimensions=D)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        upsert(collection, vectors)
        assert collections.settle(timeout_s=60)
        path = ivf_file(tmp_path, collection)
        assert path.exists()
        collections.drop("a")
        assert not path.exists()
        assert collections.settle(timeout_s=60)
    left = path.with_name("77.ivf")
    left.write_bytes(b"of a process that was killed while it dropped one")
    path.with_name("78.new").write_bytes(b"of one that was killed while it wrote")
    with Collections.open(tmp_path):
        assert list(left.parent.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_a_directory_that_can_not_be_written_costs_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, _ = clustered(1_500, seed=7, dimensions=D)
    tmp_path.joinpath(maintenance.DIRECTORY_NAME).write_bytes(b"a file where the directory should be")
    with Collections.open(tmp_path) as collections:
        collection = collections.create("a", fingerprint="f", dimensions=D)
        upsert(collection, vectors)
        assert collections.settle(timeout_s=60)
        assert collection.index.snapshot.method() == "ivf"
        collection.upsert([Item(id="new", vector=vectors[0], metadata={})], fingerprint="f")
        assert "new" in {n.id for n in collection.search(vectors[:1], k=3)[0]}
    assert "could not be brought up to date" in caplog.text


@pytest.mark.usefixtures("small")
def test_closing_ends_the_threads_whatever_they_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, _ = clustered(20_000, seed=8, dimensions=D)
    monkeypatch.setattr(ivf_tuning, "TARGET_RECALL", 1.1)  # it would measure for long
    others = set(threading.enumerate())  # another test's collections may be open in this process
    collections = Collections.open(tmp_path)
    collection = collections.create("a", fingerprint="f", dimensions=D)
    upsert(collection, vectors)
    collections.close()
    collections.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("search-") and t not in others]


class Searcher(threading.Thread):
    """Searches until it is stopped, and writes down what was wrong."""

    def __init__(
        self, collection: EmbeddedCollection, vectors: Vectors, *, gone: set[str], seed: int
    ) -> None:
        super().__init__()
        self.collection, self.vectors, self.gone = collection, vectors, gone
        self.rng = random.Random(seed)
        self.stopped = threading.Event()
        self.problems: list[str] = []
        self.searches = 0

    def run(self) -> None:
        while not self.stopped.is_set():
            dead = set(self.gone)
            exact = self.rng.random() < 0.2
            filter: dict[str, Json] | None = {"field": "tenth", "lt": 8} if self.rng.random() < 0.3 else None
            queries = self.vectors[self.rng.sample(range(len(self.vectors)), 2)]
            for found in self.collection.search(queries, k=20, exact=exact, filter=filter):
                self.check(found, dead)
            self.searches += 1

    def check(self, found: list[Neighbour], dead: set[str]) -> None:
        ids = [neighbour.id for neighbour in found]
        scores = [neighbour.score for neighbour in found]
        if dead & set(ids):
            self.problems.append(f"deleted: {dead & set(ids)}")
        if len(set(ids)) != len(ids) or scores != sorted(scores, reverse=True):
            self.problems.append(f"twice, or out of order: {found}")


def write_at_random(
    collection: EmbeddedCollection, vectors: Vectors, *, gone: set[str], rng: random.Random
) -> dict[str, int]:
    """Adds, replaces and deletes; returns the row of each id. What was just written is found at once."""
    model: dict[str, int] = {}
    for step in range(90):
        picked = rng.sample(range(len(vectors)), 100)
        names = [f"{step:03}/{i}" if rng.random() < 0.8 else f"old/{i % 300}" for i in picked]
        items = {
            name: Item(id=name, vector=vectors[i], metadata={"tenth": i % 10})
            for name, i in zip(names, picked, strict=True)
        }
        collection.upsert(list(items.values()), fingerprint="f")
        model |= dict(zip(names, picked, strict=True))
        probe = rng.choice(names)
        best = collection.search(vectors[model[probe]][None], k=1_000)[0]
        assert probe in {n.id for n in best if n.score >= best[0].score}
        if step % 3 == 2:
            fleeting = [name for name in model if not name.startswith("old/")]
            dead = rng.sample(fleeting, 100)
            collection.delete(dead)
            gone.update(dead)
            for name in dead:
                del model[name]
    return model


@pytest.mark.usefixtures("small")
def test_searches_stay_right_while_everything_is_replaced_under_them(opened: Collections) -> None:
    """One writes, two search, the background builds, merges, copies and saves: against a dict."""
    vectors, _ = clustered(9_000, seed=9, dimensions=D)
    collection = opened.create("a", fingerprint="f", dimensions=D)
    gone: set[str] = set()
    searchers = [Searcher(collection, vectors, gone=gone, seed=seed) for seed in range(2)]
    for searcher in searchers:
        searcher.start()
    try:
        model = write_at_random(collection, vectors, gone=gone, rng=random.Random(10))
    finally:
        for searcher in searchers:
            searcher.stopped.set()
            searcher.join()
    assert [searcher.problems for searcher in searchers] == [[], []]
    assert min(searcher.searches for searcher in searchers) > 10
    assert opened.settle(timeout_s=60)
    assert collection.count() == len(model)
    assert collection.index.snapshot.method() == "ivf"
    stored = vectors[list(model.values())].astype(np.float64)
    for query in vectors[:50]:
        tenth_best = np.sort(stored @ query.astype(np.float64))[-10]
        found = collection.search(query[None], k=10, exact=True)[0]
        assert len(found) == 10
        assert all(n.score >= tenth_best - 1e-6 for n in found)
    assert recall(collection, vectors[:100]) >= 0.97


@pytest.mark.usefixtures("small")
def test_a_failure_in_the_background_is_logged_and_tried_again(
    opened: Collections, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(maintenance, "_PAUSE_AFTER_FAILURE_S", 0.2)
    memory = iter([True])

    def clone_once_without_memory(index: faiss.Index) -> faiss.Index:
        if next(memory, False):
            raise MemoryError
        return clone(index)

    clone = faiss.clone_index
    monkeypatch.setattr(faiss, "clone_index", clone_once_without_memory)
    vectors, _ = clustered(3_000, seed=11, dimensions=D)
    collection = opened.create("a", fingerprint="f", dimensions=D)
    with caplog.at_level(logging.ERROR):
        upsert(collection, vectors[:1_500])
        assert opened.settle(timeout_s=60)
        upsert(collection, vectors[1_500:2_500], first=1_500)
        assert opened.settle(timeout_s=60)
    assert "could not be brought up to date" in caplog.text
    assert recall(collection, vectors[2_500:2_550]) >= 0.97
    time.sleep(0.3)
    upsert(collection, vectors[2_500:], first=2_500)
    assert opened.settle(timeout_s=60)
    assert collection.index.snapshot.indexed > 2_900
