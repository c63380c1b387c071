"""Matrix products by the faster library: torch's numbers and gradients, and no other place than its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dino_core import products
from dino_core.products import FastProducts, linear, product


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By oneDNN, whatever the processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("leading", [(7,), (2, 5), (2, 3, 4)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_has_torchs_numbers_and_gradients(leading: tuple[int, ...], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*size, generator=generator) for size in ((*leading, 24), (40, 24), (40,))]

    def results(function: object) -> list[torch.Tensor]:
        operands = [tensor.clone().requires_grad_() for tensor in drawn[: 3 if has_bias else 2]]
        output = function(*operands)  # type: ignore[operator]
        torch.autograd.backward(output.sin().sum())
        return [output, *(operand.grad for operand in operands if operand.grad is not None)]

    for ours, theirs in zip(results(linear), results(functional.linear), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_needs_no_gradient_gets_none() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.requires_grad_(False)
    torch.autograd.backward(linear(torch.randn(2, 4), layer.weight, layer.bias).sum())
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_products_take_any_strides() -> None:
    left, right = torch.randn(6, 9).T, torch.randn(6, 5).T
    torch.testing.assert_close(product(left, right), left @ right.T)


def test_the_mode_changes_layers_inside_of_it_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*operands: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return functional.linear(*operands)

    monkeypatch.setattr(products, "linear", watched)
    layer, inputs = nn.Linear(4, 3), torch.randn(2, 4)
    with FastProducts():
        inside = layer(inputs)
    assert seen == [1]
    assert torch.equal(inside, layer(inputs))
    assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_numbers_go_torchs_way(dtype: torch.dtype) -> None:
    inputs, weight = torch.randn(2, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)
    assert torch.equal(linear(inputs, weight), functional.linear(inputs, weight))


def test_autocast_is_torchs_matter() -> None:
    inputs, weight = torch.randn(2, 4), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(inputs, weight).dtype == torch.bfloat16
