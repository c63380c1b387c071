"""Models against each other, and the same numbers as JSON, table, card and picture."""

import io
import json
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from training.evaluation.intervals import Estimate, Resampling
from training.evaluation.plot import bars
from training.evaluation.quantising import Form
from training.evaluation.report import ModelReport, as_json, compared
from training.evaluation.tables import as_markdown, as_rich, sections


def share(percent: int, *, hard_first: bool = True) -> Estimate:
    """So many of a hundred are right; the same are right in all, unless others are."""
    values = (torch.arange(100) < percent).double()
    values = values if hard_first else values.flip(0)
    return Resampling(torch.arange(100)).estimates({"x": values}, shares=True)["x"]


def report(name: str, percent: int, **changes: Any) -> ModelReport:  # noqa: ANN401  any field
    parts: dict[str, Any] = {
        "is_baseline": False,
        "fingerprint": None,
        "dimensions": 8,
        "images": 100,
        "kind": "100 images of val/ by 200 of train/",
        "measures": {"top1_k20": share(percent), "copies_p_at_1": share(percent)},
        "by_class": {"gnome": share(percent), "zebra": share(percent - 10)},
        "spread": {"rank_me": 5.0},
        "by_attack": {"crop": {"p_at_1": share(percent)}},
        "robustness": {"jpeg 10": {"neighbours": share(percent)}},
        "forms": {"int8": Form(bytes_per_vector=8, measures={"recall_at_10": share(99)})},
    }
    return ModelReport(name=name, **(parts | changes))


def test_the_first_model_is_compared_with_each_other_on_the_same_queries() -> None:
    reports = [
        report("mine", 60),
        report("yours", 50),
        report("like mine", 60, measures={"top1_k20": share(58, hard_first=False)}),
    ]
    first, second = compared(reports)
    assert (first.model, first.than) == ("mine", "yours")
    found = first.differences["top1_k20"]
    assert (found.value, found.verdict) == (10, "better")
    assert set(first.differences) == {
        "top1_k20",
        "copies_p_at_1",
        "copies.crop.p_at_1",
        "robustness.jpeg 10.neighbours",
    }
    assert second.differences["top1_k20"].verdict == "no difference seen"
    (reverse,) = compared([reports[1], reports[0]])
    assert reverse.differences["top1_k20"].verdict == "worse"


def test_a_model_that_could_read_other_files_is_not_compared() -> None:
    assert compared([report("mine", 60), report("yours", 50, skipped={"a.jpg": "damaged"})]) == []


def test_json_holds_every_number_and_plain_values() -> None:
    reports = [report("mine", 60), report("raw pixels", 20, is_baseline=True)]
    written = json.loads(json.dumps(as_json(reports, compared(reports), data="photos", copies=None)))
    mine = written["models"][0]
    assert mine["measures"]["top1_k20"]["value"] == 60
    assert set(mine["measures"]["top1_k20"]) == {"value", "low", "high", "queries", "sources"}
    assert mine["by_class"]["zebra"]["value"] == 50
    assert mine["quantised"]["int8"]["bytes_per_vector"] == 8
    assert written["conditions"]["neighbours"] == [10, 20, 100, 200]
    assert written["comparisons"][0]["differences"]["top1_k20"]["verdict"] == "better"


def test_the_card_has_the_numbers_of_the_terminal() -> None:
    reports = [report("mine", 60), report("raw pixels", 20, is_baseline=True)]
    tables = sections(reports, compared(reports))
    card = as_markdown(tables)
    assert "| k-NN, k = 20 | 60.0 [50.2–69.1] | 20.0 [13.3–28.9] |" in card
    assert "| crop | 60.0 [50.2–69.1] |" in card
    assert "▲ +40.0" in card
    assert card.count("smaller embeddings") == 1, "not of what only stands beside"
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(as_rich(tables, width=200))
    printed = console.export_text()
    for words in ("60.0 [50.2–69.1]", "▲ +40.0", "zebra", "int8", "jpeg 10"):
        assert words in printed
    lines = [line for line in card.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)


def test_a_narrow_terminal_gets_intervals_below_their_numbers() -> None:
    tables = sections([report("mine", 60), report("yours", 20), report("theirs", 30)], [])[:1]
    console = Console(width=60, file=io.StringIO(), record=True)
    console.print(as_rich(tables, width=60))
    printed = console.export_text()
    assert "60.0 [" not in printed
    assert "[50.2–69.1]" in printed
    assert "…" not in printed


@pytest.mark.parametrize("parts", [{}, {"by_attack": {}, "robustness": {}}, {"measures": {}}])
def test_bars_are_drawn_of_whatever_there_is(parts: dict[str, Any]) -> None:
    reports = [report("mine", 60, **parts), report("raw pixels", 20, is_baseline=True, **parts)]
    with Image.open(io.BytesIO(bars(reports))) as picture:
        assert picture.format == "PNG"
        assert picture.width == 990


def test_nothing_measured_gives_no_table() -> None:
    bare: dict[str, Any] = {"measures": {}, "by_class": {}, "by_attack": {}, "robustness": {}, "forms": {}}
    assert [section.title for section in sections([report("mine", 60, **bare)], [])] == [
        "What the embeddings are worth"
    ]
