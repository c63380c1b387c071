"""Backends on a CPU, bare and behind the engine: `python -m benchmarks.backends [BUNDLE ...] [--out FILE]`.

    bare forward   images/s of each backend at batch 1 to 16, on one thread and on all cores
    bare loop      one process: decode, resize, crop, then forward; its best batch size is the ceiling
    engine         the same files through `Engine.embed`, 32 clients, one picture a request, no cache, for
                   several splits of the cores between decoders and the model; the default is marked

What belongs to one bundle takes turns, so that what else the machine does meets all of it: of the forward
the best counts, of loop and engine the median. Nothing else may compute meanwhile; some minutes a bundle.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from app.inference.backends import cpu_embedder
from app.inference.config import Backend, InferenceConfig
from app.inference.embedder import Embedder
from app.inference.engine import Engine
from app.inference.threads import cpu_budget, use_native_threads
from benchmarks.__main__ import CLIENTS, ROOT, photographs
from dino_core.bundle import Bundle, load_bundle
from dino_core.errors import DinoError
from dino_core.preprocess import load_pixels

BACKENDS: tuple[Backend, ...] = ("torch", "onnxruntime", "openvino")
SIZES = (1, 2, 4, 8, 16)
LOOP_SIZES = (4, 8, 16)
FORWARD_S = 12.0  # of one bundle and number of threads
ROUNDS = 3


def embedders(bundle: Bundle, *, threads: int) -> dict[Backend, Embedder]:
    """Those that are installed and agree with torch."""
    found: dict[Backend, Embedder] = {}
    for backend in BACKENDS:
        try:
            found[backend] = cpu_embedder(bundle, backend, max_batch=max(SIZES), threads=threads)
        except DinoError as error:
            print(f"{backend}: {error}")
    return found


def forward(bundle: Bundle, *, threads: int) -> dict[str, dict[str, float]]:
    """Images/s of each backend by batch size."""
    use_native_threads(threads)
    candidates = embedders(bundle, threads=threads)
    size_px = bundle.manifest.preprocessing.crop_px
    pixels = {size: torch.zeros((size, 3, size_px, size_px), dtype=torch.uint8) for size in SIZES}
    least_s = {(name, size): float("inf") for name in candidates for size in SIZES}
    for embedder in candidates.values():
        for size in SIZES:
            embedder.launch([pixels[size]])()
    until_s = time.perf_counter() + FORWARD_S
    while time.perf_counter() < until_s:
        for name, embedder in candidates.items():
            for size in SIZES:
                began_s = time.perf_counter()
                embedder.launch([pixels[size]])()
                least_s[name, size] = min(least_s[name, size], time.perf_counter() - began_s)
    return {name: {str(size): round(size / least_s[name, size], 1) for size in SIZES} for name in candidates}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def bare_loop(embedder: Embedder, files: Sequence[bytes], size: int) -> None:
    """The least that must be done, by one thread of Python."""
    for start in range(0, len(files), size):
        batch = [load_pixels(file, embedder.preprocessing) for file in files[start : start + size]]
        embedder.launch([torch.stack(batch)])()


async def through_engine(engine: Engine, files: Sequence[bytes]) -> float:
    """Seconds for all files."""

    async def client(mine: Sequence[bytes]) -> None:
        for file in mine:
            await engine.embed([file])

    began_s = time.perf_counter()
    await asyncio.gather(*(client(files[number::CLIENTS]) for number in range(CLIENTS)))
    return time.perf_counter() - began_s


async def end_to_end(bundle: Bundle, backend: Backend, files: Sequence[bytes]) -> dict[str, Any]:
    """The engine's share of the bare loop, by (decode threads, compute threads)."""
    cores = cpu_budget()
    default = (max(1, cores // 2), cores)
    splits = sorted({default, (max(1, cores // 2), max(1, cores // 2)), (cores, cores), (1, cores)})
    embedder = cpu_embedder(bundle, backend, max_batch=max(LOOP_SIZES), threads=cores)
    loops: dict[int, list[float]] = {size: [] for size in LOOP_SIZES}
    engines: dict[tuple[int, int], list[float]] = {split: [] for split in splits}
    for round_number in range(ROUNDS + 1):
        for size in LOOP_SIZES:
            use_native_threads(cores)
            loops[size].append(seconds(lambda: bare_loop(embedder, files, size)))  # noqa: B023
        for decode_threads, compute_threads in splits:
            engine = Engine(
                bundle,
                InferenceConfig(
                    backend=backend,
                    cache_rows=0,
                    timeout_s=None,
                    decode_threads=decode_threads,
                    compute_threads=compute_threads,
                ),
            )
            await engine.start()
            try:
                engines[decode_threads, compute_threads].append(await through_engine(engine, files))
            finally:
                await engine.stop()
        if round_number == 0:  # it warms up
            for taken in (*loops.values(), *engines.values()):
                taken.clear()
    best_size = min(loops, key=lambda size: statistics.median(loops[size]))
    ceiling_s = statistics.median(loops[best_size])
    return {
        "bare_loop_images_per_s": round(len(files) / ceiling_s, 1),
        "bare_loop_batch": best_size,
        "engine": [
            {
                "decode_threads": decode,
                "compute_threads": compute,
                "default": (decode, compute) == default,
                "images_per_s": round(len(files) / statistics.median(taken), 1),
                "share_of_bare_loop": round(ceiling_s / statistics.median(taken), 3),
            }
            for (decode, compute), taken in engines.items()
        ],
    }


def measure(path: Path, files: Sequence[bytes]) -> dict[str, Any]:
    """All numbers of one bundle."""
    bundle = load_bundle(path)
    cores = cpu_budget()
    result: dict[str, Any] = {
        "bundle": bundle.manifest.id,
        "architecture": bundle.manifest.architecture,
        "input_px": bundle.manifest.preprocessing.crop_px,
        "forward_images_per_s": {
            f"{threads} threads": forward(bundle, threads=threads) for threads in sorted({1, cores})
        },
    }
    named = result["forward_images_per_s"][f"{cores} threads"]
    result["end_to_end"] = {
        backend: asyncio.run(end_to_end(bundle, backend, files)) for backend in BACKENDS if backend in named
    }
    return result


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    versions = {}
    for package in ("torch", "onnx", "onnxscript", "onnxruntime", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": model or platform.machine(),
        "cores": cpu_budget(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    """Measures, prints, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundles", nargs="*", type=Path, default=[ROOT / "models/default"])
    parser.add_argument("--pictures", type=int, default=96, help="JPEGs of 500 x 375 for loop and engine")
    parser.add_argument("--out", type=Path, help="where the JSON goes, beside the screen")
    flags = parser.parse_args()
    files = photographs()[: flags.pictures]
    result = {
        "machine": machine(),
        "rounds": ROUNDS,
        "pictures": len(files),
        "bundles": [measure(path, files) for path in flags.bundles],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if flags.out:
        flags.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
