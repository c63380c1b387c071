"""Our numbers against those of the official DINO code, case by case.

`DINO_GOLDEN` names the file to meet; by default it is the copy in `tests/golden`. Every size and every
setting comes from the file, so that reference numbers made with other ones can be run too.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dino_core.backbones import Backbone, make_backbone
from dino_core.heads import ProjectionHead
from dino_core.knn import knn_accuracy
from dino_core.losses import dino_loss, sharpen, teacher_logits_sum, updated_center
from dino_core.multicrop import ProjectedNetwork
from dino_core.optim import clip_gradients, drop_last_layer_gradients, weight_decay_groups
from dino_core.schedules import cosine, linear_warmup, warmup_cosine
from dino_core.teacher import make_teacher, update_teacher

GOLDEN = Path(
    os.environ.get("DINO_GOLDEN", Path(__file__).parents[1] / "golden" / "dino_reference.safetensors")
)


@cache
def settings() -> dict[str, Any]:
    with safe_open(GOLDEN, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["meta"])
    return found


@cache
def tensors() -> dict[str, Tensor]:
    with safe_open(GOLDEN, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def under(prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): t for name, t in tensors().items() if name.startswith(prefix)}


def steps_of(kind: str) -> list[int]:
    return sorted(
        {
            int(name.split(".")[1])
            for name in tensors()
            if name.startswith(f"{kind}.") and name.split(".")[1].isdigit()
        }
    )


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """Length of the difference as a share of the golden tensor's length."""
    assert ours.shape == golden.shape
    difference = (ours.detach().double() - golden.double()).norm()
    return float(difference / golden.double().norm().clamp_min(torch.finfo(torch.float32).tiny))


