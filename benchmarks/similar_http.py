"""What HTTP adds to a search: `python -m benchmarks.similar_http`.

    in-process   `Collection.search` on a collection of 100,000 items, one query after the other
    HTTP         the same queries as POST /similar, over one connection, to `dino-serve run` on the same data

A data directory has one owner, so the two can't alternate: first all of one, then all of the other, then the
first again, to see what the machine did meanwhile. Nothing else may compute. Prints JSON.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.search.collection import Collection, Item, Json
from app.search.embedded.library import Collections
from dino_core.bundle import load_bundle

ROOT = Path(__file__).parents[1]
CLUSTERS = 2_000
BATCH = 1_000
SETTLE_S = 2.0
K = 10
Rows = npt.NDArray[np.float32]
FILTER: dict[str, Json] = {"field": "bucket", "lt": 10}  # keeps a tenth


def clustered(count: int, dimensions: int, *, seed: int) -> Rows:
    """Points of a few thousand clusters of uneven sizes, spread over 32 dimensions, with noise in all."""
    shape = np.random.default_rng(0)
    basis = np.linalg.qr(shape.normal(size=(dimensions, 32)))[0].T
    centres = shape.normal(size=(CLUSTERS, 32))
    weights = shape.pareto(1.5, CLUSTERS) + 0.1
    rng = np.random.default_rng(seed)
    chosen = rng.choice(CLUSTERS, count, p=weights / weights.sum())
    rows = (centres[chosen] + 0.45 * rng.normal(size=(count, 32))) @ basis
    rows += 0.3 * rng.normal(size=rows.shape) * np.linalg.norm(rows, axis=1, keepdims=True) / dimensions**0.5
    return rows.astype(np.float32)


def fill(data_dir: Path, *, items: int, fingerprint: str, dimensions: int) -> None:
    """Puts items into the collection `default` of a new data directory."""
    rng = np.random.default_rng(1)
    with Collections.open(data_dir) as collections:
        collection = collections.create("default", fingerprint=fingerprint, dimensions=dimensions)
        for start in range(0, items, BATCH):
            rows = clustered(min(BATCH, items - start), dimensions, seed=start + 2)
            batch = [
                Item(
                    id=f"photos/{start + i:07}.jpg",
                    vector=row,
                    metadata={"bucket": int(rng.integers(100)), "filename": f"{start + i:07}.jpg"},
                )
                for i, row in enumerate(rows)
            ]
            collection.upsert(batch, fingerprint=fingerprint)


def milliseconds(calls: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Median and 99th percentile of the calls, after a tenth of them as warm-up.

    Where calls answer with what the service says that the search took, also the median of the rest.
    """
    for call in calls[: len(calls) // 10]:
        call()
    taken, rest = [], []
    for call in calls:
        began = time.perf_counter()
        search_ms = call()
        taken.append((time.perf_counter() - began) * 1000)
        if isinstance(search_ms, float):
            rest.append(taken[-1] - search_ms)
    figures = {"p50_ms": np.median(taken), "p99_ms": np.percentile(taken, 99)}
    if rest:
        figures |= {"beside_search_p50_ms": np.median(rest)}
    return {name: round(float(figure), 3) for name, figure in figures.items()}


def in_process(collection: Collection, queries: Rows, ids: list[str]) -> dict[str, Any]:
    """The engine's own times; by id, reading the item belongs to it."""

    def by_id(item_id: str, **options: Any) -> object:  # noqa: ANN401
        (item,) = collection.get([item_id])
        assert item is not None
        return collection.search(item.vector[None], k=K, exclude_ids=[item_id], **options)

    return {
        "by vector": milliseconds([lambda q=query: collection.search(q[None], k=K) for query in queries]),
        "by id": milliseconds([lambda i=item_id: by_id(i) for item_id in ids]),
        "by vector, filtered": milliseconds(
            [lambda q=query: collection.search(q[None], k=K, filter=FILTER) for query in queries]
        ),
        "by id, filtered": milliseconds([lambda i=item_id: by_id(i, filter=FILTER) for item_id in ids]),
    }


def over_http(port: int, queries: Rows, ids: list[str]) -> dict[str, Any]:
    """The service's times, over one connection that stays open. Bodies are made beforehand."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def post(body: bytes) -> float:
        connection.request("POST", "/similar", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        found = re.search(r"search;dur=([\d.]+)", answer.headers["Server-Timing"])
        assert found is not None
        return float(found.group(1))

    def calls(bodies: list[dict[str, Any]]) -> list[Callable[[], float]]:
        return [partial(post, json.dumps(body).encode()) for body in bodies]

    vectors = [{"embedding": query.tolist(), "k": K} for query in queries]
    names = [{"id": item_id, "k": K} for item_id in ids]
    results = {
        "by vector": milliseconds(calls(vectors)),
        "by id": milliseconds(calls(names)),
        "by vector, filtered": milliseconds(calls([body | {"filter": FILTER} for body in vectors])),
        "by id, filtered": milliseconds(calls([body | {"filter": FILTER} for body in names])),
    }
    connection.close()
    return results


@contextlib.contextmanager
def service(model: Path, data_dir: Path) -> Iterator[int]:
    """A process that serves on a free port; the port."""
    command = [sys.executable, "-m", "app", "run", "--model", str(model), "--data-dir", str(data_dir)]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                    yield int(found.group(1))
                    return
            raise RuntimeError("the service did not start")
        finally:
            process.terminate()
            process.communicate()


def measured(model: Path, *, items: int, requests: int) -> dict[str, Any]:
    """Both, and what lies between their medians."""
    bundle = load_bundle(model)
    fingerprint, dimensions = bundle.manifest.fingerprint, bundle.model.dimensions
    queries = clustered(requests, dimensions, seed=1)
    numbers = np.random.default_rng(2).integers(items, size=requests)
    ids = [f"photos/{number:07}.jpg" for number in numbers]
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "data"
        fill(data_dir, items=items, fingerprint=fingerprint, dimensions=dimensions)

        def engine() -> dict[str, Any]:
            with Collections.open(data_dir) as collections:
                time.sleep(SETTLE_S)
                return in_process(collections.get("default"), queries, ids)

        before = engine()
        with service(model, data_dir) as port:
            time.sleep(SETTLE_S)
            http_times = over_http(port, queries, ids)
        after = engine()
    return {
        "in_process": before,
        "in_process_again": after,
        "http": http_times,
        "http_adds_ms": {
            name: round(times["p50_ms"] - (before[name]["p50_ms"] + after[name]["p50_ms"]) / 2, 3)
            for name, times in http_times.items()
        },
    }


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/default")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=1_000)
    options = parser.parse_args()
    setting = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("fastapi", "uvicorn", "orjson", "faiss-cpu", "numpy")},
        "items": options.items,
        "n": options.requests,
        "k": K,
    }
    print(
        json.dumps(
            setting | measured(options.model, items=options.items, requests=options.requests), indent=2
        )
    )


if __name__ == "__main__":
    main()
