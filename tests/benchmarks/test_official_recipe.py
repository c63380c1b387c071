"""The recipe that ours is measured against: it must be the method, or the comparison says nothing."""

import pytest
import torch

from benchmarks.equal_time import Attempt, verdict
from benchmarks.official_recipe import OfficialRun, new_backbone
from training.config import BackboneConfig, HeadConfig, OptimizerConfig, RunConfig
from training.state import new_state
from training.step import train_step, values_at

STEPS, BATCH, PROTOTYPES = 20, 4, 64


def test_its_steps_are_those_of_a_run_with_the_official_settings() -> None:
    config = RunConfig(  # all else is official by default
        recipe="test",
        steps=STEPS,
        batch_size=BATCH,
        backbone=BackboneConfig(name="resnet10t", image_size_px=64, drop_path=0.0),
        head=HeadConfig(num_prototypes=PROTOTYPES),
        optimizer=OptimizerConfig(
            peak_lr=0.0005 * BATCH / 256, warmup_steps=STEPS // 10, freeze_last_layer_steps=STEPS // 100
        ),
    )
    state = new_state(config, device=torch.device("cpu"))
    backbone = new_backbone("resnet10t", image_size_px=64)
    for name, tensor in state.student.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor), f"{name}: both begin with the same network"
    run = OfficialRun(backbone, batch_size=BATCH, steps=STEPS, num_prototypes=PROTOTYPES)
    run.student.load_state_dict(state.student.state_dict())
    run.teacher.load_state_dict(state.student.state_dict())

    for step in range(STEPS):  # so few steps at such rates move weights too little to show a wrong schedule
        now = values_at(step, config)
        assert run.rates[step] == pytest.approx(now.learning_rate, abs=1e-12)
        assert run.decays[step] == pytest.approx(now.weight_decay)
        assert run.momenta[step] == pytest.approx(now.teacher_momentum)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        views = [torch.randn(BATCH, 3, side, side, generator=generator) for side in [64] * 2 + [32] * 8]
        ours = train_step(state, [views], config=config).loss_nats
        assert run.step(views) == pytest.approx(ours, rel=1e-5)  # float32, sums in another order
    for theirs, own in zip(run.teacher.parameters(), state.teacher.parameters(), strict=True):
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-5)
    torch.testing.assert_close(run.center_K, state.center_K, rtol=0, atol=1e-5)


def test_a_run_gets_as_many_steps_as_fit_behind_its_start() -> None:
    trial = Attempt(seconds_at={10: 14.0, 20: 24.0, 30: 34.0}, teachers=())  # 4 s to begin, 1 s a step
    assert trial.steps_in(104.0) == 98  # of the 100 that fit, as a cut schedule is worse than a short one


def test_the_official_teacher_is_judged_at_its_better_size_and_only_against_equal_time() -> None:
    official = {
        "minutes": 60.0,
        "curve": [{"knn_percent": 50.0}],
        "last_at_official_ratio_percent": 51.0,
    }
    ours = {"minutes": 60.0, "curve": [{"knn_percent": 57.5}], "last_at_official_ratio_percent": 60.0}
    assert verdict({"official": official, "ours": ours})["points_ahead"] == 6.5
    assert "missing" in verdict({"official": official, "ours": ours | {"minutes": 2.0}})
