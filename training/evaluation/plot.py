"""What was measured, as one picture: bars with intervals, by model and by what was done to copies."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.evaluation.intervals import Estimate
from training.evaluation.report import ModelReport
from training.evaluation.tables import WORDS

_COLOURS = ("#0969da", "#8250df", "#bf8700", "#6e7781", "#1a7f37", "#cf222e", "#0f766e", "#57606a")
_SHOWN = ("top1_k20", "top1_k10", "linear", "p_at_1", "map", "copies_p_at_1", "copies_map", "copies_micro_ap")


def bars(reports: Sequence[ModelReport]) -> bytes:
    """A PNG: measures above; copies by attack, and queries by change, below, where they were measured."""
    measures = [name for name in _SHOWN if any(name in report.measures for report in reports)]
    if {"top1_k10", "top1_k20"} <= set(measures):
        measures.remove("top1_k10")
    panels: list[tuple[str, dict[str, list[Estimate | None]]]] = []
    if measures:
        rows = {WORDS[name]: [report.measures.get(name) for report in reports] for name in measures}
        panels.append(("What the embeddings are worth, in %", rows))
    panels += _panel("Copies: original first, in %", [report.by_attack for report in reports], "p_at_1")
    panels += _panel(
        "Changed queries: same neighbours, in %", [report.robustness for report in reports], "neighbours"
    )
    heights = [0.5 + 0.16 * len(rows) * (len(reports) + 1) for _, rows in panels]
    figure = Figure(figsize=(9, sum(heights) + 0.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axes, (title, rows) in zip(grid[:, 0], panels, strict=True):
        _draw(axes, title, rows, [report.name for report in reports])
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _panel(
    title: str, parts: Sequence[Mapping[str, Mapping[str, Estimate]]], measure: str
) -> list[tuple[str, dict[str, list[Estimate | None]]]]:
    names = dict.fromkeys(name for one in parts for name in one if measure in one[name])
    rows = {name: [one.get(name, {}).get(measure) for one in parts] for name in names}
    return [(title, rows)] if rows else []


def _draw(
    axes: Axes, title: str, rows: Mapping[str, Sequence[Estimate | None]], models: Sequence[str]
) -> None:
    thickness = 0.8 / len(models)
    for place, model in enumerate(models):
        heights, values, errors = [], [], []
        for row, estimates in enumerate(rows.values()):
            found = estimates[place]
            if found is not None:
                heights.append(row + (place - (len(models) - 1) / 2) * thickness)
                values.append(found.value)
                errors.append((found.value - found.low, found.high - found.value))
        axes.barh(
            heights,
            values,
            height=0.9 * thickness,
            xerr=np.array(errors).clip(min=0).T if errors else None,
            color=_COLOURS[place % len(_COLOURS)],
            error_kw={"elinewidth": 1, "ecolor": "#24292f"},
            label=model,
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlim(0, 100)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
