"""What the engine reaches of what the machine can do: `make bench`.

    bare loop   one process, one picture after the other: decode, resize, crop; then forward in batches of 8
    engine      the same files through `Engine.embed`, 32 clients, one picture a request, no cache

Both use the same cores and alternate, so that only their ratio is read; it goes with machine, versions and n.
Nothing else may compute meanwhile.
"""

import asyncio
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from app.inference.config import InferenceConfig
from app.inference.engine import Engine
from dino_core.bundle import Bundle, load_bundle
from dino_core.preprocess import load_pixels

ROOT = Path(__file__).parents[1]
PICTURES = 128
CLIENTS = 32
ROUNDS = 7
BATCH = 8


def photographs() -> list[bytes]:
    """JPEGs of 500 x 375 of the example photographs, with noise, so that none equals another."""
    sources = sorted((ROOT / "examples/photos").rglob("*.jpg"))
    rng = np.random.default_rng(0)
    made = []
    for number in range(PICTURES):
        image = Image.open(sources[number % len(sources)]).convert("RGB").resize((500, 375))
        noisy = np.asarray(image, dtype=np.int16) + rng.integers(-6, 7, (375, 500, 3), dtype=np.int16)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        made.append(file.getvalue())
    return made


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bare_loop(bundle: Bundle, files: list[bytes]) -> None:
    """The least that must be done, by one thread of Python; the model on all cores."""
    with torch.inference_mode():
        for start in range(0, len(files), BATCH):
            batch = [load_pixels(file, bundle.model.preprocessing) for file in files[start : start + BATCH]]
            bundle.model(torch.stack(batch))


async def measured(bundle: Bundle, files: list[bytes]) -> tuple[list[float], list[float]]:
    """Seconds of the bare loop and of the engine, in turns."""
    engine = Engine(bundle, InferenceConfig(cache_rows=0))
    threads = torch.get_num_threads()
    await engine.start()

    async def client(mine: list[bytes]) -> None:
        for file in mine:
            await engine.embed([file])

    bare_s, engine_s = [], []
    for _ in range(ROUNDS + 1):
        torch.set_num_threads(threads)
        bare_s.append(seconds(lambda: bare_loop(bundle, files)))
        began = time.perf_counter()
        await asyncio.gather(*(client(files[number::CLIENTS]) for number in range(CLIENTS)))
        engine_s.append(time.perf_counter() - began)
    await engine.stop()
    return bare_s[1:], engine_s[1:]  # the first round warms up


def main() -> None:
    """Measures and prints a table."""
    bundle = load_bundle(ROOT / "models/default")
    bare_s, engine_s = asyncio.run(measured(bundle, photographs()))
    shares = [bare / engine for bare, engine in zip(bare_s, engine_s, strict=True)]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(
        f"torch {torch.__version__}; {bundle.manifest.architecture}, {bundle.model.preprocessing.crop_px} px"
    )
    print(f"n = {ROUNDS} rounds of {PICTURES} JPEGs of 500 x 375; medians\n")
    print("| | images/s |\n|---|---|")
    print(f"| bare loop | {PICTURES / statistics.median(bare_s):.0f} |")
    print(f"| engine, {CLIENTS} clients | {PICTURES / statistics.median(engine_s):.0f} |")
    print(f"\nengine / bare loop: {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})")


if __name__ == "__main__":
    main()
