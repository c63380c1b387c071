"""What the machine can do without a service: forward alone, decoding alone, and both in a bare loop.

`python -m app.bench.ceilings MODEL` prints JSON. A process of its own, which gives all memory back before the
service is measured.

Dimension key: B images · C channels · H W pixels
"""

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, get_args

import torch
from torch import Tensor

from app.bench.findings import Ceilings
from app.bench.payloads import generated_pictures, pictures_of
from app.inference.config import Backend
from app.inference.embedder import Collect, Embedder, batch_sizes
from app.inference.engine import make_embedder
from app.inference.threads import cpu_budget, use_native_threads
from dino_core.bundle import load_bundle
from dino_core.preprocess import load_pixels

_PICTURES: Final = 64
_ROUNDS: Final = 3
_ROUND_S: Final = 0.5


def measure_ceilings(model: Path, *, device: str, backend: Backend, pictures: Sequence[bytes]) -> Ceilings:
    """Measures; takes some seconds, in which nothing else should compute.

    Raises:
        DinoError: The bundle can't be loaded, or a picture not be decoded.
    """
    bundle = load_bundle(model, device=device)
    cores = cpu_budget()
    threads = min(torch.get_num_threads(), cores)
    embedder = make_embedder(bundle, backend=backend, threads=threads)
    use_native_threads(threads)
    decoded = [load_pixels(picture, embedder.preprocessing) for picture in pictures]
    forward = {
        size: _forward_per_s(embedder, _batch(decoded, size)) for size in batch_sizes(embedder.max_batch)
    }
    best = max(forward, key=lambda size: forward[size])

    def bare_loop() -> int:
        chosen = [pictures[number % len(pictures)] for number in range(best)]
        embedder.launch([torch.stack([load_pixels(data, embedder.preprocessing) for data in chosen])])()
        return best

    def decode() -> int:
        for data in pictures:
            load_pixels(data, embedder.preprocessing)
        return len(pictures)

    bare_loop_per_s = _per_s(bare_loop)
    use_native_threads(1)  # as the service's decoders
    return Ceilings(
        device=device,
        backend=embedder.model.backend,
        forward_by_batch=forward,
        decode_images_per_s_core=_per_s(decode),
        bare_loop_images_per_s=bare_loop_per_s,
        bare_loop_batch=best,
        cores=cores,
    )


def _batch(decoded: Sequence[Tensor], size: int) -> Tensor:
    pixels_BCHW = torch.stack([decoded[number % len(decoded)] for number in range(size)])
    return pixels_BCHW.contiguous(memory_format=torch.channels_last)


def _forward_per_s(embedder: Embedder, pixels_BCHW: Tensor) -> float:
    if embedder.pinned:
        pixels_BCHW = pixels_BCHW.pin_memory()
    in_flight: deque[Collect] = deque()

    def forward() -> int:
        in_flight.append(embedder.launch([pixels_BCHW]))
        if len(in_flight) < embedder.in_flight:
            return 0
        in_flight.popleft()()
        return len(pixels_BCHW)

    per_s = _per_s(forward)
    while in_flight:
        in_flight.popleft()()
    return per_s


def _per_s(work: Callable[[], int]) -> float:
    """Units that `work` does in a second: the median of some rounds, after one call to warm up."""
    work()
    rates = []
    for _ in range(_ROUNDS):
        began_s, done = time.perf_counter(), 0
        while time.perf_counter() - began_s < _ROUND_S:
            done += work()
        rates.append(done / (time.perf_counter() - began_s))
    return statistics.median(rates)


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", choices=get_args(Backend), default="auto")
    parser.add_argument("--images", type=Path)
    told = parser.parse_args()
    pictures = pictures_of(told.images)[:_PICTURES] if told.images else generated_pictures(_PICTURES)
    found = measure_ceilings(told.model, device=told.device, backend=told.backend, pictures=pictures)
    sys.stdout.write(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
