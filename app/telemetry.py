"""What the service tells about itself: Prometheus metrics and logs. Nothing leaves the process."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import orjson
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
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
_KNOWN: dict[CounterName, tuple[str, ...]] = {
    "images_total": ("embedded", "failed", "dropped"),
    "rejected_total": ("images", "bytes", "pixels", "wait", "too_large"),
    "cache_hits_total": ("stored", "in_flight"),
}
_COUNTERS: dict[CounterName, str] = {
    "images_total": "Images of admitted requests, each once",
    "image_errors_total": "Images without an embedding",
    "rejected_total": "Requests refused for their cost",
    "cancelled_total": "Requests whose caller left before the answer",
    "deadline_exceeded_total": "Requests whose time ran out",
    "cache_hits_total": "Images whose embedding was there, or on its way",
    "decode_cpu_seconds_total": "CPU time of the threads that decode; its rate is the cores that they use",
    "padding_images_total": "Images computed beside a batch's own, to fill a size that the device runs",
    "device_busy_seconds_total": "Time with a batch on the device; its rate is the share of time it works",
}
_HISTOGRAMS: dict[HistogramName, tuple[str, tuple[float, ...]]] = {
    "decode_seconds": ("Hash, decode, resize and copy of one image, without its waits", _SECONDS),
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


@dataclass(frozen=True)
class Present:
    """A model that is served at the moment.

    Attributes:
        gauges: What is in its engine, by name.
    """

    model: ModelInfo
    architecture: str
    gauges: Mapping[str, float]


class Metrics:
    """The metrics of one app, in their own registry. Safe to use from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # CPU seconds, memory, open files; on Linux
        self._counters = {
            name: Counter(_PREFIX + name, help, ["model", *_labels(name)], registry=self._registry)
            for name, help in _COUNTERS.items()
        }
        self._histograms = {
            name: Histogram(_PREFIX + name, help, ["model"], buckets=buckets, registry=self._registry)
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
        self._under_way = Gauge(
            f"{_PREFIX}inflight_requests", "Requests between head and answer", registry=self._registry
        )

    def of(self, model_id: str) -> "ModelMetrics":
        """Those of one model's engine."""
        return ModelMetrics(model_id, self._counters, self._histograms)

    @contextlib.contextmanager
    def request_under_way(self) -> Iterator[None]:
        """Counts a request for as long as the block lasts."""
        self._under_way.inc()
        try:
            yield
        finally:
            self._under_way.dec()

    def request(self, route: str, status: int, duration_s: float) -> None:
        """Notes an answered request.

        Args:
            route: The route's template, never the path that was asked for: labels must be bounded.
            status: Of the answer; 499 where the caller left.
            duration_s: Until the answer's last byte.
        """
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(duration_s)

    def serves(self, present: Callable[[], Iterable[Present]]) -> None:
        """Asks at each scrape for the models that are served, and for what is in their engines."""
        self._registry.register(_Served(present))

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)


class ModelMetrics:
    """An engine's `Observer`: its events under its model's name.

    What can happen is there from the start with 0, so that a rate over the first event is seen.

    Args:
        model_id: Its label.
        counters: By name.
        histograms: By name.
    """

    def __init__(
        self,
        model_id: str,
        counters: Mapping[CounterName, Counter],
        histograms: Mapping[HistogramName, Histogram],
    ) -> None:
        self._model_id = model_id
        self._counters = counters
        # Looked up once: they run between a decoder's images.
        self._plain = {name: counters[name].labels(model_id) for name in counters if name not in _LABEL_OF}
        self._histograms = {name: one.labels(model_id) for name, one in histograms.items()}
        for name, values in _KNOWN.items():
            for value in values:
                counters[name].labels(model_id, value)

    def count(self, name: CounterName, amount: float = 1, *, label: str = "") -> None:
        """Adds to a counter; see `app.inference.stats.Observer`."""
        plain = self._plain.get(name)
        (self._counters[name].labels(self._model_id, label) if plain is None else plain).inc(amount)

    def observe(self, name: HistogramName, value: float) -> None:
        """Notes one value of a distribution; see `app.inference.stats.Observer`."""
        self._histograms[name].observe(value)


class _Served(Collector):
    def __init__(self, present: Callable[[], Iterable[Present]]) -> None:
        self._present = present

    def collect(self) -> Iterator[GaugeMetricFamily]:
        info = GaugeMetricFamily(
            f"{_PREFIX}model_info",
            "The models served, and what computes them",
            labels=["model", "fingerprint", "architecture", "dimensions", "backend"],
        )
        gauges: dict[str, GaugeMetricFamily] = {}
        for one in self._present():
            model = one.model
            told = [model.id, model.fingerprint, one.architecture, str(model.dimensions), model.backend]
            info.add_metric(told, 1)
            for name, value in one.gauges.items():
                family = gauges.setdefault(
                    name, GaugeMetricFamily(_PREFIX + name, _GAUGES.get(name, name), labels=["model"])
                )
                family.add_metric([model.id], value)
        yield info
        yield from gauges.values()


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
