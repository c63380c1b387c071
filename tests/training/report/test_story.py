"""The verdict: healthy only where a run is known to have helped; sick where the guard spoke; else doubt."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dino_core.errors import CollapseError
from tests.training.conftest import MakeConfig, MakeFolder
from training.config import RunConfig
from training.loop import run
from training.report.story import WHERE_TO_LOOK, difference_interval, read_story
from training.report.writing import page_of
from training.rundir import RunPlan

QUIET = Console(quiet=True)


@pytest.fixture
def finished(make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path) -> Path:
    """A real run of six steps, which cannot have learnt anything."""
    return trained(sharp(make_config), make_folder(per_class=12), tmp_path)


def sharp(make_config: MakeConfig) -> RunConfig:
    """With a teacher that tells images apart from the start, and goes on doing so."""
    return make_config(
        loss={"teacher_temperature": 0.01, "teacher_temperature_start": 0.01}, optimizer={"peak_lr": 1e-5}
    )


def trained(config: RunConfig, data: Path, tmp_path: Path) -> Path:
    plan = RunPlan(data=data, val_data=None, out=tmp_path / "models/tiny", config=config)
    run(plan, tmp_path / "run", resume=False, console=QUIET)
    return tmp_path / "run"


def measured(run_dir: Path, *, before: float, after: float, queries: int) -> None:
    """Gives a real run's log the accuracies of another."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "evaluation":
            line |= {"knn_percent": after if line["step"] else before, "knn_queries": queries}
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_run_that_got_better_by_more_than_its_interval_is_healthy(finished: Path) -> None:
    measured(finished, before=34.9, after=49.6, queries=1000)  # Imagenette, an hour on two cores
    verdict = read_story(finished).verdict
    assert verdict.state == "healthy"
    assert any(
        "+14.7 points (+10.4 to +18.9 with 1,000 queries): the training has helped" in one
        for one in verdict.sentences
    )
    assert WHERE_TO_LOOK not in verdict.sentences


@pytest.mark.parametrize(
    ("before", "after", "queries", "words"),
    [
        pytest.param(34.9, 49.6, 40, "nothing shows that the training has helped", id="too few queries"),
        pytest.param(
            34.9, 35.9, 1000, "nothing shows that the training has helped", id="within the interval"
        ),
        pytest.param(49.6, 34.9, 1000, "the training has done harm", id="worse"),
    ],
)
def test_a_run_that_got_no_better_is_doubtful(
    finished: Path, before: float, after: float, queries: int, words: str
) -> None:
    measured(finished, before=before, after=after, queries=queries)
    verdict = read_story(finished).verdict
    assert verdict.state == "doubtful"
    assert any(words in sentence for sentence in verdict.sentences)
    assert verdict.sentences[-1] == WHERE_TO_LOOK


def test_six_steps_prove_nothing(finished: Path) -> None:
    story = read_story(finished)
    assert story.verdict.state == "doubtful"
    assert '<div class="verdict doubtful"><b>doubtful</b>' in page_of(story)


def test_a_run_without_classes_is_doubtful(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    verdict = read_story(trained(sharp(make_config), make_folder(flat=True), tmp_path)).verdict
    assert verdict.state == "doubtful"
    assert any("no classes to measure accuracy with" in sentence for sentence in verdict.sentences)


@pytest.mark.parametrize("stop", [True, False])
def test_a_run_of_which_the_guard_spoke_is_sick(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, stop: bool
) -> None:
    data = make_folder()
    for path in data.rglob("*.png"):
        path.write_bytes((data / "across/across-0.png").read_bytes())
    off = {"jitter_probability": 0, "grey_probability": 0, "blur_probability": [0, 0, 0]}
    changes: dict[str, Any] = {
        "crops": off | {"solarise_probability": [0, 0, 0], "global_area": [1, 1]},
        "guard": {"patience_steps": 2, "stop": stop},
    }
    try:
        trained(make_config(**changes), data, tmp_path)
    except CollapseError:
        assert stop
    measured(tmp_path / "run", before=34.9, after=49.6, queries=1000)  # whatever k-NN says
    verdict = read_story(tmp_path / "run").verdict
    assert verdict.state == "sick"
    assert any(sentence.startswith("The guard said: the teacher ") for sentence in verdict.sentences)


def test_an_end_that_shows_collapse_is_sick_without_a_guard(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step":
            line |= {"teacher_entropy_nats": math.log(32), "prototype_usage": 1.0}
    (finished / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert read_story(finished).verdict.state == "sick"


def test_a_run_that_goes_on_is_unfinished(finished: Path) -> None:
    (finished / "result.json").unlink()
    assert read_story(finished).verdict.state == "unfinished"


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # By hand, from Wilson's intervals of 42 and 56 of 70: 0.4830 to 0.7066, and 0.6920 to 0.8767.
    low, high = difference_interval(0.6, 0.8, 70)
    assert low == pytest.approx(0.2 - math.hypot(0.8 - 0.6920, 0.7066 - 0.6), abs=2e-4)
    assert high == pytest.approx(0.2 + math.hypot(0.8767 - 0.8, 0.6 - 0.4830), abs=2e-4)
    assert difference_interval(0.3, 0.3, 100)[0] < 0 < difference_interval(0.3, 0.3, 100)[1]
