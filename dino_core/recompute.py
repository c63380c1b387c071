"""Less memory for activations: what is cheap is computed again in the backward pass, not kept.

Reference: Chen et al. 2016, https://arxiv.org/abs/1604.06174
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dino_core.products import FastProducts

_ATEN = torch.ops.aten
# What takes the time: matrix products and attention. Norms, GELU and additions are a thirtieth of a block.
_KEPT = {
    _ATEN.addmm.default,
    _ATEN.mm.default,
    torch.ops.mkldnn._linear_pointwise.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


def recompute_cheap_activations(network: nn.Module) -> bool:
    """Lets each transformer block keep the results of its matrix products and attention, and nothing else.

    Norms, GELU and residual sums are computed again when the backward pass needs them. Gradients are the same
    bit for bit; dropped paths are drawn again from the same random numbers.

    Args:
        network: The student's timm network, in place; a teacher keeps nothing anyway.

    Returns:
        Whether it has transformer blocks; other networks stay as they are.
    """
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, nn.Sequential) or not all(hasattr(block, "attn") for block in blocks):
        return False
    for block in blocks:
        run = partial(_run, block.forward)
        block.forward = partial(checkpoint, run, use_reentrant=False, context_fn=_contexts)
    return True


def _run(forward: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """A block; the mode is entered here, for the backward pass runs outside of the caller's."""
    with FastProducts():
        return forward(tokens)


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    first, second = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return first, second


def _policy(
    _context: object,
    operation: Callable[..., Any],
    *args: Any,  # noqa: ANN401  an operation's own
    **_: object,
) -> CheckpointPolicy:
    if operation not in _KEPT or _narrows(operation, args):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def _narrows(operation: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """The second product of an MLP: only a sum comes after it, so that nobody asks for its result again."""
    if operation is _ATEN.addmm.default:
        return bool(args[2].shape[1] < args[1].shape[1])
    if operation is torch.ops.mkldnn._linear_pointwise.default:
        return bool(args[1].shape[0] < args[0].shape[1])
    return False
