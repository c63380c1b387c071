"""All that was measured of a model, and models against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from training.evaluation.intervals import RESAMPLES, Difference, Estimate, difference
from training.evaluation.measures import NEIGHBOURS, TEMPERATURE
from training.evaluation.quantising import Form


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What was measured of one model.

    Attributes:
        name: For people.
        is_baseline: Whether it only stands beside those that the user named.
        fingerprint: A bundle's.
        dimensions: Length of an embedding.
        remarks: What a user must know.
        images: How many of the folder were measured.
        kind: Which images were classified by which; empty without a folder.
        measures: k-NN, linear probe, retrieval, copies.
        by_class: k-NN accuracy by class.
        spread: Spread and rank.
        by_attack: Copies found, by what was done to them.
        robustness: By change of the queries.
        forms: Smaller embeddings and their cost.
        skipped: Unreadable files, with the reason.
    """

    name: str
    is_baseline: bool
    fingerprint: str | None
    dimensions: int
    remarks: tuple[str, ...] = ()
    images: int = 0
    kind: str = ""
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    by_class: Mapping[str, Estimate] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    by_attack: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    robustness: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def estimates(self) -> dict[str, Estimate]:
        """All that can be compared between models, by dotted names."""
        found = dict(self.measures)
        for group, parts in (("copies", self.by_attack), ("robustness", self.robustness)):
            for part, measures in parts.items():
                found |= {f"{group}.{part}.{name}": one for name, one in measures.items()}
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "model": self.name,
            "baseline": self.is_baseline,
            "fingerprint": self.fingerprint,
            "dimensions": self.dimensions,
            "remarks": list(self.remarks),
            "images": self.images,
            "measured": self.kind,
            "measures": _plain(self.measures),
            "by_class": _plain(self.by_class),
            "spread": dict(self.spread),
            "copies_by_attack": {name: _plain(one) for name, one in self.by_attack.items()},
            "robustness": {name: _plain(one) for name, one in self.robustness.items()},
            "quantised": {
                name: {"bytes_per_vector": form.bytes_per_vector, "measures": _plain(form.measures)}
                for name, form in self.forms.items()
            },
            "skipped": dict(self.skipped),
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first model against another, on the same queries.

    Attributes:
        model: The first.
        than: The other.
        differences: By the dotted names of `ModelReport.estimates`.
    """

    model: str
    than: str
    differences: Mapping[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        differences = {name: one.to_json() for name, one in self.differences.items()}
        return {"model": self.model, "than": self.than, "differences": differences}


def compared(reports: Sequence[ModelReport]) -> list[Comparison]:
    """The first model against each of the others, where they answered the same queries."""
    first = reports[0]
    own = first.estimates()
    found = []
    for other in reports[1:]:
        if other.skipped.keys() != first.skipped.keys():  # other files were readable: no pairs
            continue
        found.append(
            Comparison(
                model=first.name,
                than=other.name,
                differences={
                    name: difference(own[name], one) for name, one in other.estimates().items() if name in own
                },
            )
        )
    return found


def as_json(
    reports: Sequence[ModelReport], comparisons: Sequence[Comparison], *, data: str | None, copies: str | None
) -> dict[str, Any]:
    """What `dino-train eval --json-file` writes."""
    return {
        "data": data,
        "copies": copies,
        "conditions": {
            "neighbours": list(NEIGHBOURS),
            "temperature": TEMPERATURE,
            "interval_percent": 95,
            "resamples": RESAMPLES,
            "versions": {name: version(name) for name in ("dinoserve", "torch", "timm", "pillow")},
        },
        "models": [report.to_json() for report in reports],
        "comparisons": [comparison.to_json() for comparison in comparisons],
    }


def _plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in estimates.items()}
