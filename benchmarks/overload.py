"""What a service does when three times as much is asked as it can do: `python -m benchmarks.overload`.

    capacity       a closed loop of 32 clients: the most that the service reaches
    0.5x, 1x, 3x   an open loop: requests arrive at that share of it, whatever became of those before

Of each: goodput (images answered within the deadline), how long accepted requests took, with which status the
others were refused, and the service's memory. The bar: at 3x the goodput is at least 0.9 of the best one, the
p99 of what was accepted is within the deadline, and memory stays as it is. A real process serves; one picture
a request, each one new to the cache. Nothing else may compute meanwhile. Prints JSON; takes three minutes.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import torch

from app.bench.load import OK, Measured, closed_loop, open_loop
from app.bench.payloads import embed_payloads, generated_pictures
from app.bench.processes import own_service
from app.bench.wire import Endpoint

ROOT: Final = Path(__file__).parents[1]
CLIENTS: Final = 32
SHARES: Final = (0.5, 1.0, 3.0)
WARM_UP_S: Final = 4.0
SETTLE_S: Final = 3.0
PATIENCE_S: Final = 10.0  # of the client, beyond the deadline: what comes later would be a hang
TIME_RAN_OUT: Final = "504"
REFUSED: Final = ("429", "503")


def measured_answer(measured: Measured, *, deadline_s: float) -> dict[str, Any]:
    """Goodput, latencies of what was accepted, and the statuses of the rest."""
    good = [
        sample
        for sample in measured.counted
        if sample.outcome == OK and sample.ended_s - sample.due_s <= deadline_s
    ]
    accepted_ms = [
        (sample.ended_s - sample.due_s) * 1000
        for sample in measured.counted
        if sample.outcome in {OK, TIME_RAN_OUT}
    ]
    refused_ms = [
        (sample.ended_s - sample.due_s) * 1000 for sample in measured.counted if sample.outcome in REFUSED
    ]
    return {
        "requests": len(measured.counted),
        "goodput_images_per_s": round(sum(sample.images for sample in good) / measured.window_s, 1),
        "accepted": {"requests": len(accepted_ms)} | _percentiles(accepted_ms),
        "refused": {"requests": len(refused_ms)} | _percentiles(refused_ms),
        "outcomes": dict(sorted(measured.outcomes.items())),
        "generator_late_p99_ms": round(measured.lateness_ms(99), 1),
    }


def _percentiles(values_ms: list[float]) -> dict[str, float]:
    if not values_ms:
        return {}
    return {f"p{share}_ms": round(float(np.percentile(values_ms, share)), 1) for share in (50, 99)}


def resident_mb(url: str) -> float:
    """The service's memory, as it says itself."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    assert found, "the service doesn't say how much memory it has"
    return round(float(found.group(1)) / 2**20, 1)


def loaded(url: str, *, seconds: float, deadline_s: float) -> dict[str, Any]:
    """All loads, one after the other."""
    endpoint = Endpoint.of(url)
    payloads = embed_payloads(endpoint, generated_pictures(64), timeout_s=deadline_s)
    told: dict[str, Any] = {
        "duration_s": WARM_UP_S + seconds,
        "warm_up_s": WARM_UP_S,
        "timeout_s": deadline_s + PATIENCE_S,
    }
    closed = asyncio.run(closed_loop(endpoint, payloads, clients=CLIENTS, **told))
    capacity_per_s = closed.images_per_s
    answer: dict[str, Any] = {
        "capacity": measured_answer(closed, deadline_s=deadline_s) | {"resident_mb": resident_mb(url)}
    }
    for share in SHARES:
        time.sleep(SETTLE_S)
        before_mb = resident_mb(url)
        opened = asyncio.run(open_loop(endpoint, payloads, rate_per_s=share * capacity_per_s, **told))
        answer[f"{share:g}x"] = {
            "offered_per_s": round(share * capacity_per_s, 1),
            **measured_answer(opened, deadline_s=deadline_s),
            "resident_mb": {"before": before_mb, "after": resident_mb(url)},
        }
    return answer


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "models/default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each load, without its warm-up")
    parser.add_argument("--deadline-s", type=float, default=2.0, help="that each request tells the service")
    told = parser.parse_args()
    with own_service(told.model, device=told.device, backend="auto") as url:
        loads = loaded(url, seconds=told.seconds, deadline_s=told.deadline_s)
    goodput = {name: load["goodput_images_per_s"] for name, load in loads.items()}
    at_most = loads[f"{SHARES[-1]:g}x"]
    print(
        json.dumps(
            {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "load_average_before": os.getloadavg()[2],
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    **{name: version(name) for name in ("dinoserve", "uvicorn")},
                },
                "model": told.model.name,
                "deadline_s": told.deadline_s,
                "loads": loads,
                "goodput_at_3x_of_best": round(at_most["goodput_images_per_s"] / max(goodput.values()), 3),
                "p99_of_accepted_at_3x_of_deadline": round(
                    at_most["accepted"]["p99_ms"] / 1000 / told.deadline_s, 3
                ),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
