"""fp16: the scale of the loss follows the gradients, and what only the scale did is no sickness."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.conftest import MakeConfig, MakeFolder
from tests.training.test_step import changed, everything, views_of
from training.checkpoint import load_checkpoint, save_checkpoint, tensors_of
from training.cli import main
from training.config import GuardConfig, RunConfig
from training.guard import Guard, Sickness, diagnose
from training.healing import go_back
from training.loss_scale import GROWS_AFTER_STEPS, LossScale
from training.state import TrainState, new_state
from training.step import StepMetrics, train_step

CPU = torch.device("cpu")
TOO_MUCH = 2.0**40  # any gradient overflows in float16


def test_the_scale_doubles_after_many_good_steps_and_halves_after_a_bad_one() -> None:
    scale = LossScale()
    for _ in range(GROWS_AFTER_STEPS):
        assert scale.value == 65_536
        scale = scale.after(is_finite=True)
    assert scale == LossScale(131_072, 0)
    assert replace(scale, good_steps=7).after(is_finite=False) == LossScale(65_536, 0)


def test_the_scale_does_not_fall_below_one() -> None:
    scale = LossScale()
    for _ in range(16):
        assert scale.can_fall
        scale = scale.after(is_finite=False)
    assert scale == LossScale(1.0)
    assert not scale.can_fall
    assert scale.after(is_finite=False) == scale


def take(state: TrainState, config: RunConfig) -> StepMetrics:
    return train_step(state, [views_of(state.step)], config=config)


def test_an_overflow_halves_the_scale_and_changes_nothing_else(make_config: MakeConfig) -> None:
    config = make_config(precision="fp16")
    state = new_state(config, device=CPU)
    take(state, config)
    before = everything(state)
    state.loss_scale = LossScale(TOO_MUCH, 5)
    metrics = take(state, config)
    assert (metrics.is_finite, metrics.overflowed, metrics.loss_scale) == (False, True, TOO_MUCH)
    assert not changed(before, everything(state))
    assert (state.step, state.nonfinite_in_a_row) == (2, 0)
    assert state.loss_scale == LossScale(TOO_MUCH / 2)
    assert diagnose(metrics, num_prototypes=32) is None


def test_a_scale_that_overflows_falls_until_steps_are_taken_again(make_config: MakeConfig) -> None:
    config = make_config(precision="fp16", steps=60)
    state = new_state(config, device=CPU)
    state.loss_scale = LossScale(TOO_MUCH)
    guard = Guard(GuardConfig(max_nonfinite_steps=2), 32)
    for _ in range(40):
        metrics = take(state, config)
        assert guard.observe(metrics) is None
        if metrics.is_finite:
            break
    assert metrics.is_finite
    assert 1 < metrics.loss_scale < TOO_MUCH / 4


def test_gradients_that_no_scale_can_save_are_a_sickness(make_config: MakeConfig) -> None:
    config = make_config(precision="fp16")
    state = new_state(config, device=CPU)
    with torch.no_grad():
        next(state.student.parameters()).fill_(float("nan"))
    state.loss_scale = LossScale(2.0)
    first, second = take(state, config), take(state, config)
    assert (first.overflowed, second.overflowed) == (True, False)
    assert state.nonfinite_in_a_row == 1
    assert diagnose(second, num_prototypes=32) is Sickness.NOT_FINITE


def test_gradients_are_those_of_float32_whatever_the_scale_and_the_parts(make_config: MakeConfig) -> None:
    norms = {}
    for precision, scale in (("float32", None), ("fp16", LossScale(1.0)), ("fp16", LossScale(8.0))):
        for parts in (1, 2):
            config = make_config(precision=precision, backbone={"drop_path": 0.0})
            state = new_state(config, device=CPU)
            state.loss_scale = scale
            views = [[view[part::parts] for view in views_of(0)] for part in range(parts)]
            norms[precision, scale, parts] = train_step(state, views, config=config).gradient_norm
    expected = norms["float32", None, 1]
    # float16 has three digits; half a per cent is far less than a forgotten factor.
    assert list(norms.values()) == pytest.approx([expected] * 6, rel=5e-3)


def test_a_run_that_goes_on_has_the_scale_it_stopped_with(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(precision="fp16")
    straight = new_state(config, device=CPU)
    straight.loss_scale = LossScale(64.0)  # the first steps overflow
    for _ in range(3):
        take(straight, config)
    path = save_checkpoint(tmp_path, straight, config)
    resumed, _ = load_checkpoint(path, device=CPU, config=config)
    assert resumed.loss_scale == straight.loss_scale != LossScale()
    taken = []
    for _ in range(3):
        taken.append(take(resumed, config))
        assert repr(taken[-1]) == repr(take(straight, config)), "also where a norm is NaN"
    assert any(metrics.is_finite for metrics in taken)
    assert not changed(tensors_of(straight), tensors_of(resumed))
    assert resumed.loss_scale == straight.loss_scale


def test_other_precisions_have_no_scale(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    state = new_state(config, device=CPU)
    assert take(state, config).loss_scale == 1
    path = save_checkpoint(tmp_path, state, config)
    assert load_checkpoint(path, device=CPU)[0].loss_scale is None
    description = json.loads((path / "state.json").read_text())
    del description["loss_scale"]  # as it was before there was fp16
    (path / "state.json").write_text(json.dumps(description))
    assert load_checkpoint(path, device=CPU)[0].loss_scale is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to take")
def test_on_a_cpu_fp16_is_refused_in_a_sentence(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--data", str(make_folder()), "--recipe", "smoke", "--precision", "fp16"]
    words += ["--run-dir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    for more in ([], ["--plan"]):
        assert main([*words, *more]) == 2
        assert "use --precision float32, or a GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_went_back_begins_with_the_first_scale(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(precision="fp16")
    state = new_state(config, device=CPU)
    state.step, state.nonfinite_in_a_row, state.loss_scale = 3, 3, LossScale(1.0)
    go_back(state, tmp_path, config)
    assert (state.step, state.loss_scale) == (0, LossScale())
