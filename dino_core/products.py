"""float32 matrix products at the speed of the CPU, where torch's default library leaves half of it unused.

torch multiplies float32 matrices by Intel's MKL, which takes AVX2 on processors of other makers, also on
those that have AVX-512; oneDNN, which torch carries too, takes what is there. Measured on two cores of an AMD
EPYC (Zen 5): 215 against 440 GFLOP/s (docs/lab-notes.md, 2026-11-25). Only the order of sums differs.

Dimension key: N rows · I inputs · O outputs
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class FastProducts(TorchFunctionMode):
    """While it is entered, linear layers in this thread go through `linear`; no module is changed."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func is functional.linear:
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear`, by the faster library.

    Args:
        input: [..., I].
        weight: [O, I].
        bias: [O].

    Returns:
        [..., O].
    """
    operands = [input, weight] if bias is None else [input, weight, bias]
    if not _is_for_onednn(operands):
        return functional.linear(input, weight, bias)
    rows = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias)
    return cast(Tensor, rows).view(*input.shape[:-1], len(weight))


def product(left_NI: Tensor, right_OI: Tensor) -> Tensor:
    """`left @ right.T`, by the faster library and without a gradient.

    Args:
        left_NI: Any strides.
        right_OI: Any strides.

    Returns:
        [N, O].
    """
    if not _is_for_onednn([left_NI, right_OI]):
        return left_NI @ right_OI.T
    multiplied: Tensor = torch.ops.mkldnn._linear_pointwise(left_NI, right_OI, None, "none", [], "")
    return multiplied


@functools.cache
def onednn_is_faster() -> bool:
    """Says whether this machine's processor is one that MKL holds back.

    By what the processor is, not by a measurement: a resumed run must add up in the same order.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()[:4096]
    except OSError:
        return False


def _is_for_onednn(operands: list[Tensor]) -> bool:
    plain = all(
        type(operand) in (Tensor, torch.nn.Parameter)
        and operand.device.type == "cpu"
        and operand.dtype == torch.float32
        for operand in operands
    )
    return plain and not torch.is_autocast_enabled("cpu") and onednn_is_faster()


class _Kept(FunctionCtx):
    """What the backward pass is given, in names that a type checker can see; torch makes the object."""

    saved_tensors: tuple[Tensor, Tensor]
    needs_input_grad: tuple[bool, bool, bool]


class _Linear(torch.autograd.Function):
    """A linear layer with both of its backward products by oneDNN too."""

    @staticmethod
    def forward(ctx: _Kept, inputs_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs_NI, weight_OI)
        outputs_NO: Tensor = torch.ops.mkldnn._linear_pointwise(inputs_NI, weight_OI, bias_O, "none", [], "")
        return outputs_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, gradient_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs_NI, weight_OI = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradient_NO, weight_OI.T) if of_inputs else None,
            product(gradient_NO.T, inputs_NI.T) if of_weight else None,
            gradient_NO.sum(dim=0) if of_bias else None,
        )
