"""What the collections reach of what faiss can do: `python -m benchmarks.search --items 100000`.

    bare     an IVF with RaBitQ codes of faiss alone, with our number of lists, searched with our settings
    ours     `Collection.search` of the engine inside the process, SQLite and metadata included

Both by one thread, in one run, on vectors of one new seed: 2,000 clusters of very different sizes in 32 of
384 dimensions, with noise. The queries are of the same clusters, and not stored. Nothing else may compute.
"""

import argparse
import json
import os
import platform
import secrets
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from app.search.collection import Item, Json
from app.search.embedded.collection import EmbeddedCollection
from app.search.embedded.library import Collections
from app.search.memory.ivf import Setting

ROOT = Path(__file__).parents[1]
DIMENSIONS = 384
CLUSTERS = 2_000
QUERIES = 1_000
BATCH = 64
UPSERTS_PER_S = 8_000
WRITING_S = 10.0
K = 10

Vectors = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass
class Data:
    """Vectors to store and to ask for.

    Attributes:
        albums: Of each vector: groups of clusters; album 0 has about 1 % of all.
    """

    vectors: Vectors
    queries: Vectors
    albums: Labels


@dataclass
class Results:
    """Lines of the table, and what the JSON file says."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, float | int | str] = field(default_factory=dict)

    def add(self, name: str, **numbers: float) -> None:
        """One line, of numbers with their names."""
        words = [f"{value:,.4g} {key.replace('_', ' ')}" for key, value in numbers.items()]
        self.rows.append((name, ", ".join(words)))
        print(f"  {name}: {', '.join(words)}", flush=True)
        self.numbers |= {f"{name} {key}": value for key, value in numbers.items()}


def make_data(items: int, *, seed: int) -> Data:
    """Clusters of Pareto sizes, spread unlike in a subspace of 32 dimensions, with noise of 30 % in all."""
    rng = np.random.default_rng(seed)
    shares = rng.pareto(1.2, CLUSTERS) + 0.05
    shares /= shares.sum()
    centres = rng.normal(size=(CLUSTERS, 32)).astype(np.float32)
    spreads = np.abs(rng.normal(size=(CLUSTERS, 32))).astype(np.float32) * 0.35
    turned = np.linalg.qr(rng.normal(size=(DIMENSIONS, DIMENSIONS)))[0].astype(np.float32)[:32]
    vectors = np.empty((items + QUERIES, DIMENSIONS), dtype=np.float32)
    cluster = rng.choice(CLUSTERS, len(vectors), p=shares)
    for start in range(0, len(vectors), 50_000):
        here = cluster[start : start + 50_000]
        signal = (centres[here] + spreads[here] * rng.standard_normal((len(here), 32), np.float32)) @ turned
        noise = rng.standard_normal((len(here), DIMENSIONS), np.float32) / np.float32(DIMENSIONS**0.5)
        signal += 0.3 * np.linalg.norm(signal, axis=1, keepdims=True) * noise
        vectors[start : start + 50_000] = signal / np.linalg.norm(signal, axis=1, keepdims=True)
    return Data(vectors[:items], vectors[items:], albums_of(cluster[:items]))


def albums_of(cluster: Labels) -> Labels:
    """Groups of clusters next to each other in a random order, each of about 1 % of all."""
    order = np.random.default_rng(0).permutation(CLUSTERS)
    sizes = np.cumsum(np.bincount(cluster, minlength=CLUSTERS)[order])
    album_of_cluster = np.empty(CLUSTERS, dtype=np.int64)
    album_of_cluster[order] = sizes * 100 // (len(cluster) + 1)
    albums: Labels = album_of_cluster[cluster]
    return albums


def milliseconds(search: Callable[[int], object], *, count: int) -> dict[str, float]:
    """p50 and p99 of single calls."""
    for i in range(20):
        search(i)
    times = []
    for i in range(count):
        began = time.perf_counter()
        search(i)
        times.append((time.perf_counter() - began) * 1e3)
    return {"p50_ms": statistics.median(times), "p99_ms": float(np.percentile(times, 99))}


def recall(found: list[set[int]], true: Labels) -> float:
    """The share of the true neighbours that was found."""
    return sum(len(set(row.tolist()) & ids) for row, ids in zip(true, found, strict=False)) / (K * len(found))


def measure_bare(data: Data, true: Labels, results: Results, *, lists: int, setting: Setting) -> None:
    """An index of the same kind of faiss alone, with as many lists, probes and rescored rows."""
    faiss.omp_set_num_threads(1)
    quantizer = faiss.IndexFlatIP(DIMENSIONS)
    index = faiss.IndexIVFRaBitQFastScan(quantizer, DIMENSIONS, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.max_points_per_centroid = 10, 64
    began = time.perf_counter()
    index.train(data.vectors)
    for start in range(0, len(data.vectors), 50_000):
        index.add(data.vectors[start : start + 50_000])
    build_s = time.perf_counter() - began
    parameters = faiss.SearchParametersIVF(nprobe=setting.probes)

    def search(i: int) -> Labels:
        query = data.queries[i % QUERIES]
        rows = index.search(query[None], setting.depth, params=parameters)[1][0]
        scores = data.vectors[rows] @ query
        best: Labels = rows[np.argsort(-scores)[:K]]
        return best

    found = [set(search(i).tolist()) for i in range(QUERIES)]
    codes_only = milliseconds(
        lambda i: index.search(data.queries[i % QUERIES][None], setting.depth, params=parameters),
        count=QUERIES,
    )
    results.add("bare faiss, codes only", **codes_only)
    results.add(
        "bare faiss, rescored",
        recall=recall(found, true),
        **milliseconds(search, count=QUERIES),
        build_s=build_s,
    )


def fill(collection: EmbeddedCollection, data: Data) -> float:
    """Upserts all in batches of 1,000; returns items a second."""
    began = time.perf_counter()
    for start in range(0, len(data.vectors), 1_000):
        items = [
            Item(
                id=id_of(i),
                vector=data.vectors[i],
                metadata={"bucket": i % 100, "album": int(data.albums[i])},
            )
            for i in range(start, min(start + 1_000, len(data.vectors)))
        ]
        collection.upsert(items, fingerprint="benchmark")
    return len(data.vectors) / (time.perf_counter() - began)


def id_of(row: int) -> str:
    """As a file of a folder."""
    return f"photos/{row:08}.jpg"


def row_of(item_id: str) -> int:
    """The row of an id of `id_of`."""
    return int(item_id[7:15])


def measure_searches(collection: EmbeddedCollection, data: Data, true: Labels, results: Results) -> None:
    """Without a filter, exactly, by id, and with filters."""

    def search(i: int, **words: object) -> list[set[int]]:
        found = collection.search(data.queries[i % QUERIES][None], k=K, **words)  # type: ignore[arg-type]
        return [{row_of(neighbour.id) for neighbour in found[0]}]

    def by_id(i: int) -> object:
        (item,) = collection.get([id_of(i * 37 % len(data.vectors))])
        assert item is not None
        return collection.search(item.vector[None], k=K, exclude_ids=[item.id])

    found = [search(i)[0] for i in range(QUERIES)]
    results.add("ours", recall=recall(found, true), **milliseconds(search, count=QUERIES))
    results.add("ours, by id", **milliseconds(by_id, count=QUERIES))
    exact = [search(i, exact=True)[0] for i in range(50)]
    results.add(
        "ours, exact", recall=recall(exact, true), **milliseconds(lambda i: search(i, exact=True), count=50)
    )
    numbers = np.arange(len(data.vectors))
    shares = np.bincount(data.albums) / len(data.vectors)
    album = int(np.argmin(np.abs(shares - 0.01)))  # albums are whole clusters, and some are empty
    filters: list[tuple[str, dict[str, Json], npt.NDArray[np.bool_]]] = [
        ("1 %", {"field": "bucket", "eq": 7}, numbers % 100 == 7),
        ("10 %", {"field": "bucket", "lt": 10}, numbers % 100 < 10),
        ("1 %, an album", {"field": "album", "eq": album}, data.albums == album),
        ("50 %", {"field": "bucket", "lt": 50}, numbers % 100 < 50),
        ("20 %, albums", {"field": "album", "lt": 20}, data.albums < 20),
    ]
    for name, words, mask in filters:
        rows = np.flatnonzero(mask)
        _, best = faiss.knn(data.queries[:200], data.vectors[rows], K, metric=faiss.METRIC_INNER_PRODUCT)
        found = [search(i, filter=words)[0] for i in range(200)]
        times = milliseconds(lambda i, words=words: search(i, filter=words), count=200)  # type: ignore[misc]
        results.add(f"ours, filter {name}", recall=recall(found, rows[best]), rows=len(rows), **times)


def measure_writing(collection: EmbeddedCollection, data: Data, results: Results) -> None:
    """The time of searches while another thread upserts, and how fast it does."""
    stopped = threading.Event()
    written: list[float] = []

    def write() -> None:
        began = time.perf_counter()
        while not stopped.is_set():
            number = len(written) * BATCH
            # Half are new, half replace items.
            items = [
                Item(
                    id=f"new/{number + i}"
                    if i % 2
                    else f"photos/{(number + i) * 13 % len(data.vectors):08}.jpg",
                    vector=data.queries[(number + i) % QUERIES],
                    metadata={"bucket": 100, "album": 200},
                )
                for i in range(BATCH)
            ]
            before = time.perf_counter()
            collection.upsert(items, fingerprint="benchmark")
            written.append(time.perf_counter() - before)
            due = began + len(written) * BATCH / UPSERTS_PER_S
            time.sleep(max(0.0, due - time.perf_counter()))

    def search(i: int) -> object:
        return collection.search(data.queries[i % QUERIES][None], k=K)

    results.add("ours, quiet", **milliseconds(search, count=3_000))
    thread = threading.Thread(target=write)
    thread.start()
    times: list[float] = []
    until = time.perf_counter() + WRITING_S
    while time.perf_counter() < until:
        began = time.perf_counter()
        search(len(times))
        times.append((time.perf_counter() - began) * 1e3)
    stopped.set()
    thread.join()
    results.add(
        "ours, while others upsert",
        p50_ms=statistics.median(times),
        p99_ms=float(np.percentile(times, 99)),
        worst_ms=max(times),
        upserts_per_s=len(written) * BATCH / WRITING_S,
        batch_p50_ms=statistics.median(written) * 1e3,
    )


def measure_opening(directory: Path, results: Results) -> None:
    """In a new process: the time until it has searched, and its memory."""
    command = [sys.executable, "-m", "benchmarks.search", "--open", str(directory)]
    answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    results.add("ours, opened again", **json.loads(answer.splitlines()[-1]))


def open_and_search(directory: Path) -> None:
    """What the new process does."""
    before = memory_bytes()
    began = time.perf_counter()
    with Collections.open(directory) as collections:
        collection = collections.get("benchmark")
        open_s = time.perf_counter() - began
        query = np.random.default_rng(0).normal(size=(1, DIMENSIONS))
        collection.search(query, k=K)
        searched_s = time.perf_counter() - began
        collections.settle(timeout_s=600)
        for _ in range(100):
            collection.search(query, k=K)
        items = collection.count()
        print(
            json.dumps(
                {
                    "open_s": open_s,
                    "first_answer_s": searched_s,
                    "indexed": collection.index.snapshot.indexed,
                    "bytes_an_item": memory_bytes() / items,
                    "bytes_an_item_without_the_program": (memory_bytes() - before) / items,
                }
            )
        )


def memory_bytes() -> int:
    """What this process has in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(items: int, *, seed: int, directory: Path) -> Results:
    """All measurements, one after the other."""
    results = Results()
    data = make_data(items, seed=seed)
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    _, true = faiss.knn(data.queries, data.vectors, K, metric=faiss.METRIC_INNER_PRODUCT)
    with Collections.open(directory) as collections:
        collection = collections.create("benchmark", fingerprint="benchmark", dimensions=DIMENSIONS)
        results.add("ours, filled in batches of 1,000", items_per_s=fill(collection, data))
        began = time.perf_counter()
        collections.settle(timeout_s=1_800)
        results.add("ours, background after filling", seconds=time.perf_counter() - began)
        view = collection.index.snapshot.ivf
        if view is not None:
            setting = view.ivf.settings[0]
            chosen = {"lists": view.ivf.lists, "probes": setting.probes, "depth": setting.depth}
            results.add("ours, settings", **chosen, recall_of_stored=setting.recall)
            measure_bare(data, true, results, lists=view.ivf.lists, setting=setting)
        measure_searches(collection, data, true, results)
    measure_opening(directory, results)
    with Collections.open(directory) as collections:
        measure_writing(collections.get("benchmark"), data, results)
    return results


def main() -> None:
    """Measures, prints a table and writes a file."""
    parser = argparse.ArgumentParser(description="Measures the collections against faiss alone.")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31))
    parser.add_argument("--json", type=Path, help="default: benchmarks/search-ITEMS.json")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open is not None:
        open_and_search(arguments.open)
        return
    directory = Path(tempfile.mkdtemp(prefix="dinoserve-benchmark-"))
    try:
        results = run(arguments.items, seed=arguments.seed, directory=directory)
    finally:
        shutil.rmtree(directory)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, faiss "
        f"{faiss.__version__}, numpy {np.__version__}, SQLite {sqlite3.sqlite_version}"
    )
    print(f"\n{machine}; {arguments.items:,} items of {DIMENSIONS} dimensions, {QUERIES:,} queries\n")
    print("| | |\n|---|---|")
    for name, words in results.rows:
        print(f"| {name} | {words} |")
    path = arguments.json or ROOT / f"benchmarks/search-{arguments.items}.json"
    about = {"machine": machine, "items": arguments.items, "queries": QUERIES, "seed": arguments.seed}
    path.write_text(json.dumps(about | {"results": results.numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
