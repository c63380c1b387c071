"""What a benchmark found: plain data, as a table, and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from app.bench.load import OK, Measured

_PERCENTILES: Final = (50, 90, 99)
# Above this share of what the generator can do, the generator may be what was measured.
_GENERATOR_SHARE: Final = 0.5
_LATE_MS: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Images a second of each part by itself, on the same machine; see `app.bench.ceilings`.

    Attributes:
        device: Where the model ran.
        backend: What computed it.
        forward_by_batch: Batch size -> images/s of the model alone, on pixels that lie ready.
        decode_images_per_s_core: One thread that decodes, resizes and crops.
        bare_loop_images_per_s: One thread that decodes a batch, and then waits for its forward.
        bare_loop_batch: The batch size of that loop: the one at which the model alone was fastest.
        cores: That a process may keep busy here.
    """

    device: str
    backend: str
    forward_by_batch: dict[int, float]
    decode_images_per_s_core: float
    bare_loop_images_per_s: float
    bare_loop_batch: int
    cores: int

    @property
    def forward_images_per_s(self) -> float:
        """Of the best batch size."""
        return max(self.forward_by_batch.values())


@dataclass(frozen=True, kw_only=True)
class ServerFigures:
    """What the service says of itself at one moment, in seconds since it started; None where it doesn't say.

    Attributes:
        cpu_s: Of all its threads.
        decode_s: CPU time of its decoders.
        device_busy_s: With a batch on the device.
        images: Embedded.
        batches: Launched.
    """

    cpu_s: float | None
    decode_s: float | None
    device_busy_s: float | None
    images: float | None
    batches: float | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One load, and what the service spent on all of it, warm-up included.

    Attributes:
        load: In words: "32 clients", "200/s".
        offered_per_s: Requests a second that were sent; None in a closed loop.
        measured: By the generator.
        elapsed_s: Between the two figures of the service.
        before: The service's figures.
        after: Likewise.
    """

    load: str
    offered_per_s: float | None
    measured: Measured
    elapsed_s: float
    before: ServerFigures
    after: ServerFigures

    def spent(self, name: str) -> float | None:
        """How much one of the service's figures grew."""
        before, after = getattr(self.before, name), getattr(self.after, name)
        # A series with labels may not be there before its first event.
        return None if after is None else float(after - (before or 0.0))

    @property
    def cores_used(self) -> float | None:
        """CPU seconds of the service in each second."""
        return _over(self.spent("cpu_s"), self.elapsed_s)

    @property
    def decode_cores_used(self) -> float | None:
        """CPU seconds of its decoders in each second."""
        return _over(self.spent("decode_s"), self.elapsed_s)

    @property
    def device_busy_share(self) -> float | None:
        """Of the time, with a batch on the device."""
        return _over(self.spent("device_busy_s"), self.elapsed_s)

    @property
    def cpu_ms_per_image(self) -> float | None:
        """CPU time of the service for each image that it embedded."""
        seconds = _over(self.spent("cpu_s"), self.spent("images"))
        return None if seconds is None else seconds * 1_000

    @property
    def images_per_batch(self) -> float | None:
        """On average."""
        return _over(self.spent("images"), self.spent("batches"))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """A whole benchmark.

    Attributes:
        setting: Machine, versions, model, pictures, and how it was loaded.
        runs: In order.
        generator_per_s: Requests a second that the generator reaches against a server that does nothing.
        ceilings: Of the machine; None where the service is another's.
        p99_ms: The bound of a sweep, or None.
        held: The highest rate of a sweep at which the bound held; None where none did, or there was no sweep.
    """

    setting: dict[str, Any]
    runs: Sequence[Run]
    generator_per_s: float
    ceilings: Ceilings | None
    p99_ms: float | None = None
    held: Run | None = None

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "setting": self.setting,
            "generator_requests_per_s": round(self.generator_per_s),
            "ceilings": None if self.ceilings is None else asdict(self.ceilings),
            "p99_bound_ms": self.p99_ms,
            "held_requests_per_s": None if self.held is None else self.held.offered_per_s,
            "runs": [self._run_json(run) for run in self.runs],
        }

    def _run_json(self, run: Run) -> dict[str, Any]:
        measured = run.measured
        figures = {
            "requests_per_s": measured.requests_per_s,
            "images_per_s": measured.images_per_s,
            **{f"p{percentile}_ms": measured.latency_ms(percentile) for percentile in (*_PERCENTILES, 99.9)},
            "error_share": measured.error_share,
            "generator_late_p99_ms": measured.lateness_ms(99),
            "share_of_forward": self.share_of_forward(run),
            "share_of_bare_loop": self.share_of_bare_loop(run),
            "server_cores": run.cores_used,
            "server_decode_cores": run.decode_cores_used,
            "server_cpu_ms_per_image": run.cpu_ms_per_image,
            "device_busy_share": run.device_busy_share,
            "images_per_batch": run.images_per_batch,
        }
        return {
            "load": run.load,
            "offered_requests_per_s": run.offered_per_s,
            "requests": measured.outcomes.total(),
            "outcomes": dict(measured.outcomes),
            **{name: _finite(value) for name, value in figures.items()},
        }

    def share_of_forward(self, run: Run) -> float | None:
        """Images/s as a share of the model's alone."""
        if self.ceilings is None:
            return None
        return run.measured.images_per_s / self.ceilings.forward_images_per_s

    def share_of_bare_loop(self, run: Run) -> float | None:
        """Images/s as a share of a bare loop's, which decodes as well."""
        if self.ceilings is None:
            return None
        return run.measured.images_per_s / self.ceilings.bare_loop_images_per_s

    def table(self) -> str:
        """In Markdown, with a heading and what a reader must know beside it."""
        names = ["load", "requests/s", "images/s", *(f"p{p} ms" for p in _PERCENTILES), "errors"]
        names += ["of forward", "of bare loop"] if self.ceilings else []
        names += ["server cores", "to decode", "CPU ms/image", "device busy", "images/batch"]
        rows = [names, *(self._row(run) for run in self.runs)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.insert(1, " | ".join("-" * width for width in widths))
        return "\n".join([*self._above(), *(f"| {line} |" for line in lines), *self._below()])

    def _row(self, run: Run) -> list[str]:
        measured = run.measured
        cells = [run.load, f"{measured.requests_per_s:.1f}", f"{measured.images_per_s:.1f}"]
        cells += [_text(measured.latency_ms(percentile), ".1f") for percentile in _PERCENTILES]
        cells.append(_errors(measured))
        if self.ceilings:
            cells += [_text(share(run), ".0%") for share in (self.share_of_forward, self.share_of_bare_loop)]
        return [
            *cells,
            _text(run.cores_used, ".2f"),
            _text(run.decode_cores_used, ".2f"),
            _text(run.cpu_ms_per_image, ".1f"),
            _text(run.device_busy_share, ".0%"),
            _text(run.images_per_batch, ".1f"),
        ]

    def _above(self) -> list[str]:
        lines = ["; ".join(f"{name} {value}" for name, value in self.setting.items())]
        if self.ceilings is not None:
            ceilings = self.ceilings
            lines.append(
                f"ceilings of this machine on {ceilings.device} with {ceilings.backend}, in images/s: "
                f"the model alone {ceilings.forward_images_per_s:.1f} (batch {ceilings.bare_loop_batch}), "
                f"one decoder alone {ceilings.decode_images_per_s_core:.1f}, a bare loop of both "
                f"{ceilings.bare_loop_images_per_s:.1f}"
            )
        return [*lines, ""]

    def _below(self) -> list[str]:
        lines = [""]
        if self.p99_ms is not None:
            lines.append(
                f"no rate that was tried kept p99 below {self.p99_ms:g} ms"
                if self.held is None
                else f"p99 stays below {self.p99_ms:g} ms up to {self.held.load}"
            )
        lines.append(
            f"the generator by itself reaches {self.generator_per_s:,.0f} requests/s of this kind here"
        )
        busiest = max((run.measured.requests_per_s for run in self.runs), default=0.0)
        if busiest > _GENERATOR_SHARE * self.generator_per_s:
            lines.append(
                "WARNING: that is less than twice what was measured, which may be the generator's own limit"
            )
        late_ms = max((run.measured.lateness_ms(99) for run in self.runs if run.offered_per_s), default=0.0)
        if late_ms > _LATE_MS:
            lines.append(
                f"WARNING: the generator sent requests up to {late_ms:.1f} ms late (p99), which is in the "
                "latencies: something else uses its core"
            )
        return lines


def _errors(measured: Measured) -> str:
    kinds = [f"{count} x {kind}" for kind, count in sorted(measured.outcomes.items()) if kind != OK]
    return ", ".join(kinds) or "none"


def _over(amount: float | None, divisor: float | None) -> float | None:
    return None if amount is None or not divisor else amount / divisor


def _finite(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or math.isnan(value) else round(value, 4)


def _text(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)
