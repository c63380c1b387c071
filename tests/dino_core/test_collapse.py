"""Each measure at the two ends of its scale, and that the two kinds of collapse look different."""

import pytest
import torch

from dino_core.collapse import feature_std, mean_entropy, prototype_usage, rank_me


def test_entropy_is_nought_for_one_prototype_and_one_for_all_alike() -> None:
    assert mean_entropy(torch.eye(6)[None]).item() == 0
    assert mean_entropy(torch.full((2, 3, 6), 1 / 6)).item() == pytest.approx(1, rel=1e-6)


def test_usage_counts_the_prototypes_that_the_batch_shares() -> None:
    one_prototype = torch.eye(8)[torch.zeros(16, dtype=torch.int64)]
    assert prototype_usage(one_prototype).item() == pytest.approx(1 / 8)
    four_prototypes = torch.eye(8)[torch.arange(16) % 4]
    assert prototype_usage(four_prototypes).item() == pytest.approx(4 / 8)
    assert prototype_usage(four_prototypes.view(2, 8, 8)).item() == pytest.approx(4 / 8)
    assert prototype_usage(torch.full((3, 8), 1 / 8)).item() == pytest.approx(1)


def test_the_kinds_of_collapse_look_different() -> None:
    uniform, single = torch.full((16, 8), 1 / 8), torch.eye(8)[torch.zeros(16, dtype=torch.int64)]
    healthy = torch.eye(8)[torch.arange(16) % 8]
    measures = [
        (round(mean_entropy(p).item(), 3), round(prototype_usage(p).item(), 3))
        for p in (uniform, single, healthy)
    ]
    assert measures == [(1.0, 1.0), (0.0, 0.125), (0.0, 1.0)]


def test_spread_is_one_on_the_whole_sphere_and_nought_for_one_direction() -> None:
    features = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert feature_std(features).item() == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(10, 32) * torch.arange(1, 11)[:, None]).item() == pytest.approx(0, abs=1e-6)


def test_spread_doesnt_depend_on_lengths() -> None:
    features = torch.randn(50, 8)
    lengths = torch.rand(50, 1) + 0.5
    torch.testing.assert_close(feature_std(features * lengths), feature_std(features))


def test_rank_me_counts_directions() -> None:
    assert rank_me(torch.eye(12)).item() == pytest.approx(12, rel=1e-4)
    assert rank_me(torch.ones(20, 12)).item() == pytest.approx(1, rel=1e-4)
    basis = torch.linalg.qr(torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))[0]
    plane = basis @ torch.randn(3, 12)[:3].div(torch.tensor([[1.0], [1.0], [1.0]]))
    assert rank_me(plane).item() < 3.01
    assert rank_me(torch.zeros(4, 4)).item() == pytest.approx(1, abs=1e-3)


def test_rank_me_doesnt_depend_on_scale_or_rotation() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    torch.testing.assert_close(rank_me(7 * features @ rotation), rank_me(features))


def test_half_precision_is_measured_in_float32() -> None:
    features = torch.randn(64, 8).bfloat16()
    assert feature_std(features).dtype == torch.float32
    assert rank_me(features).dtype == torch.float32