def vit_of(state: Mapping[str, Tensor]) -> Backbone:
    """The ViT that a state dict fits, with the weights in it."""
    embed_dim, in_channels, patch_px, _ = state["patch_embed.proj.weight"].shape
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    backbone = make_backbone(
        "vit_small_patch16_224",
        image_size_px=grid * patch_px,
        in_channels=in_channels,
        position_interpolation="official",
        model_kwargs={
            "patch_size": patch_px,
            "embed_dim": embed_dim,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "num_heads": settings()["vit"]["num_heads"],
            "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        },
    )
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = settings()["vit"]["ln_eps"]
    backbone.network.load_state_dict(dict(state), strict=True)
    return backbone


def head_of(state: Mapping[str, Tensor], *, norm_last_layer: bool = True) -> ProjectionHead:
    """The head that a state dict fits, with the weights in it."""
    prototypes, bottleneck_dim = state["last_layer.weight_v"].shape
    layers = [tensor for name, tensor in state.items() if name.startswith("mlp.") and tensor.ndim == 2]
    first = state.get("mlp.0.weight", layers[0])
    head = ProjectionHead(
        first.shape[1],
        prototypes,
        hidden_dim=first.shape[0],
        bottleneck_dim=bottleneck_dim,
        num_layers=len(layers),
        norm_last_layer=norm_last_layer,
        batch_norm=any("running_mean" in name for name in state),
    )
    head.load_state_dict(dict(state), strict=True)
    return head


@pytest.mark.parametrize("step", steps_of("loss"))
def test_loss_gradient_and_centre_are_the_official_ones(step: int) -> None:
    sizes, case = settings()["loss"], under(f"loss.{step}.")
    student = case["student"].view(sizes["n_crops"], sizes["batch"], sizes["K"]).clone().requires_grad_()
    teacher = case["teacher"].view(-1, sizes["batch"], sizes["K"])
    center = case["center_before"].view(-1)

    targets = sharpen(teacher, center, temperature=case["teacher_temp"].item())
    loss = dino_loss(student, targets, student_temperature=sizes["student_temp"])
    torch.autograd.backward(loss)
    moved = updated_center(center, *teacher_logits_sum(teacher), momentum=sizes["center_momentum"])

    assert student.grad is not None
    assert loss.item() == pytest.approx(case["value"].item(), rel=1e-6)
    assert relative_error(student.grad, case["student_grad"].view_as(student)) <= 1e-6
    assert relative_error(moved, case["center_after"].view(-1)) <= 1e-6


def test_the_centre_is_carried_from_step_to_step() -> None:
    center = tensors()[f"loss.{steps_of('loss')[0]}.center_before"].view(-1)
    for step in steps_of("loss"):
        teacher = tensors()[f"loss.{step}.teacher"]
        center = updated_center(
            center, *teacher_logits_sum(teacher), momentum=settings()["loss"]["center_momentum"]
        )
        assert relative_error(center, tensors()[f"loss.{step}.center_after"].view(-1)) <= 1e-6


@pytest.mark.parametrize("name", sorted(under("schedule.")))
def test_schedules_are_the_official_ones(name: str) -> None:
    case = settings()[f"schedule.{name}"]
    steps = case["epochs"] * case["iters_per_epoch"]
    warmup_steps = case["warmup_epochs"] * case["iters_per_epoch"]
    values = [
        warmup_cosine(
            step, peak=case["base"], end=case["final"], total_steps=steps, warmup_steps=warmup_steps
        )
        for step in range(steps)
    ]
    assert values == pytest.approx(tensors()[f"schedule.{name}"].tolist(), rel=0, abs=1e-9)


def test_the_head_is_the_official_one() -> None:
    case = under("head.")
    head = head_of(under("head.state."))
    inputs = case["in"].clone().requires_grad_()
    outputs = head(inputs)
    torch.autograd.backward(outputs.square().sum())
    assert inputs.grad is not None
    assert relative_error(outputs, case["out"]) <= 1e-5
    assert relative_error(inputs.grad, case["in_grad"]) <= 1e-5


def test_the_vit_is_the_official_one() -> None:
    case = under("vit.")
    backbone = vit_of(under("vit.state.")).eval()
    with torch.no_grad():
        features = backbone.features(case["in"])
        attention = backbone.attention(case["in"])
        embeddings = backbone(case["in"])
    assert features.cls_BD is not None
    tokens = torch.cat([features.cls_BD[:, None], features.patches_BND], dim=1)
    assert relative_error(embeddings, case["cls"]) <= 1e-5
    assert relative_error(tokens, case["tokens_last"]) <= 1e-5
    assert relative_error(attention, case["attention"]) <= 1e-5


@pytest.mark.parametrize(
    "name", [name.removeprefix("cls") for name in under("vit.") if name.startswith("cls") and name != "cls"]
)
def test_the_vit_at_another_size_is_the_official_one(name: str) -> None:
    backbone = vit_of(under("vit.state.")).eval()
    with torch.no_grad():
        embeddings = backbone(tensors()[f"vit.in{name}"])
    assert relative_error(embeddings, tensors()[f"vit.cls{name}"]) <= 1e-5


@pytest.mark.parametrize("k", sorted(int(k) for k in settings()["knn"]))
def test_the_neighbours_accuracy_is_exactly_the_official_one(k: int) -> None:
    case = under("knn.")
    accuracy = knn_accuracy(case["train"], case["train_labels"], case["test"], case["test_labels"], k=k)
    assert list(accuracy) == settings()["knn"][str(k)]


@dataclass(frozen=True)
class Trajectory:
    """What a run over the golden crops came to."""

    losses: list[float]
    teacher: ProjectedNetwork
    center_K: Tensor


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    """Trains on the golden crops, from the golden start, with the functions that training uses."""
    run, initial = settings()["train"], under("train.init.")
    iterations, total_steps = run["iters_per_epoch"], run["epochs"] * run["iters_per_epoch"]
    lr_peak, lr_end, lr_epochs = run["lr"]
    temperature_start, temperature_end, temperature_epochs = run["teacher_temp"]
    student = network_of(initial)
    teacher, center = make_teacher(student), torch.zeros(student.head.num_prototypes)
    optimizer = torch.optim.AdamW(weight_decay_groups(student), betas=(0.9, 0.999))
    losses = []
    for step in range(total_steps):
        epoch = step // iterations
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(
                step, peak=lr_peak, end=lr_end, total_steps=total_steps, warmup_steps=lr_epochs * iterations
            )
        optimizer.param_groups[0]["weight_decay"] = between(run["wd"], step, total_steps)
        global_views, local_views = tensors()[f"train.{step}.global"], tensors()[f"train.{step}.local"]
        with torch.no_grad():
            teacher_logits = teacher(list(global_views))
        temperature = linear_warmup(
            epoch, start=temperature_start, end=temperature_end, warmup_steps=temperature_epochs
        )
        targets = sharpen(teacher_logits, center, temperature=temperature)
        logits = student([*global_views, *local_views])
        loss = dino_loss(logits, targets, student_temperature=settings()["loss"]["student_temp"])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        clip_gradients(student.parameters(), max_norm=run["clip_per_parameter"], mode="per_parameter")
        if epoch < run["freeze_last_layer_epochs"]:
            drop_last_layer_gradients(student)
        optimizer.step()
        update_teacher(teacher, student, momentum=between(run["momentum"], step, total_steps))
        total, count = teacher_logits_sum(teacher_logits)
        center = updated_center(center, total, count, momentum=settings()["loss"]["center_momentum"])
        losses.append(loss.item())
    return Trajectory(losses, teacher, center)


def between(ends: list[float], step: int, total_steps: int) -> float:
    return cosine(step, start=ends[0], end=ends[1], total_steps=total_steps)


def network_of(state: Mapping[str, Tensor]) -> ProjectedNetwork:
    """Backbone and head that a state fits; the prototypes' lengths learn if the golden run moved them."""
    start, end = (tensors()[f"train.{when}.head.last_layer.weight_g"] for when in ("init", "teacher_final"))
    parts = {
        part: {name.removeprefix(part): t for name, t in state.items() if name.startswith(part)}
        for part in ("backbone.", "head.")
    }
    head = head_of(parts["head."], norm_last_layer=torch.equal(start, end))
    return ProjectedNetwork(vit_of(parts["backbone."]), head)


def test_the_losses_of_a_training_are_the_official_ones(trajectory: Trajectory) -> None:
    assert trajectory.losses == pytest.approx(tensors()["train.losses"].tolist(), rel=1e-5)


def test_the_centre_after_a_training_is_the_official_one(trajectory: Trajectory) -> None:
    assert relative_error(trajectory.center_K, tensors()["train.center_final"].view(-1)) <= 1e-5


def test_the_teacher_after_a_training_is_the_official_one(trajectory: Trajectory) -> None:
    golden = under("train.teacher_final.")
    ours = {
        name.replace("backbone.network.", "backbone."): t
        for name, t in trajectory.teacher.state_dict().items()
    }
    assert ours.keys() == golden.keys()
    errors = {}
    for name, tensor in golden.items():
        mine, theirs = ours[name], tensor
        if name.endswith("attn.qkv.bias"):
            # A bias of the keys adds the same to all logits of a row, so softmax takes it away and its
            # gradient is nought. What is left is rounding noise, which Adam scales up to whole steps: no two
            # programs agree.
            mine, theirs = (torch.stack([part.chunk(3)[0], part.chunk(3)[2]]) for part in (mine, theirs))
        errors[name] = relative_error(mine, theirs)
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


def test_the_teacher_after_a_training_says_what_the_official_one_says(trajectory: Trajectory) -> None:
    official = make_teacher(network_of(under("train.teacher_final.")))
    last = settings()["train"]["epochs"] * settings()["train"]["iters_per_epoch"] - 1
    views = [*tensors()[f"train.{last}.global"], *tensors()[f"train.{last}.local"]]
    assert relative_error(trajectory.teacher(views), official(views)) <= 1e-5
