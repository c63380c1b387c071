"""Parameter groups, both clips, and a last layer that rests."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dino_core.heads import ProjectionHead
from dino_core.multicrop import ProjectedNetwork
from dino_core.optim import clip_gradients, drop_last_layer_gradients, weight_decay_groups
from dino_core.teacher import make_teacher
from tests.references import dino_loop


def network() -> ProjectedNetwork:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return ProjectedNetwork(backbone, ProjectionHead(4, 6, hidden_dim=5, bottleneck_dim=3))


def with_gradients(*gradients: Tensor) -> list[nn.Parameter]:
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        parameters.append(parameter)
    return parameters


def test_only_weights_of_two_or_more_dimensions_decay() -> None:
    net = network()
    decayed, kept = weight_decay_groups(net)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert "weight_decay" not in decayed
    assert kept["weight_decay"] == 0.0
    assert [names[id(p)] for p in decayed["params"]] == [
        "backbone.0.weight",
        "head.mlp.0.weight",
        "head.mlp.2.weight",
        "head.mlp.4.weight",
        "head.last_layer.weight_v",
    ]
    assert [names[id(p)] for p in kept["params"]] == [
        "backbone.0.bias",
        "backbone.1.weight",
        "backbone.1.bias",
        "head.mlp.0.bias",
        "head.mlp.2.bias",
        "head.mlp.4.bias",
    ]


def test_a_teacher_gives_the_optimiser_nothing() -> None:
    assert [group["params"] for group in weight_decay_groups(make_teacher(network()))] == [[], []]


@given(scales=st.lists(st.floats(0, 1e3), min_size=1, max_size=5), max_norm=st.floats(0.1, 10))
def test_the_clip_of_each_parameter_equals_the_official_loop(scales: list[float], max_norm: float) -> None:
    gradients = [scale * torch.randn(3, 2, generator=torch.Generator().manual_seed(0)) for scale in scales]
    ours, literal = with_gradients(*gradients), with_gradients(*gradients)
    clip_gradients(ours, max_norm=max_norm, mode="per_parameter")
    dino_loop.clip_each(literal, max_norm=max_norm)
    for mine, theirs in zip(ours, literal, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@given(scales=st.lists(st.floats(0, 1e3), min_size=1, max_size=5), max_norm=st.floats(0.1, 10))
def test_the_global_clip_equals_torchs(scales: list[float], max_norm: float) -> None:
    gradients = [scale * torch.randn(3, 2, generator=torch.Generator().manual_seed(0)) for scale in scales]
    ours, theirs = with_gradients(*gradients), with_gradients(*gradients)
    norm = clip_gradients(ours, max_norm=max_norm)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_two_clips_differ_where_one_gradient_is_long() -> None:
    gradients = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.4])
    parameters = with_gradients(*gradients)
    norm = clip_gradients(parameters, max_norm=5.0, mode="per_parameter")
    assert norm.item() == pytest.approx(math.hypot(50, 0.5))
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(parameters[1].grad, gradients[1])
    parameters = with_gradients(*gradients)
    clip_gradients(parameters, max_norm=5.0, mode="global")
    torch.testing.assert_close(parameters[1].grad, gradients[1] * 5 / math.hypot(50, 0.5))


@pytest.mark.parametrize("mode", ["global", "per_parameter"])
def test_an_infinite_limit_only_measures(mode: str) -> None:
    parameters = with_gradients(torch.tensor([30.0, 40.0]))
    assert clip_gradients(parameters, max_norm=math.inf, mode=mode).item() == 50  # type: ignore[arg-type]
    assert parameters[0].grad is not None
    assert parameters[0].grad.tolist() == [30.0, 40.0]


@pytest.mark.parametrize("mode", ["global", "per_parameter"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_isnt_finite_shows_in_the_norm(bad: float, mode: str) -> None:
    parameters = with_gradients(torch.tensor([1.0, bad]), torch.tensor([1.0]))
    assert not torch.isfinite(clip_gradients(parameters, max_norm=3.0, mode=mode))  # type: ignore[arg-type]


def test_parameters_without_gradient_are_passed_over() -> None:
    assert clip_gradients([nn.Parameter(torch.zeros(2))], max_norm=1.0).item() == 0
    parameters = [nn.Parameter(torch.zeros(2)), *with_gradients(torch.tensor([3.0, 4.0]))]
    assert clip_gradients(parameters, max_norm=1.0).item() == 5


def test_a_limit_that_isnt_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        clip_gradients([], max_norm=0.0)


def test_a_resting_last_layer_is_passed_over_by_decay_too() -> None:
    net = network()
    optimizer = torch.optim.AdamW(weight_decay_groups(net), lr=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net([torch.randn(3, 3, 4, 4)]).square().sum().backward()
    drop_last_layer_gradients(net)
    optimizer.step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert "head.last_layer.weight_v" not in moved
    assert "head.mlp.4.weight" in moved


def test_a_network_without_last_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="give the network with its head"):
        drop_last_layer_gradients(nn.Linear(2, 2))
