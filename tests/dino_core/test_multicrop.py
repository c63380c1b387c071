"""Views of several sizes: one forward each, the order kept."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dino_core.heads import ProjectionHead
from dino_core.multicrop import ProjectedNetwork, forward_views


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@given(sizes=st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=1, max_size=6))
def test_grouped_forwards_equal_one_forward_a_view_in_any_order_of_sizes(
    sizes: list[tuple[int, int]],
) -> None:
    net = network()
    views = [torch.randn(2, 3, height, width) for height, width in sizes]
    together = forward_views(net, views)
    torch.testing.assert_close(together, torch.stack([net(view) for view in views]))


def test_there_is_one_forward_for_each_distinct_size() -> None:
    batches: list[tuple[int, ...]] = []

    def net(images: Tensor) -> Tensor:
        batches.append(tuple(images.shape))
        return images.mean(dim=(2, 3))

    # Same width, other height; and sizes that don't come in a row.
    sizes = [(8, 8), (4, 8), (8, 8), (4, 4), (4, 8)]
    outputs = forward_views(
        net, [torch.full((2, 3, *size), float(place)) for place, size in enumerate(sizes)]
    )
    assert batches == [(4, 3, 8, 8), (4, 3, 4, 8), (2, 3, 4, 4)]
    assert outputs[:, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_any_trailing_shape_is_kept() -> None:
    outputs = forward_views(lambda images: images.flatten(2), [torch.randn(2, 3, 4, 4)] * 3)
    assert outputs.shape == (3, 2, 3, 16)


def test_gradients_reach_every_view() -> None:
    views = [torch.randn(2, 3, size, size, requires_grad=True) for size in (8, 8, 4)]
    torch.autograd.backward(forward_views(network(), views).square().sum())
    assert all(view.grad is not None and view.grad.abs().sum() > 0 for view in views)


def test_a_projected_network_scores_all_views_with_one_call_of_its_head() -> None:
    head = ProjectionHead(6, 9, hidden_dim=8, bottleneck_dim=4, batch_norm=True)
    calls: list[tuple[int, ...]] = []
    head.register_forward_hook(lambda _module, args, _output: calls.append(tuple(args[0].shape)))
    projected = ProjectedNetwork(network(), head)
    logits = projected([torch.randn(2, 3, size, size) for size in (8, 8, 4, 4, 4)])
    assert logits.shape == (5, 2, 9)
    assert calls == [(5, 2, 6)]
    assert {name.split(".")[0] for name in projected.state_dict()} == {"backbone", "head"}


@pytest.mark.parametrize(
    "views",
    [
        pytest.param([], id="no view"),
        pytest.param([torch.zeros(2, 3, 4, 4), torch.zeros(3, 3, 4, 4)], id="other images"),
    ],
)
def test_views_of_different_images_are_refused(views: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="all of the same images"):
        forward_views(network(), views)
