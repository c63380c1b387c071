"""Loads against one service, with the service's own figures around each: one, or a sweep of the rate."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from app.bench.findings import Run, ServerFigures
from app.bench.load import Measured, closed_loop, open_loop
from app.bench.payloads import Payload
from app.bench.wire import Endpoint

# Of what a closed loop reached. The last are beyond what the service can do, so that a sweep ends.
_STEPS: Final = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
_REFINEMENTS: Final = 2
_MAX_ERROR_SHARE: Final = 0.01
_SCRAPE_S: Final = 10.0
_SERIES: Final = {
    "cpu_s": ("process_cpu_seconds_total", {}),
    "decode_s": ("dino_serve_decode_cpu_seconds_total", {}),
    "device_busy_s": ("dino_serve_device_busy_seconds_total", {}),
    "images": ("dino_serve_images_total", {"outcome": "embedded"}),
    "batches": ("dino_serve_batch_size_count", {}),
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is loaded, and with what.

    Attributes:
        base_url: Of the service.
        payloads: Requests.
        api_key: Where the service wants one.
        duration_s: Of each load, warm-up included.
        warm_up_s: Not counted.
        timeout_s: After it a request is given up.
    """

    base_url: str
    payloads: Sequence[Payload]
    api_key: str | None
    duration_s: float
    warm_up_s: float
    timeout_s: float

    @property
    def endpoint(self) -> Endpoint:
        """Where it listens."""
        return Endpoint.of(self.base_url)


def closed(target: Target, *, clients: int) -> Run:
    """Loads the service with clients that wait for their answers."""
    return _run(
        target,
        f"{clients} clients",
        None,
        partial(closed_loop, clients=clients),
    )


def opened(target: Target, *, rate_per_s: float) -> Run:
    """Loads the service with requests that come at a constant rate."""
    return _run(
        target,
        f"{rate_per_s:.4g} requests/s",
        rate_per_s,
        partial(open_loop, rate_per_s=rate_per_s),
    )


def sweep(
    target: Target, *, clients: int, p99_ms: float, told: Callable[[Run], object]
) -> tuple[list[Run], Run | None]:
    """Raises the rate until p99 breaks its bound, or more than 1 % of the requests fail; then looks closer.

    Args:
        target: What is loaded.
        clients: Of the closed loop that comes first; rates are shares of what it reaches.
        p99_ms: The bound.
        told: Hears of each load.

    Returns:
        All loads, in order of rate after the closed loop, and the one of the highest rate that held.
    """
    reached = closed(target, clients=clients)
    told(reached)
    runs: list[Run] = []

    def holds(rate_per_s: float) -> bool:
        run = opened(target, rate_per_s=rate_per_s)
        told(run)
        runs.append(run)
        return holds_bound(run, p99_ms)

    good, bad = 0.0, None
    for step in _STEPS:
        rate_per_s = step * reached.measured.requests_per_s
        if not holds(rate_per_s):
            bad = rate_per_s
            break
        good = rate_per_s
    if bad is not None and good:
        for _ in range(_REFINEMENTS):
            middle = (good + bad) / 2
            good, bad = (middle, bad) if holds(middle) else (good, middle)
    runs.sort(key=lambda run: run.offered_per_s or 0.0)
    held = [run for run in runs if run.offered_per_s == good]
    return [reached, *runs], held[0] if held else None


def holds_bound(run: Run, p99_ms: float) -> bool:
    """Whether a load's p99 is within the bound, nearly all of its requests being answered well."""
    return run.measured.error_share <= _MAX_ERROR_SHARE and run.measured.latency_ms(99) <= p99_ms


def server_figures(base_url: str, api_key: str | None) -> ServerFigures:
    """What the service's `/metrics` say; nothing where it has none."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    nothing = ServerFigures(**dict.fromkeys(_SERIES))
    try:
        answer = httpx.get(f"{base_url.rstrip('/')}/metrics", headers=headers, timeout=_SCRAPE_S)
        answer.raise_for_status()
        samples = [
            sample for family in text_string_to_metric_families(answer.text) for sample in family.samples
        ]
    except (httpx.HTTPError, ValueError):
        return nothing

    def total(name: str, labels: dict[str, str]) -> float | None:
        # Of all models together, where there are several.
        values = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        return sum(values) if values else None

    return ServerFigures(**{figure: total(name, labels) for figure, (name, labels) in _SERIES.items()})


def _run(
    target: Target,
    load: str,
    offered_per_s: float | None,
    work: Callable[..., Coroutine[Any, Any, Measured]],
) -> Run:
    before = server_figures(target.base_url, target.api_key)
    began_s = time.perf_counter()
    measured = asyncio.run(
        work(
            target.endpoint,
            target.payloads,
            duration_s=target.duration_s,
            warm_up_s=target.warm_up_s,
            timeout_s=target.timeout_s,
        )
    )
    elapsed_s = time.perf_counter() - began_s
    after = server_figures(target.base_url, target.api_key)
    return Run(
        load=load,
        offered_per_s=offered_per_s,
        measured=measured,
        elapsed_s=elapsed_s,
        before=before,
        after=after,
    )
