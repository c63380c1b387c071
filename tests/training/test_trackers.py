"""TensorBoard, read back; and trackers that aren't installed."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.training.conftest import MakeConfig, MakeFolder
from training.errors import ConfigError
from training.loop import run
from training.rundir import RunPlan
from training.trackers import numbers_in, open_trackers


def test_a_run_writes_tensorboard_files(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plan = RunPlan(data=make_folder(), val_data=None, out=tmp_path / "models/tiny", config=make_config())
    run(plan, tmp_path / "runs/tiny", resume=False, console=Console(quiet=True))
    events = accumulator.EventAccumulator(str(tmp_path / "runs/tiny/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("step/loss_nats")] == [1, 2, 3, 4, 5, 6]
    for vital in ("teacher_student_distance", "gradient_norm_stem", "gradient_norm_last_layer"):
        assert len(events.Scalars(f"step/{vital}")) == 6
    assert [event.step for event in events.Scalars("evaluation/rank_me")] == [0, 3, 6]


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path) -> None:
    try:
        import mlflow  # noqa: F401
    except ImportError:
        with (
            pytest.raises(ConfigError, match="the tracker mlflow was asked for and is not installed"),
            open_trackers(["mlflow"], tmp_path, {}, from_step=0, say=print),
        ):
            pass
    else:
        pytest.skip("mlflow is installed")


def test_only_numbers_go_to_trackers() -> None:
    values = {"loss": 0.5, "kind": "val", "gap": None, "count": 3}
    assert numbers_in("step", values) == {"step/loss": 0.5, "step/count": 3.0}
