"""One step: the official trajectory, what moves and how far, what stays when a gradient is not finite."""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.training.conftest import MakeConfig
from training.config import RunConfig
from training.state import TrainState, new_state
from training.step import train_step, values_at

CPU = torch.device("cpu")
GOLDEN = Path(
    os.environ.get("DINO_GOLDEN", Path(__file__).parents[1] / "golden" / "dino_reference.safetensors")
)
RESNET: dict[str, Any] = {"name": "test_resnet", "image_size_px": 32, "model_kwargs": {}}


def views_of(seed: int, *, images: int = 4, sizes: Sequence[int] = (16, 16, 8, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, size, size, generator=generator) for size in sizes]


def everything(state: TrainState) -> dict[str, Tensor]:
    """Copies of every tensor of a state."""
    networks = {"student": state.student, "teacher": state.teacher}
    tensors = {
        f"{role}.{name}": tensor.clone()
        for role, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    for number, values in enumerate(state.optimizer.state.values()):
        tensors |= {f"optimizer.{number}.{name}": tensor.clone() for name, tensor in values.items()}
    return tensors | {"center": state.center_K.clone()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


@pytest.fixture
def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        meta: dict[str, Any] = json.loads(file.metadata()["meta"])
    return meta, tensors


def golden_config(meta: dict[str, Any], tensors: dict[str, Tensor]) -> RunConfig:
    """The settings of the official six steps, as a user would give them."""
    run, state = meta["train"], tensors
    epoch_steps = run["iters_per_epoch"]
    embed_dim, _, patch_px, _ = state["train.init.backbone.patch_embed.proj.weight"].shape
    grid = round((state["train.init.backbone.pos_embed"].shape[1] - 1) ** 0.5)
    blocks = {name.split(".")[4] for name in state if name.startswith("train.init.backbone.blocks.")}
    prototypes, bottleneck_dim = state["train.init.head.last_layer.weight_v"].shape
    peak_lr, end_lr, warmup_epochs = run["lr"]
    start, end, temperature_epochs = run["teacher_temp"]
    return RunConfig.model_validate(
        {
            "recipe": "golden",
            "steps": run["epochs"] * epoch_steps,
            "batch_size": run["batch"],
            "backbone": {
                "name": "vit_small_patch16_224",
                "image_size_px": grid * patch_px,
                "drop_path": 0,
                "model_kwargs": {
                    "patch_size": patch_px,
                    "embed_dim": embed_dim,
                    "depth": len(blocks),
                    "num_heads": meta["vit"]["num_heads"],
                },
            },
            "head": {
                "num_prototypes": prototypes,
                "bottleneck_dim": bottleneck_dim,
                "hidden_dim": len(state["train.init.head.mlp.0.bias"]),
            },
            "loss": {
                "student_temperature": meta["loss"]["student_temp"],
                "teacher_temperature_start": start,
                "teacher_temperature": end,
                "teacher_temperature_warmup_steps": temperature_epochs * epoch_steps,
                "teacher_temperature_hold_steps": epoch_steps,
                "center_momentum": meta["loss"]["center_momentum"],
            },
            "teacher": {"momentum_start": run["momentum"][0], "momentum_end": run["momentum"][1]},
            "optimizer": {
                "peak_lr": peak_lr,
                "end_lr": end_lr,
                "warmup_steps": warmup_epochs * epoch_steps,
                "weight_decay_start": run["wd"][0],
                "weight_decay_end": run["wd"][1],
                "clip_norm": run["clip_per_parameter"],
                "freeze_last_layer_steps": run["freeze_last_layer_epochs"] * epoch_steps,
            },
        }
    )


def test_six_steps_are_the_official_ones(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    meta, tensors = golden
    config = golden_config(meta, tensors)
    state = new_state(config, device=CPU)
    prefix = "train.init."
    start = {
        name.removeprefix(prefix).replace("backbone.", "backbone.network."): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    state.student.load_state_dict(start)
    state.teacher.load_state_dict(start)
    losses = []
    for step in range(config.steps):
        views = [*tensors[f"train.{step}.global"], *tensors[f"train.{step}.local"]]
        losses.append(train_step(state, [views], config=config).loss_nats)
    assert losses == pytest.approx(tensors["train.losses"].tolist(), rel=1e-5)
    torch.testing.assert_close(state.center_K, tensors["train.center_final"][0], rtol=1e-5, atol=1e-6)
    for name, tensor in state.teacher.state_dict().items():
        official = tensors["train.teacher_final." + name.replace("backbone.network.", "backbone.")]
        if not name.endswith("attn.qkv.bias"):  # the keys' third has no gradient but rounding noise
            assert float((tensor - official).norm() / official.norm()) <= 1e-5, name


def test_a_step_moves_student_teacher_centre_and_optimiser(make_config: MakeConfig) -> None:
    config = make_config(optimizer={"warmup_steps": 0, "freeze_last_layer_steps": 0})
    state = new_state(config, device=CPU)
    before, views = everything(state), views_of(1)
    with torch.no_grad():
        teacher_mean_K = state.teacher(views[:2]).mean(dim=(0, 1))
    metrics = train_step(state, [views], config=config)
    after = everything(state)

    assert metrics.is_finite
    assert state.step == 1
    assert metrics.loss_nats == pytest.approx(metrics.teacher_entropy_nats + metrics.kl_nats)
    torch.testing.assert_close(state.center_K, 0.1 * teacher_mean_K)
    momentum = values_at(0, config).teacher_momentum
    name = "backbone.network.blocks.0.attn.proj.weight"
    expected = momentum * before[f"teacher.{name}"] + (1 - momentum) * after[f"student.{name}"]
    torch.testing.assert_close(after[f"teacher.{name}"], expected)
    assert f"student.{name}" in changed(before, after)


def test_the_teacher_begins_as_the_student_with_its_head(make_config: MakeConfig) -> None:
    state = new_state(make_config(), device=CPU)
    student, teacher = state.student.state_dict(), state.teacher.state_dict()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())


def test_a_frozen_last_layer_stands_still_and_then_thaws(make_config: MakeConfig) -> None:
    config = make_config(steps=4, optimizer={"warmup_steps": 0, "freeze_last_layer_steps": 2})
    state = new_state(config, device=CPU)
    moved = []
    for step in range(3):
        before = state.student.head.last_layer.weight_v.detach().clone()
        train_step(state, [views_of(step)], config=config)
        moved.append(not torch.equal(before, state.student.head.last_layer.weight_v))
    assert moved == [False, False, True]


def test_a_batch_in_parts_gives_the_same_step(make_config: MakeConfig) -> None:
    # No drop path: it draws once for each part.
    config = make_config(
        backbone={"drop_path": 0.0}, optimizer={"warmup_steps": 0, "clip": "global", "clip_norm": 0.1}
    )
    whole, parted = new_state(config, device=CPU), new_state(config, device=CPU)
    for step in range(3):
        views = views_of(step)
        one = train_step(whole, [views], config=config)
        two = train_step(
            parted, ([view[half] for view in views] for half in (slice(2), slice(2, 4))), config=config
        )
        assert two.loss_nats == pytest.approx(one.loss_nats, rel=1e-5)
    torch.testing.assert_close(parted.center_K, whole.center_K)
    # Adam divides by the gradient's size, so that its rounding shows: 1e-4 is a hundredth of a step.
    for name, tensor in whole.student.state_dict().items():
        torch.testing.assert_close(parted.student.state_dict()[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("backbone", [pytest.param({}, id="ViT"), pytest.param(RESNET, id="BatchNorm")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_bad_gradients_changes_only_its_number(
    make_config: MakeConfig, backbone: dict[str, Any], bad: float
) -> None:
    config = make_config(backbone=backbone, head={"batch_norm": bool(backbone)})
    sizes = (32, 32, 16, 16) if backbone else (16, 16, 8, 8)
    state = new_state(config, device=CPU)
    train_step(state, [views_of(0, sizes=sizes)], config=config)
    before, views = everything(state), views_of(1, sizes=sizes)
    views[0][1, 0, 3, 3] = bad
    metrics = train_step(state, [views], config=config)
    assert not metrics.is_finite
    assert changed(before, everything(state)) == set()
    assert (state.step, state.nonfinite_in_a_row) == (2, 1)
    assert train_step(state, [views_of(2, sizes=sizes)], config=config).is_finite
    assert state.nonfinite_in_a_row == 0


def test_a_teacher_with_batch_norm_tells_images_apart_from_the_start(make_config: MakeConfig) -> None:
    # In evaluation mode a fresh ResNet answers all images alike, and training only makes that uniform.
    config = make_config(backbone=RESNET, head={"batch_norm": True, "num_prototypes": 256}, batch_size=32)
    state = new_state(config, device=CPU)
    views = views_of(3, images=32, sizes=(32, 32))
    metrics = train_step(state, [views], config=config)
    mean_answer_entropy = torch.log(torch.tensor(metrics.prototype_usage * 256)).item()
    assert mean_answer_entropy - metrics.teacher_entropy_nats > 0.3


def test_the_teacher_takes_over_the_statistics_of_the_student(make_config: MakeConfig) -> None:
    config = make_config(backbone=RESNET, head={"batch_norm": True})
    state = new_state(config, device=CPU)
    train_step(state, [views_of(0, sizes=(32, 32, 16, 16))], config=config)
    student, teacher = dict(state.student.named_buffers()), dict(state.teacher.named_buffers())
    means = [name for name in teacher if name.endswith("running_mean")]
    assert means
    assert all(torch.equal(student[name], teacher[name]) for name in teacher)
    assert all(teacher[name].abs().sum() > 0 for name in means)
    assert not any(module.training for module in state.teacher.modules())


def test_dropped_paths_depend_on_seed_step_and_rank_alone(make_config: MakeConfig) -> None:
    config = make_config()
    first = new_state(config, device=CPU)
    again, other = copy.deepcopy(first), copy.deepcopy(first)
    torch.manual_seed(1)
    one = train_step(first, [views_of(0)], config=config).loss_nats
    torch.manual_seed(2)
    assert train_step(again, [views_of(0)], config=config).loss_nats == one
    assert train_step(other, [views_of(0)], config=config, rank=1).loss_nats != one


def test_a_step_leaves_the_global_random_numbers_alone(make_config: MakeConfig) -> None:
    state = new_state(make_config(), device=CPU)
    before = torch.get_rng_state()
    train_step(state, [views_of(0)], config=make_config())
    assert torch.equal(torch.get_rng_state(), before)


def test_bf16_computes_the_networks_only(make_config: MakeConfig) -> None:
    config = make_config(precision="bf16")
    state = new_state(config, device=CPU)
    metrics = train_step(state, [views_of(0)], config=config)
    exact = train_step(new_state(make_config(), device=CPU), [views_of(0)], config=make_config())
    assert metrics.loss_nats == pytest.approx(exact.loss_nats, rel=0.05)
    assert state.center_K.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in state.student.parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", ["global", "per_parameter", "none"])
def test_every_optimiser_and_clip_lowers_the_loss_on_one_batch(
    make_config: MakeConfig, name: str, clip: str
) -> None:
    config = make_config(
        steps=40,
        backbone={"drop_path": 0.0},
        teacher={"momentum_start": 1.0},
        optimizer={"name": name, "clip": clip, "peak_lr": 0.003 if name == "adamw" else 0.1},
    )
    state = new_state(config, device=CPU)
    divergences = [train_step(state, [views_of(0)], config=config).kl_nats for _ in range(40)]
    assert divergences[-1] < 0.9 * divergences[0]  # not nought: the crops' targets differ
