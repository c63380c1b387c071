"""A run whose gradients stay NaN goes back, on from there with other images and rates, and can be killed."""

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dino_core.errors import CollapseError
from tests.training.conftest import MakeConfig, MakeFolder
from training import healing
from training.checkpoint import checkpoints_in, load_newest, save_checkpoint
from training.config import RunConfig
from training.healing import go_back, with_lower_rates
from training.loop import run
from training.parts import save
from training.rundir import RunPlan
from training.runlog import MetricsLog, read_metrics
from training.state import TrainState, new_state
from training.step import train_step, values_at

CPU = torch.device("cpu")
Poison = Callable[..., None]


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Poison]:
    """Makes some batches push a weight so far that all gradients after them are NaN; steps are real."""

    def arm(*batches: int, stop_at: int | None = None) -> None:
        def step(state: TrainState, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - passed through
            poisonous = state.next_batch in batches
            metrics = train_step(state, *arguments, **named)
            if poisonous:
                with torch.no_grad():
                    next(state.student.parameters()).fill_(torch.inf)
            if state.next_batch == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return metrics

        monkeypatch.setattr("training.loop.train_step", step)

    yield arm
    monkeypatch.undo()


def config_of(make_config: MakeConfig, **changes: Any) -> RunConfig:  # noqa: ANN401 - settings
    guard = {"max_nonfinite_steps": 3, "rollback_lr_factor": 0.25} | changes.pop("guard", {})
    return make_config(steps=12, guard=guard, **changes)


def plan_of(data: Path, config: RunConfig, out: Path) -> RunPlan:
    return RunPlan(data=data, val_data=None, out=out, config=config)


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    kept = {"step", "loss_nats", "learning_rate", "gradient_norm", "teacher_student_distance"}
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "step"]
    return [{key: line[key] for key in kept} for line in lines]


def events_of(run_dir: Path) -> list[tuple[int, str]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [(line["step"], line["event"]) for line in lines if line["kind"] == "event"]


def test_a_poisoned_run_goes_back_and_finishes(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console, poison: Poison
) -> None:
    poison(6)
    config, run_dir = config_of(make_config), tmp_path / "run"
    out = run(plan_of(make_folder(), config, tmp_path / "out"), run_dir, resume=False, console=console)
    assert out is not None
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(out / "model.safetensors").values())

    # Steps 8 to 10 are sick; 6 was saved, and is older than the last good step, 7.
    sentence = (
        "gradients were NaN or infinite from step 8 on, so the run went back to step 6: the images of "
        "steps 7 to 10 are left out, and learning rates are multiplied by 0.25 (rollback 1)"
    )
    said = console.export_text()
    assert f"step 10: {sentence}" in said
    assert "step 10: in the stem, the blocks, the head" in said
    assert events_of(run_dir) == [(6, "rollback")]
    steps = steps_of(run_dir)
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(line["loss_nats"] is not None for line in steps)
    for line in steps:
        rate = values_at(line["step"] - 1, config).learning_rate
        assert line["learning_rate"] == pytest.approx(rate * (0.25 if line["step"] > 6 else 1))
    given_up = read_metrics(run_dir / "rolled-back-1.jsonl")
    assert [line["step"] for line in given_up if line["kind"] == "step"] == [7, 8, 9, 10]
    assert sentence in (run_dir / "report.html").read_text()


@pytest.mark.parametrize("stop_at", [9, 10, 11, 12, 14])
def test_a_run_that_went_back_is_stopped_and_goes_on_bit_for_bit(
    make_config: MakeConfig,
    make_folder: MakeFolder,
    tmp_path: Path,
    console: Console,
    poison: Poison,
    stop_at: int,
) -> None:
    data, config = make_folder(), config_of(make_config)
    poison(6)
    whole = run(plan_of(data, config, tmp_path / "whole"), tmp_path / "run-1", resume=False, console=console)
    plan = plan_of(data, config, tmp_path / "stopped")
    poison(6, stop_at=stop_at)
    assert run(plan, tmp_path / "run-2", resume=False, console=console) is None
    poison(6)
    resumed = run(plan, tmp_path / "run-2", resume=True, console=console)
    assert whole is not None
    assert resumed is not None
    assert steps_of(tmp_path / "run-2") == steps_of(tmp_path / "run-1")
    assert events_of(tmp_path / "run-2") == events_of(tmp_path / "run-1")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dies_in", ["save", "MetricsLog.go_back", "tell_rollbacks"])
