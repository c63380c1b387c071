"""Diagrams as SVG text: lines over steps with events, bars, and a map of points; no library, no script.

Letters are 12 units on a page 380 wide, so that they have their size on a phone. Every word from outside is
escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 16, 24
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#1b7c83", "#bf3989", "#57606a")
_MOST_BUCKETS = 180

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a diagram."""

    name: str
    points: Points
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """An upright line at a step, with the letter by which a table explains it."""

    step: float
    letter: str
    words: str


def line_chart(title: str, lines: Sequence[Line], *, marks: Sequence[Mark] = (), end: float) -> str:
    """Lines over steps from 0 to `end`, as one <figure>; names stand above, where they hide nothing."""
    values = [value for line in lines for _, value in line.points]
    low, high = _bounds(values)
    end = max(end, 1.0)

    def x_of(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / end

    def y_of(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">']
    for tick in _ticks(low, high):
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for step, anchor in ((0.0, "start"), (end / 2, "middle"), (end, "end")):
        parts.append(
            f'<text class="tick" x="{x_of(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">'
            f"{_short(step)}</text>"
        )
    for mark in marks:
        x = x_of(mark.step)
        parts.append(
            f'<g class="mark"><title>{escape(mark.words)}</title>'
            f'<path d="M{x:.1f} {_TOP}V{HEIGHT - _BOTTOM}"/>'
            f'<text x="{x:.1f}" y="12" text-anchor="middle">{escape(mark.letter)}</text></g>'
        )
    for line, colour in zip(lines, COLOURS * 3, strict=False):
        parts.append(_drawn(line, colour, [(x_of(x), y_of(y)) for x, y in _bucketed(line.points)]))
    parts.append("</svg>")
    return _figure(
        title, "".join(parts), _legend([(line.name, c) for line, c in zip(lines, COLOURS * 3, strict=False)])
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """Horizontal bars for shares from 0 to 1: name, share and what stands behind it."""
    row_px, name_px = 22, 130
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {row_px * len(bars) + 4}" role="img" '
        f'aria-label="{escape(title, quote=True)}">'
    ]
    for place, (name, share, words) in enumerate(bars):
        y, length = place * row_px + 4, (WIDTH - name_px - 90) * min(max(share, 0.0), 1.0)
        shown = name if len(name) <= 18 else f"{name[:17]}…"
        parts.append(
            f'<text class="name" x="{name_px - 8}" y="{y + 13}" text-anchor="end">{escape(shown)}'
            f"<title>{escape(name)}</title></text>"
            f'<rect x="{name_px}" y="{y + 2}" width="{max(length, 1):.1f}" height="14" rx="2" '
            f'fill="{COLOURS[0]}"/>'
            f'<text class="tick" x="{name_px + length + 6:.1f}" y="{y + 13}">{escape(words)}</text>'
        )
    return _figure(title, "".join([*parts, "</svg>"]), "")


def point_map(title: str, points: Points, labels: Sequence[int], names: Sequence[str]) -> str:
    """Points in a square, coloured by class; the commonest have colours of their own, others are grey."""
    side, margin = WIDTH, 8
    xs, ys = [x for x, _ in points] or [0.0], [y for _, y in points] or [0.0]
    width, height = max(max(xs) - min(xs), 1e-9), max(max(ys) - min(ys), 1e-9)
    counts = {label: labels.count(label) if isinstance(labels, list) else 0 for label in set(labels)}
    coloured = sorted(counts, key=lambda label: (-counts[label], label))[: len(COLOURS) - 1]
    colour_of = {label: COLOURS[place] for place, label in enumerate(sorted(coloured))}
    parts = [f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{escape(title, quote=True)}">']
    for place, (x, y) in enumerate(points):
        colour = colour_of.get(labels[place], COLOURS[-1]) if labels else COLOURS[0]
        left = margin + (side - 2 * margin) * (x - min(xs)) / width
        top = side - margin - (side - 2 * margin) * (y - min(ys)) / height
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}" fill-opacity=".6"/>')
    legend = [(names[label], colour_of[label]) for label in sorted(coloured) if label < len(names)]
    if len(counts) > len(coloured):
        legend.append(("others", COLOURS[-1]))
    return _figure(title, "".join([*parts, "</svg>"]), _legend(legend))


def _drawn(line: Line, colour: str, places: list[tuple[float, float]]) -> str:
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    return f'<path class="line" d="M{path}" stroke="{colour}"{dash}/>' if places else ""


def _bucketed(points: Points) -> list[tuple[float, float]]:
    """At most two points for each bucket of steps, its least and its greatest, so that no spike is lost."""
    if len(points) <= 2 * _MOST_BUCKETS:
        return list(points)
    size = math.ceil(len(points) / _MOST_BUCKETS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest with a little air; never the same."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low < 1e-12:
        air = abs(high) * 0.1 or 1.0
        return low - air, high + air
    air = 0.06 * (high - low)
    return (0.0 if 0 <= low < 0.4 * high else low - air), high + air


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [place * step for place in range(first, math.floor(high / step) + 1)]


def _short(number: float) -> str:
    """A number in at most six letters."""
    if number == 0:
        return "0"
    if abs(number) >= 1e6:
        return f"{number / 1e6:.3g}M"
    if abs(number) >= 1e4:
        return f"{number / 1e3:.3g}k"
    return f"{number:.4g}" if abs(number) >= 1e-3 else f"{number:.0e}".replace("e-0", "e-")


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries if name
    )
    return f'<div class="legend">{items}</div>' if items else ""


def _figure(title: str, drawing: str, legend: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{legend}{drawing}</figure>"
