"""The head against its literal form, its initialisation, its state names."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dino_core.heads import ProjectionHead
from tests.references import dino_loop


def head(**changes: object) -> ProjectionHead:
    torch.manual_seed(0)
    settings: dict[str, object] = {"hidden_dim": 13, "bottleneck_dim": 5, **changes}
    return ProjectionHead(7, 11, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_the_head_equals_its_literal_form_and_so_does_its_gradient(num_layers: int) -> None:
    projection = head(num_layers=num_layers).double()
    with torch.no_grad():  # off its start, where biases are 0 and norms are 1
        for parameter in projection.parameters():
            parameter.add_(torch.rand_like(parameter))
    inputs = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    outputs = projection(inputs)
    literal = dino_loop.head(dict(projection.state_dict()), inputs)
    torch.testing.assert_close(outputs, literal)
    gradients = [torch.autograd.grad(result.square().sum(), inputs)[0] for result in (outputs, literal)]
    torch.testing.assert_close(*gradients)


def test_state_names_are_the_official_ones() -> None:
    assert list(head().state_dict()) == [
        "mlp.0.weight",
        "mlp.0.bias",
        "mlp.2.weight",
        "mlp.2.bias",
        "mlp.4.weight",
        "mlp.4.bias",
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    assert list(head(num_layers=1).state_dict())[:2] == ["mlp.weight", "mlp.bias"]
    assert "mlp.1.running_mean" in head(batch_norm=True).state_dict()


def test_outputs_are_cosines_between_embedding_and_prototype() -> None:
    projection = head()
    outputs = projection(100 * torch.randn(64, 7))
    assert outputs.abs().max() <= 1 + 1e-6
    assert outputs.shape == (64, 11)


def test_the_length_of_a_prototypes_direction_doesnt_matter() -> None:
    projection, inputs = head(), torch.randn(4, 7)
    before = projection(inputs)
    with torch.no_grad():
        projection.last_layer.weight_v.mul_(17)
    torch.testing.assert_close(projection(inputs), before)


def test_prototypes_keep_length_one_unless_they_are_let_learn() -> None:
    assert not head().last_layer.weight_g.requires_grad
    assert head(norm_last_layer=False).last_layer.weight_g.requires_grad
    assert torch.equal(head().last_layer.weight_g, torch.ones(11, 1))


def test_leading_axes_are_kept_and_mean_nothing() -> None:
    projection, inputs = head(), torch.randn(3, 4, 7)
    outputs = projection(inputs)
    assert outputs.shape == (3, 4, 11)
    torch.testing.assert_close(outputs[1, 2], projection(inputs[1, 2:3])[0])


def test_batch_norm_takes_its_statistics_over_all_views_together() -> None:
    views = torch.randn(3, 4, 7)
    torch.testing.assert_close(
        head(batch_norm=True)(views), head(batch_norm=True)(views.flatten(0, 1)).view(3, 4, 11)
    )


def test_the_start_is_small_and_normal_with_zero_bias() -> None:
    torch.manual_seed(0)
    projection = ProjectionHead(300, 50, hidden_dim=400, bottleneck_dim=64)
    for layer in projection.mlp.modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.bias.abs().max() == 0
    bound = 64**-0.5
    directions = projection.last_layer.weight_v
    assert directions.abs().max() <= bound
    assert directions.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_bottleneck_is_normalised_in_float32_under_autocast() -> None:
    projection, inputs = head(), torch.randn(4, 7)
    seen: list[torch.Tensor] = []
    projection.last_layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = projection(inputs)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0].norm(dim=-1), torch.ones(4))
    assert outputs.dtype == torch.bfloat16


def test_a_head_survives_copying_and_saving(tmp_path: Path) -> None:
    projection = head()
    torch.save(projection.state_dict(), tmp_path / "head.pt")
    other = head(norm_last_layer=False)
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True), strict=True)
    inputs = torch.randn(2, 7)
    torch.testing.assert_close(other(inputs), projection(inputs), rtol=0, atol=0)


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        head(num_layers=0)