def test_a_run_that_dies_while_it_goes_back_does_the_same_again(
    make_config: MakeConfig,
    make_folder: MakeFolder,
    tmp_path: Path,
    console: Console,
    poison: Poison,
    monkeypatch: pytest.MonkeyPatch,
    dies_in: str,
) -> None:
    data, config = make_folder(), config_of(make_config)
    poison(6)
    whole = run(plan_of(data, config, tmp_path / "whole"), tmp_path / "run-1", resume=False, console=console)
    plan = plan_of(data, config, tmp_path / "killed")

    tell = healing.tell_rollbacks

    def die(first: Any, *others: Any) -> None:  # noqa: ANN401 - of several functions
        if dies_in == "MetricsLog.go_back" or first.rollbacks:
            raise KeyboardInterrupt
        (save if dies_in == "save" else tell)(first, *others)

    with monkeypatch.context() as patched:
        if dies_in == "MetricsLog.go_back":
            patched.setattr(MetricsLog, "go_back", die)
        else:
            patched.setattr(f"training.healing.{dies_in}", die)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "run-2", resume=False, console=console)
    resumed = run(plan, tmp_path / "run-2", resume=True, console=console)
    assert whole is not None
    assert resumed is not None
    assert steps_of(tmp_path / "run-2") == steps_of(tmp_path / "run-1")
    assert events_of(tmp_path / "run-2") == [(6, "rollback")]
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_run_goes_back_further_the_second_time_and_then_ends(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console, poison: Poison
) -> None:
    # Batch 10 is the first after the first rollback, batch 14 after the second.
    poison(6, 10, 14)
    run_dir = tmp_path / "run"
    with pytest.raises(CollapseError, match="going back 2 times did not help.*Checkpoints are in"):
        run(
            plan_of(make_folder(), config_of(make_config), tmp_path / "out"),
            run_dir,
            resume=False,
            console=console,
        )
    assert sorted(events_of(run_dir)) == [(4, "rollback"), (6, "rollback"), (8, "sickness")]
    state, _ = load_newest(run_dir / "checkpoints", device=CPU, config=config_of(make_config))
    assert state is not None
    assert [(one.from_step, one.to_step) for one in state.rollbacks] == [(10, 6), (10, 4)]
    assert state.next_batch == 14
    assert [path.name for path in checkpoints_in(run_dir / "checkpoints")] == ["step-00000004-rollback-2"]


def test_two_rollbacks_to_the_same_step_are_two_events(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console, poison: Poison
) -> None:
    poison(0, 4)
    config = config_of(make_config, checkpoints={"every_steps": 20})
    plan = plan_of(make_folder(), config, tmp_path / "out")
    assert run(plan, tmp_path / "run", resume=False, console=console) is not None
    assert events_of(tmp_path / "run") == [(0, "rollback"), (0, "rollback")]


def test_without_rollbacks_it_ends_at_once(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console, poison: Poison
) -> None:
    poison(6)
    config = config_of(make_config, guard={"max_rollbacks": 0})
    plan = plan_of(make_folder(), config, tmp_path / "out")
    with pytest.raises(CollapseError, match="NaN or infinite"):
        run(plan, tmp_path / "run", resume=False, console=console)


def sick(config: RunConfig, directory: Path, *, saved: tuple[int, ...], step: int, since: int) -> TrainState:
    """A state with checkpoints of earlier steps, each of which has its step in the centre."""
    state = new_state(config, device=CPU)
    for at in saved:
        state.step = at
        state.center_K.fill_(at)
        save_checkpoint(directory, state, config)
    state.step, state.nonfinite_in_a_row = step, step - since
    state.center_K.fill_(-1)
    return state


def test_the_newest_whole_and_finite_one_from_before_is_taken(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = config_of(make_config, checkpoints={"every_steps": 2, "keep": 9})
    state = sick(config, tmp_path, saved=(2, 4, 6, 8), step=11, since=8)
    (tmp_path / "step-00000006/state.safetensors").write_bytes(b"half")
    rollback = go_back(state, tmp_path, config)
    assert (rollback.sick_from, rollback.from_step, rollback.to_step) == (8, 11, 4)
    assert (state.step, state.nonfinite_in_a_row, float(state.center_K[0])) == (4, 0, 4.0)
    assert state.next_batch == 11


def test_a_sick_checkpoint_is_passed_over(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, checkpoints={"every_steps": 2, "keep": 9})
    state = sick(config, tmp_path, saved=(2,), step=4, since=4)
    with torch.no_grad():
        next(state.student.parameters()).fill_(torch.nan)
    save_checkpoint(tmp_path, state, config)
    state.step, state.nonfinite_in_a_row = 9, 4
    assert go_back(state, tmp_path, config).to_step == 2


def test_without_a_checkpoint_it_is_the_beginning(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config)
    state, fresh = sick(config, tmp_path, saved=(), step=5, since=1), new_state(config, device=CPU)
    train_step(state, [[torch.zeros(4, 3, side, side) for side in (16, 16, 8)]], config=config)
    assert state.optimizer.state
    assert go_back(state, tmp_path, config).to_step == 0
    assert not state.optimizer.state
    for name, tensor in fresh.student.state_dict().items():
        assert torch.equal(state.student.state_dict()[name], tensor), name


def test_what_was_given_up_goes_when_the_new_state_is_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(make_config, checkpoints={"every_steps": 2, "keep": 9, "keep_every_steps": 2})
    state = sick(config, tmp_path, saved=(2, 4, 6), step=8, since=6)
    go_back(state, tmp_path, config)
    save_checkpoint(tmp_path, state, config)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000004-rollback-1", "step-00000002"]
    description = json.loads((tmp_path / "step-00000004-rollback-1/state.json").read_text())
    assert description["rollbacks"] == [{"sick_from": 6, "from_step": 8, "to_step": 4, "lr_factor": 0.25}]
    loaded, _ = load_newest(tmp_path, device=CPU, config=config)
    assert loaded is not None
    assert loaded.rollbacks == state.rollbacks


def test_rates_are_those_of_all_rollbacks_whatever_the_settings_say_now(make_config: MakeConfig) -> None:
    config = config_of(make_config)
    state = new_state(config, device=CPU)
    assert with_lower_rates(config, state.rollbacks) == config
    state.step, state.nonfinite_in_a_row = 4, 4
    for _ in range(2):
        go_back(state, Path("nowhere"), config)
    changed = config_of(make_config, guard={"rollback_lr_factor": 1.0})
    lower = with_lower_rates(changed, state.rollbacks).optimizer
    assert (lower.peak_lr, lower.end_lr) == (0.01 / 16, 1e-6 / 16)
