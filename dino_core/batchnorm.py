"""BatchNorm by the batch of all processes together: a network learns the same, however many share the batch.

torch's own `SyncBatchNorm` takes no tensors of CPUs, and puts other modules into the network; this is a
mode that is entered for a step.

Dimension key: N images · C channels · W processes

Reference: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167; gradients over all processes as in
`torch.nn.SyncBatchNorm`
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def shared_batch_norm() -> AbstractContextManager[object]:
    """While it is entered, BatchNorm in training mode goes through `batch_norm`; no module is changed.

    All processes must run the same layers in the same order meanwhile. Without other processes it is nothing,
    as a mode is asked about each call of torch's.
    """
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return _SharedBatchNorm() if several else nullcontext()


class _SharedBatchNorm(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is functional.batch_norm and kwargs["training"]:
            del kwargs["training"]
            return batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """`functional.batch_norm` in training mode, whose batch is that of all processes.

        (x - mean) / sqrt(var + eps) * weight + bias

    with mean and variance of each channel over all images of all processes, which may have different
    numbers. The gradient of the input is that of the sum of all processes' losses; those of weight and bias
    are this process's part.

    Args:
        input: [N,C] or [N,C,...].
        running_mean: [C], moved in place if given; alike on all processes.
        running_var: [C], as above, by the unbiased variance.
        weight: [C].
        bias: [C].
        momentum: Share of the batch in the new running statistics.
        eps: Added to the variance.

    Returns:
        As the input, in its type; computed in float32 at least.
    """
    count, mean_C, var_C = _shared_statistics(input)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean_C.to(running_mean.dtype), momentum)
            running_var.lerp_((var_C * (count / (count - 1))).to(running_var.dtype), momentum)
    normalised = cast(Tensor, _Normalised.apply(input, mean_C, torch.rsqrt(var_C + eps), count))
    if weight is not None:
        normalised = normalised * _across(weight, input)
    if bias is not None:
        normalised = normalised + _across(bias, input)
    return normalised.to(input.dtype)


class _Kept(FunctionCtx):
    """What the backward pass is given, in names that a type checker can see; torch makes the object."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor]


class _Normalised(torch.autograd.Function):
    """(x - mean) * scale, where mean and scale follow from the inputs of all processes."""

    @staticmethod
    def forward(ctx: _Kept, inputs: Tensor, mean_C: Tensor, scale_C: Tensor, count: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, mean_C, scale_C, count)
        return (inputs - _across(mean_C, inputs)) * _across(scale_C, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        inputs, mean_C, scale_C, count = ctx.saved_tensors
        normalised = (inputs - _across(mean_C, inputs)) * _across(scale_C, inputs)
        axes = _all_but_channels(inputs)
        # What moving all of a channel, or stretching it, would change is no change: the statistics follow.
        message_2C = torch.stack([gradient.sum(dim=axes), (gradient * normalised).sum(dim=axes)])
        distributed.all_reduce(message_2C)
        moved_C, stretched_C = message_2C / count
        rest = gradient - _across(moved_C, inputs) - normalised * _across(stretched_C, inputs)
        return (rest * _across(scale_C, inputs)).to(inputs.dtype), None, None, None


@torch.no_grad()
def _shared_statistics(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of each channel over all processes, in one message.

    Means and variances travel, not sums of squares, whose difference would leave rounding errors.
    """
    values = input.to(torch.promote_types(input.dtype, torch.float32))
    var_C, mean_C = torch.var_mean(values, dim=_all_but_channels(input), correction=0)
    count = torch.full_like(mean_C[:1], input.numel() // input.shape[1])
    message = torch.cat([count, mean_C, var_C])
    received = message.new_empty(distributed.get_world_size() * len(message))
    distributed.all_gather_into_tensor(received, message)
    received = received.view(-1, len(message))
    counts_W1, means_WC, vars_WC = torch.split(received, [1, len(mean_C), len(mean_C)], dim=1)
    total = counts_W1.sum()
    mean_C = (counts_W1 * means_WC).sum(dim=0) / total
    var_C = (counts_W1 * (vars_WC + (means_WC - mean_C).square())).sum(dim=0) / total
    return total, mean_C, var_C


def _across(channels_C: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1,C,1,...], to be broadcast over a tensor."""
    return channels_C.view(1, -1, *[1] * (like.ndim - 2))


def _all_but_channels(tensor: Tensor) -> list[int]:
    return [axis for axis in range(tensor.ndim) if axis != 1]
