"""How near `index add` comes to the model: `python -m benchmarks.ingest FOLDER`.

    engine       the files' bytes, in memory, through `Engine.embed`: 32 a request, 4 in flight, no cache
    in-process   `index add` of the same files into an empty data directory: read, looked up, hashed,
                 embedded, thumbnails made, committed with an fsync for every 32
    service      the same over HTTP, to `dino-serve run` in a process of its own on the same cores
    resumed      `index add` again: nothing has changed, nothing is read

They take turns, so that only ratios are read; they go with machine, versions and n. Starting model and
service is left out. Nothing else may compute meanwhile, and no service may run at the default address.
"""

import argparse
import asyncio
import contextlib
import io
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from app.index_report import Report
from app.indexing import Sink, add_pictures
from app.inference.config import InferenceConfig
from app.inference.engine import Engine
from app.ledger import Ledger
from app.sinks import EngineSink, Place, open_sink
from app.sources.folder import FolderSource
from dino_core.bundle import load_bundle

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "models/default"
BATCH = 32
IN_FLIGHT = 4
_URL = re.compile(r"http://127\.0\.0\.1:\d+")


def engine_s(files: Sequence[bytes]) -> float:
    """Seconds that the engine needs for the files, once it is warm."""

    async def measured() -> float:
        engine = Engine(load_bundle(BUNDLE), InferenceConfig(cache_rows=0, timeout_s=None))
        await engine.start()
        batches = iter([files[start : start + BATCH] for start in range(0, len(files), BATCH)])

        async def caller() -> None:
            for batch in batches:
                await engine.embed(batch)

        await engine.embed(files[:BATCH])
        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
        took = time.perf_counter() - began
        await engine.stop()
        return took

    return asyncio.run(measured())


def added_s(folder: Path, sink: Sink, work: Path, *, ledger: Path | None) -> tuple[float, dict[str, int]]:
    """Seconds of `index add`, and what became of the pictures."""
    with Ledger(ledger) as hashes:
        began = time.perf_counter()
        report = add_pictures(
            FolderSource(folder),
            sink,
            ledger=hashes,
            report=Report(work / "report"),
            requests_in_flight=IN_FLIGHT,
            batch_images=BATCH,
            console=Console(file=io.StringIO()),
        )
        return time.perf_counter() - began, dict(report.counts)


@contextlib.contextmanager
def running_service(data_dir: Path) -> Iterator[str]:
    """The address of a service on the same cores."""
    command = [sys.executable, "-m", "app", "run", "--model", str(BUNDLE), "--data-dir", str(data_dir)]
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            found = next(found for line in process.stderr if (found := _URL.search(line)))
            yield found.group()
        finally:
            process.terminate()


def measured_round(folder: Path, files: Sequence[bytes], work: Path) -> dict[str, float]:
    """Images per second of each way."""
    count = len(files)
    shutil.rmtree(work / "data", ignore_errors=True)
    (work / "ledger").unlink(missing_ok=True)
    rates = {"engine": count / engine_s(files)}
    place = Place(data_dir=work / "data", model=BUNDLE, server=None)
    with open_sink(place, collection="default") as sink:
        assert isinstance(sink, EngineSink), "a service runs at the default address"
        took_s, counts = added_s(folder, sink, work, ledger=work / "ledger")
        assert counts == {"added": count}, counts
        rates["in-process"] = count / took_s
        took_s, counts = added_s(folder, sink, work, ledger=work / "ledger")
        assert counts == {"unchanged": count}, counts
        rates["resumed"] = count / took_s
    shutil.rmtree(work / "data")
    with (
        running_service(work / "data") as url,
        open_sink(Place(server=url), collection="default") as sink,
    ):
        took_s, counts = added_s(folder, sink, work, ledger=None)
        assert counts == {"added": count}, counts
        rates["service"] = count / took_s
    return rates


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest")
    parser.add_argument("folder", type=Path, help="pictures, 3,000 or more")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pictures = FolderSource(arguments.folder).entries(max_image_bytes=2**30)
    files = [Path(entry.where).read_bytes() for entry in pictures]
    with tempfile.TemporaryDirectory() as work:
        rounds = [measured_round(arguments.folder, files, Path(work)) for _ in range(arguments.rounds + 1)][
            1:
        ]  # the first warms the disk's cache
    bundle = load_bundle(BUNDLE)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"torch {torch.__version__}; {bundle.manifest.architecture}")
    mean_kb = sum(map(len, files)) / len(files) / 1000
    print(f"n = {len(rounds)} rounds of {len(files):,} pictures of {mean_kb:.1f} kB in the mean; medians\n")
    print("| | images/s | of the engine's |\n|---|---|---|")
    for name in ("engine", "in-process", "service", "resumed"):
        shares = [one[name] / one["engine"] for one in rounds]
        rate = statistics.median(one[name] for one in rounds)
        print(f"| {name} | {rate:,.0f} | {statistics.median(shares):.2f} ", end="")
        print(f"({min(shares):.2f} to {max(shares):.2f}) |")


if __name__ == "__main__":
    main()
