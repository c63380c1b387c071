"""The run's folder: one process at a time, one run, and what a user must do is in the sentence."""

from pathlib import Path

import pytest

from tests.training.conftest import MakeConfig
from training.data.addresses import name_of
from training.distributed import World
from training.errors import RunDirectoryError
from training.rundir import (
    RunPlan,
    own_run_directory,
    read_plan,
)

ALONE = World()


@pytest.fixture
def plan(make_config: MakeConfig) -> RunPlan:
    return RunPlan(data=Path("pictures"), val_data=None, out=Path("models/one"), config=make_config())


def test_the_plan_is_saved_and_read_back(plan: RunPlan, tmp_path: Path) -> None:
    with own_run_directory(tmp_path / "run", plan, resume=False, world=ALONE):
        pass
    assert read_plan(tmp_path / "run") == plan


def test_a_second_process_is_refused_until_the_first_is_done(plan: RunPlan, tmp_path: Path) -> None:
    with (
        own_run_directory(tmp_path, plan, resume=False, world=ALONE),
        pytest.raises(RunDirectoryError, match="already going on"),
        own_run_directory(tmp_path, plan, resume=True, world=ALONE),
    ):
        pass
    with own_run_directory(tmp_path, plan, resume=True, world=ALONE):
        pass


def test_a_stopped_run_is_not_started_over(plan: RunPlan, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    with (
        pytest.raises(RunDirectoryError, match=r"stopped after step 12: go on with --resume"),
        own_run_directory(tmp_path, plan, resume=False, world=ALONE),
    ):
        pass


def test_a_finished_run_says_so(plan: RunPlan, tmp_path: Path) -> None:
    with own_run_directory(tmp_path, plan, resume=False, world=ALONE) as directory:
        directory.write("result.json", {"bundle": "models/one"})
    with (
        pytest.raises(RunDirectoryError, match="finished run, whose teacher is models/one"),
        own_run_directory(tmp_path, plan, resume=False, world=ALONE),
    ):
        pass


def test_a_folder_with_other_things_is_left_alone(plan: RunPlan, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with (
        pytest.raises(RunDirectoryError, match=r"not empty \(it holds holiday.jpg\)"),
        own_run_directory(tmp_path, plan, resume=False, world=ALONE),
    ):
        pass


def test_a_run_that_died_before_its_first_checkpoint_can_start_again(plan: RunPlan, tmp_path: Path) -> None:
    for _ in range(2):
        with own_run_directory(tmp_path, plan, resume=False, world=ALONE) as directory:
            directory.metrics.touch()
            directory.checkpoints.mkdir(exist_ok=True)


def test_a_place_that_is_no_folder_is_refused(plan: RunPlan, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunDirectoryError, match="cannot be used as run directory"),
        own_run_directory(tmp_path / "file", plan, resume=False, world=ALONE),
    ):
        pass


def test_other_processes_of_the_run_write_nothing(plan: RunPlan, tmp_path: Path) -> None:
    with own_run_directory(tmp_path / "run", plan, resume=False, world=World(rank=1, size=2)):
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        pytest.param(None, "no run to resume", id="no file"),
        pytest.param("{", "cannot be read", id="cut off"),
        pytest.param('{"data": "x"}', "cannot be read", id="keys missing"),
        pytest.param(
            '{"data": "x", "val_data": null, "out": "y", "config": {"steps": 1}}', "another version", id="old"
        ),
    ],
)
def test_a_run_that_cannot_be_read_says_why(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=sentence):
        read_plan(tmp_path)


def test_a_run_is_named_after_the_folder_that_holds_the_split(tmp_path: Path) -> None:
    birds = tmp_path / "birds"
    assert (name_of(birds), name_of(birds / "train")) == ("birds", "birds")


def test_a_resumed_run_is_held_to_the_names_of_its_data_and_told_of_new_stamps(
    plan: RunPlan, tmp_path: Path
) -> None:
    data: dict[str, str | int] = {"images": 1000, "names": "a", "stamps": "b"}
    with own_run_directory(tmp_path / "run", plan, resume=False, world=ALONE) as directory:
        assert directory.holds_to(data)
        assert directory.holds_to(data)
        assert not directory.holds_to(data | {"stamps": "c"})
        with pytest.raises(RunDirectoryError, match="had 1,000 images and has 999 now: put it back"):
            directory.holds_to(data | {"images": 999})
        with pytest.raises(RunDirectoryError, match="had 1,000 images and has others now"):
            directory.holds_to(data | {"names": "c"})
