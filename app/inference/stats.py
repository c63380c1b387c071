"""What the engine tells about itself: two calls, which telemetry turns into metrics.

Names are those of the Prometheus metrics without their prefix; labels are bounded. Calls come from any thread
and must be short: they run between a decoder's images and on the device thread.
"""

import threading
from collections import Counter, defaultdict
from typing import Literal, Protocol

CounterName = Literal[
    "images_total",  # label: outcome, embedded | failed | dropped; each image of an admitted request, once
    "image_errors_total",  # label: reason, an ImageFailure's code
    "rejected_total",  # label: reason, an Overloaded's reason; requests, not images
    "cancelled_total",  # requests whose caller left before the answer
    "deadline_exceeded_total",  # requests whose time ran out
    "cache_hits_total",  # label: kind, stored | in_flight
    "device_busy_seconds_total",  # time with a batch on the device
    "decode_cpu_seconds_total",  # of the decoders' threads; their wall time is in decode_seconds
    "padding_images_total",  # computed beside a batch's own, to fill a size that the device runs
]
HistogramName = Literal[
    "decode_seconds",  # hash, decode, resize and copy of one image
    "queue_wait_seconds",  # from pixels ready to launch, per image
    "forward_seconds",  # from launch to rows on the host, per batch
    "batch_size",  # images, padding not counted
]


class Observer(Protocol):
    """Hears what happens in the engine."""

    def count(self, name: CounterName, amount: float = 1, *, label: str = "") -> None:
        """Adds `amount` to a counter; `label` is the value of the counter's one label, or empty."""
        ...

    def observe(self, name: HistogramName, value: float) -> None:
        """Notes one value of a distribution, in the unit that the name ends in."""
        ...


class EngineStats:
    """Totals in memory: the observer where no metrics are wanted, and the one that tests read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.totals: Counter[tuple[str, str]] = Counter()
        self.values: defaultdict[str, tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    def count(self, name: CounterName, amount: float = 1, *, label: str = "") -> None:
        """Adds to `totals[name, label]`."""
        with self._lock:
            # A Counter holds any number; its type says int.
            self.totals[name, label] += amount  # type: ignore[assignment]

    def observe(self, name: HistogramName, value: float) -> None:
        """Adds to `values[name]`, which is (how many, their sum)."""
        with self._lock:
            number, total = self.values[name]
            self.values[name] = (number + 1, total + value)
