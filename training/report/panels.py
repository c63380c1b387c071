"""Which curves a report has: each is drawn if the log has its numbers, and only then."""

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from training.report.charts import Line, Mark, line_chart
from training.report.story import Story


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A diagram: a title, and name in the legend -> key in the log."""

    title: str
    series: Mapping[str, str]
    shows_uniform: bool = False
    """Whether ln K, the entropy of a uniform answer, is drawn too."""


CURVES = (
    Curve(
        title="Loss and its two parts, nats",
        series={"loss": "loss_nats", "teacher entropy": "teacher_entropy_nats", "KL": "kl_nats"},
        shows_uniform=True,
    ),
    Curve(title="k-NN accuracy, %", series={"": "knn_percent"}),
    Curve(title="RankMe, effective dimensions", series={"": "rank_me"}),
    Curve(title="Feature spread", series={"": "feature_std"}),
    Curve(title="Share of the prototypes in use", series={"": "prototype_usage"}),
    Curve(title="Distance of teacher and student", series={"": "teacher_student_distance"}),
    Curve(title="Gradient norm, before clipping", series={"": "gradient_norm"}),
    Curve(
        title="Gradient norm by part, before clipping",
        series={
            "stem": "gradient_norm_stem",
            "blocks": "gradient_norm_blocks",
            "head": "gradient_norm_head",
            "last layer": "gradient_norm_last_layer",
        },
    ),
    Curve(title="Learning rate", series={"": "learning_rate"}),
    Curve(title="Weight decay", series={"": "weight_decay"}),
    Curve(title="Teacher's momentum", series={"": "teacher_momentum"}),
    Curve(title="Teacher's temperature", series={"": "teacher_temperature"}),
    Curve(title="Images per second", series={"": "images_per_s"}),
    Curve(title="Share of time waiting for data", series={"": "data_wait_share"}),
)


def curves_of(story: Story) -> str:
    """All diagrams that there are numbers for, and the list of events that their letters stand for."""
    rows = [*story.steps, *story.evaluations]
    marks = marks_of(story)
    figures = [_chart(curve, rows, marks, story) for curve in CURVES]
    if not any(figures):
        return "<p>The log has no numbers yet.</p>"
    listed = "".join(
        f"<li><b>{escape(mark.letter)}</b> step {int(mark.step):,}: {escape(mark.words)}</li>"
        for mark in marks
    )
    return f'<ul class="events">{listed}</ul><div class="charts">{"".join(figures)}</div>'


def marks_of(story: Story) -> list[Mark]:
    """Events with letters, in the order of steps; after z come numbers."""
    letters = [*string.ascii_uppercase, *string.ascii_lowercase]
    return [
        Mark(
            step=event.step,
            letter=letters[place] if place < len(letters) else str(place),
            words=f"{event.name}: {event.words}" if event.words else event.name,
        )
        for place, event in enumerate(story.events)
    ]


def points_of(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and values of a key where it has a finite number."""
    return [
        (float(row["step"]), float(row[key]))
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key])
    ]


def _chart(curve: Curve, rows: Sequence[Mapping[str, Any]], marks: Sequence[Mark], story: Story) -> str:
    lines = [
        Line(name=name, points=points)
        for name, key in curve.series.items()
        if (points := points_of(rows, key))
    ]
    if not lines:
        return ""
    if curve.shows_uniform and story.num_prototypes > 1:
        height = math.log(story.num_prototypes)
        ends = [(0.0, height), (float(story.last_step), height)]
        lines.append(Line(name=f"ln K = {height:.2f}", points=ends, dashed=True))
    return line_chart(curve.title, lines, marks=marks, end=story.last_step)
