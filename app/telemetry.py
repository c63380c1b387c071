"""What the service tells about itself: Prometheus metrics and logs. Nothing leaves the process."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Final

import orjson
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from app.inference.results import ModelInfo
from app.inference.stats import CounterName, HistogramName

_PREFIX: Final = "dino_serve_"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LABEL_OF: dict[CounterName, str] = {
    "images_total": "outcome",
    "image_errors_total": "reason",
    "rejected_total": "reason",
    "cache_hits_total": "kind",
}
_COUNTERS: dict[CounterName, str] = {
    "images_total": "Images of admitted requests, each once",
    "image_errors_total": "Images without an embedding",
    "rejected_total": "Requests refused for their cost",
    "cancelled_total": "Requests whose caller left before the answer",
    "deadline_exceeded_total": "Requests whose time ran out",
    "cache_hits_total": "Images whose embedding was there, or on its way",
    "device_busy_seconds_total": "Time with a batch on the device; its rate is the share of time it works",
}
_HISTOGRAMS: dict[HistogramName, tuple[str, tuple[float, ...]]] = {
    "decode_seconds": ("Hash, decode, resize and copy of one image", _SECONDS),
    "queue_wait_seconds": ("From pixels ready to launch, per image", _SECONDS),
    "forward_seconds": ("From launch to rows on the host, per batch", _SECONDS),
    "batch_size": ("Images of a launch", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
}
_GAUGES = {
    "queue_depth": "Images that wait for a decoder or for the device",
    "inflight_batches": "Batches on the device",
    "inflight_images": "Images between arrival and answer",
    "inflight_bulk_images": "Those of them that are bulk's",
    "inflight_bytes": "Bytes of their files",
    "queue_pixels": "Their pixels, as the headers declare them",
    "images_per_second": "Rate that admission reckons with",
    "ready": "1 if a request would be taken now",
}


class Metrics:
    """The metrics of one app, in their own registry; the engine's `Observer`. Safe to use from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # CPU seconds, memory, open files; on Linux
        self._counters = {
            name: Counter(_PREFIX + name, help, _labels(name), registry=self._registry)
            for name, help in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(_PREFIX + name, help, buckets=buckets, registry=self._registry)
            for name, (help, buckets) in _HISTOGRAMS.items()
        }
        self._requests = Counter(
            f"{_PREFIX}requests_total", "Requests answered", ["route", "code"], registry=self._registry
        )
        self._request_seconds = Histogram(
            f"{_PREFIX}request_duration_seconds",
            "From a request's head to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )

    def count(self, name: CounterName, amount: float = 1, *, label: str = "") -> None:
        """Adds to a counter; see `app.inference.stats.Observer`."""
        counter = self._counters[name]
        (counter.labels(label) if name in _LABEL_OF else counter).inc(amount)

    def observe(self, name: HistogramName, value: float) -> None:
        """Notes one value of a distribution; see `app.inference.stats.Observer`."""
        self._histograms[name].observe(value)

    def request(self, route: str, status: int, duration_s: float) -> None:
        """Notes an answered request.

        Args:
            route: The route's template, never the path that was asked for: labels must be bounded.
            status: Of the answer; 499 where the caller left.
            duration_s: Until the answer's last byte.
        """
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(duration_s)

    def serves(
        self, models: Callable[[], Iterable[ModelInfo]], gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        """Asks at each scrape for the models that are served, and for what is in their engines.

        Args:
            models: Those served at the moment.
            gauges: Of all their engines together, by name.
        """
        self._registry.register(_Served(models, gauges))

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class _Served(Collector):
    def __init__(
        self, models: Callable[[], Iterable[ModelInfo]], gauges: Callable[[], Mapping[str, float]]
    ) -> None:
        self._models = models
        self._gauges = gauges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        info = GaugeMetricFamily(
            f"{_PREFIX}model_info",
            "The models served, and what computes them",
            labels=["id", "fingerprint", "backend"],
        )
        for model in self._models():
            info.add_metric([model.id, model.fingerprint, model.backend], 1)
        yield info
        for name, value in self._gauges().items():
            yield GaugeMetricFamily(_PREFIX + name, _GAUGES.get(name, name), value=value)


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the members of `fields`, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats one record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def set_up_logs(*, level: str, json_lines: bool) -> None:
    """Sends this process's logs to stderr. Called once, by the command line.

    Args:
        level: The least that is logged.
        json_lines: JSON, with a line for each request; otherwise plain text without them.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonLines() if json_lines else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("app.requests").setLevel(level.upper() if json_lines else "WARNING")
    # Its news are lines about its own start and stop; the command line says that in one of ours.
    logging.getLogger("uvicorn").setLevel("WARNING")
    for converter in ("onnx_ir", "onnxscript", "torch.onnx"):  # these tell of every node that they change
        logging.getLogger(converter).setLevel("WARNING")


def _labels(name: CounterName) -> list[str]:
    return [_LABEL_OF[name]] if name in _LABEL_OF else []
