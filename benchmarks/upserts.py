"""How fast a collection takes vectors, each batch on disk before the answer: `python -m benchmarks.upserts`.

    bare      the same rows into a table of SQLite's (id, metadata, vector), a commit with fsync a batch
    interface `Collection.upsert`, batches of 64, half new, half overwriting, metadata of four fields; the
              newest item of each tenth batch is searched for at once

Both are on the same disk and alternate, so that only their ratio is read. Then a search every 20 ms, first
quiet, then with upserts beside it. Nothing else may compute meanwhile. `SCALE` items are there before.
"""

import os
import platform
import sqlite3
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.search.collection import Collection, Item
from app.search.embedded.library import Collections

SCALE = int(os.environ.get("SCALE", "100000"))
DIMENSIONS = 384
BATCH = 64
BATCHES = 60
ROUNDS = 5
SEARCHES = 200
FINGERPRINT = "sha256:benchmark"
KINDS = ("dog", "cat", "horse", "boat", "tree")


def vectors(count: int, *, seed: int) -> npt.NDArray[np.float32]:
    """Clustered: 200 directions with noise."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(200, DIMENSIONS))
    noise = rng.normal(size=(count, DIMENSIONS))
    return (centres[rng.integers(200, size=count)] + 0.5 * noise).astype(np.float32)


def items(numbers: npt.NDArray[np.int64], *, seed: int) -> list[Item]:
    """With the metadata that pictures have."""
    return [
        Item(
            id=f"album-{number % 97:02}/IMG_{number:07}.jpg",
            vector=vector,
            metadata={
                "class": KINDS[number % 5],
                "album": f"album-{number % 97:02}",
                "taken": f"20{number % 25:02}-0{1 + number % 9}-{10 + number % 18}",
                "version": seed,
            },
        )
        for number, vector in zip(numbers.tolist(), vectors(len(numbers), seed=seed), strict=True)
    ]


def batches(first_new: int, *, seed: int) -> Iterator[list[Item]]:
    """Half new, half of those that are there."""
    rng = np.random.default_rng(seed)
    for number in range(BATCHES):
        new = np.arange(first_new + number * BATCH // 2, first_new + (number + 1) * BATCH // 2)
        old = rng.choice(first_new, size=BATCH // 2, replace=False)
        yield items(np.concatenate([new, old]), seed=1_000 * seed + number)


def bare(path: Path) -> sqlite3.Connection:
    """The least that keeps the same rows."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        "PRAGMA page_size = 8192; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
        "CREATE TABLE rows (rid INTEGER PRIMARY KEY, id TEXT UNIQUE, metadata TEXT, vector BLOB)"
    )
    return connection


def bare_upsert(connection: sqlite3.Connection, batch: list[Item]) -> None:
    """One commit."""
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany(
        "INSERT OR REPLACE INTO rows (id, metadata, vector) VALUES (?, ?, ?)",
        [(item.id, str(item.metadata), item.vector.tobytes()) for item in batch],
    )
    connection.execute("COMMIT")


def upserts_s(collection: Collection, work: list[list[Item]]) -> list[float]:
    """Seconds of each batch."""
    taken = []
    for number, batch in enumerate(work):
        began = time.perf_counter()
        collection.upsert(batch, fingerprint=FINGERPRINT)
        taken.append(time.perf_counter() - began)
        if number % 10 == 0:
            ((nearest,),) = collection.search(batch[0].vector[None], k=1)
            assert nearest.id == batch[0].id
    return taken


def searches_s(collection: Collection) -> list[float]:
    """Seconds of each search, one every 20 ms."""
    queries = vectors(SEARCHES, seed=99)
    taken = []
    for query in queries:
        began = time.perf_counter()
        collection.search(query[None], k=10)
        taken.append(time.perf_counter() - began)
        time.sleep(max(0.0, 0.02 - taken[-1]))
    return taken


def percentiles(seconds: list[float]) -> str:
    """For people."""
    cuts = np.percentile(np.array(seconds) * 1e3, [50, 99, 100])
    return f"p50 {cuts[0]:.2f} ms, p99 {cuts[1]:.2f} ms, max {cuts[2]:.2f} ms"


def measure(directory: Path) -> None:
    """Prints everything."""
    with Collections.open(directory / "ours") as collections:
        collection = collections.create("pictures", fingerprint=FINGERPRINT, dimensions=DIMENSIONS)
        connection = bare(directory / "bare.sqlite")
        for start in range(0, SCALE, 1_000):
            there = items(np.arange(start, min(start + 1_000, SCALE)), seed=10**6 + start)
            collection.upsert(there, fingerprint=FINGERPRINT)
            bare_upsert(connection, there)
        first_new, ours, theirs, each = SCALE, [], [], []
        for seed in range(1, ROUNDS + 2):
            work = list(batches(first_new, seed=seed))
            first_new += BATCHES * BATCH // 2
            began = time.perf_counter()
            for batch in work:
                bare_upsert(connection, batch)
            theirs.append(BATCHES * BATCH / (time.perf_counter() - began))
            taken = upserts_s(collection, work)
            each += taken
            ours.append(BATCHES * BATCH / sum(taken))
        connection.close()
        ratio = statistics.median(o / t for o, t in zip(ours[1:], theirs[1:], strict=True))
        print(f"bare SQLite: {statistics.median(theirs[1:]):,.0f} rows/s")
        print(f"interface:   {statistics.median(ours[1:]):,.0f} rows/s ({min(ours):,.0f} at least), ", end="")
        print(f"{ratio:.2f} of bare; a batch {percentiles(each)}")
        beside(collection, first_new)


def beside(collection: Collection, first_new: int) -> None:
    """Searches, quiet and with a writer."""
    searches_s(collection)
    print(f"search, quiet:           {percentiles(searches_s(collection))}")
    stop, written = threading.Event(), 0

    def write() -> None:
        nonlocal written
        for seed in range(100, 200):
            for batch in batches(first_new + (seed - 100) * BATCHES * BATCH // 2, seed=seed):
                if stop.is_set():
                    return
                collection.upsert(batch, fingerprint=FINGERPRINT)
                written += len(batch)

    writer = threading.Thread(target=write)
    began = time.perf_counter()
    writer.start()
    taken = searches_s(collection)
    stop.set()
    writer.join()
    rate = written / (time.perf_counter() - began)
    print(f"search, {rate:,.0f} upserts/s: {percentiles(taken)}")


def main() -> None:
    """Measures in a directory that is removed."""
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ",
        f"SQLite {sqlite3.sqlite_version}; {SCALE:,} items of {DIMENSIONS} dimensions before; ",
        f"n = {ROUNDS} rounds of {BATCHES} batches of {BATCH}",
    )
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as directory:
        measure(Path(directory))


if __name__ == "__main__":
    main()
