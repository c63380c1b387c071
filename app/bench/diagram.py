"""Diagrams of a benchmark as SVG text: latencies over the rate, or over the share of requests. No library.

The page it makes stands alone, in light and dark. Every word from outside is escaped.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from app.bench.findings import Findings

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 90, 56, 52
_COLOURS: Final = ("#0969da", "#bf8700", "#cf222e", "#1a7f37")
_STYLE: Final = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}"
    ".grid{stroke:#d0d7de;stroke-width:1;fill:none}.bound{stroke:#57606a;stroke-dasharray:6 4;fill:none}"
    ".line{fill:none;stroke-width:2}rect{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.grid{stroke:#30363d}rect{fill:#0d1117}}"
)
# Latencies of most requests lie close together and of the last far away: places by the number of nines.
_SHARES: Final = (0.0, 50.0, 90.0, 99.0, 99.9)


@dataclass(frozen=True)
class _Curve:
    name: str
    points: Sequence[tuple[float, float]]


def diagram(findings: Findings) -> str:
    """Latencies over the offered rate where there were several, else over the share of requests; as SVG."""
    rates = [run for run in findings.runs if run.offered_per_s]
    model = findings.setting.get("model", "")
    if len(rates) > 1:
        curves = [
            _Curve(
                f"p{percentile}",
                [(run.offered_per_s or 0.0, run.measured.latency_ms(percentile)) for run in rates],
            )
            for percentile in (50, 90, 99)
        ]
        return _page(
            f"Latency of {model} by requests a second, at a constant rate of arrival",
            "requests/s offered",
            curves,
            x_ticks=[(x, f"{x:g}") for x in _linear_ticks(max(run.offered_per_s or 0.0 for run in rates))],
            bound_ms=findings.p99_ms,
        )
    curves = [
        _Curve(run.load, [(_nines(share), run.measured.latency_ms(share)) for share in _share_points()])
        for run in findings.runs
    ]
    return _page(
        f"Latency of {model} by share of requests",
        "of requests are at most as slow, %",
        curves,
        x_ticks=[(_nines(share), f"{share:g}") for share in _SHARES],
        bound_ms=None,
    )


def _page(
    title: str,
    x_name: str,
    curves: Sequence[_Curve],
    *,
    x_ticks: Sequence[tuple[float, str]],
    bound_ms: float | None,
) -> str:
    curves = [
        _Curve(curve.name, [point for point in curve.points if point[1] > 0 and not math.isnan(point[1])])
        for curve in curves
    ]
    values = [y for curve in curves for _, y in curve.points] + ([bound_ms] if bound_ms else [])
    y_ticks = _log_ticks(min(values, default=1.0), max(values, default=10.0))
    x_of, y_of = _places(x_ticks[-1][0], y_ticks[0], y_ticks[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title, quote=True)}"><style>{_STYLE}</style>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}"/>',
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="44">milliseconds</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 10}" text-anchor="end">{escape(x_name)}</text>',
    ]
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y_of(y):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x, words in x_ticks:
        place = f'x="{x_of(x):.1f}" y="{_HEIGHT - _BOTTOM + 20}"'
        parts.append(f'<text {place} text-anchor="middle">{escape(words)}</text>')
    if bound_ms:
        parts.append(f'<path class="bound" d="M{_LEFT} {y_of(bound_ms):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 6}" y="{y_of(bound_ms) + 4:.1f}">bound</text>')
    for curve, colour in zip(curves, _COLOURS, strict=False):
        parts += _drawn(curve, colour, x_of, y_of)
    return "".join(parts) + "</svg>\n"


def _drawn(
    curve: _Curve, colour: str, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> list[str]:
    if not curve.points:
        return []
    path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in curve.points)
    x, y = curve.points[-1]
    return [
        f'<path class="line" stroke="{colour}" d="M{path}"/>',
        *(f'<circle cx="{x_of(a):.1f}" cy="{y_of(b):.1f}" r="3" fill="{colour}"/>' for a, b in curve.points),
        f'<text x="{x_of(x) + 7:.1f}" y="{y_of(y) - 6:.1f}" style="fill:{colour}">',
        f"{escape(curve.name)}</text>",
    ]


def _places(
    x_end: float, y_low: float, y_high: float
) -> tuple[Callable[[float], float], Callable[[float], float]]:
    low, span = math.log10(y_low), math.log10(y_high) - math.log10(y_low)

    def x_of(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * x / x_end

    def y_of(y: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (math.log10(y) - low) / span

    return x_of, y_of


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … around the values; at least two."""
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    first = max(index for index, tick in enumerate(ticks) if tick <= low)
    last = min(index for index, tick in enumerate(ticks) if tick >= high)
    return ticks[first : max(last, first + 1) + 1]


def _linear_ticks(end: float) -> list[float]:
    """Round numbers from 0 to at least the end."""
    raw = end / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    return [number * step for number in range(math.ceil(end / step) + 1)]


def _nines(share: float) -> float:
    return -math.log10(1 - share / 100)


def _share_points() -> list[float]:
    return [100 * (1 - 10 ** (-nines / 8)) for nines in range(25)]
