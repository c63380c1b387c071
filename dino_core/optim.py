"""What DINO does between the backward pass and the optimiser's step, and how it groups parameters."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

ClipMode = Literal["global", "per_parameter"]

# Keeps a zero norm from dividing by zero; the value is that of torch and of the official code.
NORM_EPSILON = 1e-6


def weight_decay_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Splits trainable parameters into those that decay and those that don't.

    Biases and one-dimensional parameters (norms, LayerScale) don't: they have no redundancy for decay to
    remove.

    Args:
        network: Its parameters without gradient (a frozen prototype norm, a teacher) are left out.

    Returns:
        Two groups for a torch optimiser: the first takes the optimiser's weight decay and is the one whose
        `weight_decay` a schedule sets each step, the second has 0 and keeps it.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim <= 1 or name.endswith("bias") else decayed).append(parameter)
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], *, max_norm: float, mode: ClipMode = "global") -> Tensor:
    """Shrinks gradients that are too long, in place and without waiting for the device.

        gradient *= min(1, max_norm / (norm + 1e-6))

    Args:
        parameters: Those without a gradient are passed over.
        max_norm: Above 0; DINO uses 3.0. Infinity only measures.
        mode: "global" takes one norm of all gradients together, and keeps their direction. "per_parameter"
            takes each parameter's own, as the official DINO code does: needed to reproduce its numbers.

    Returns:
        The norm of all gradients together before clipping, a scalar tensor (0 if there is none). Not finite
        when any gradient isn't.

    Raises:
        ValueError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}, and must be above 0")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norms = list(torch._foreach_norm(gradients))
    # To the first gradient's device: a network may be spread over several.
    total_norm: Tensor = torch.linalg.vector_norm(
        torch.stack([norm.to(gradients[0].device) for norm in norms])
    )
    if mode == "global":
        norms = [total_norm.to(gradient.device) for gradient in gradients]
    factors = [(max_norm / (norm + NORM_EPSILON)).clamp(max=1.0) for norm in norms]
    torch._foreach_mul_(gradients, factors)
    return total_norm


def drop_last_layer_gradients(network: nn.Module) -> None:
    """Lets the prototypes rest in this step: their gradients are removed, so the optimiser passes them over.

    DINO does so in the first epoch, while the features are still random. A gradient of zero would not do:
    weight decay and momentum would still move the layer.

    Args:
        network: A network whose head names its prototypes `last_layer`.

    Raises:
        ValueError: The network has no such layer.
    """
    last_layer = [
        parameter for name, parameter in network.named_parameters() if "last_layer" in name.split(".")
    ]
    if not last_layer:
        raise ValueError(
            f"{type(network).__name__} has no last_layer to keep still: give the network with its head"
        )
    for parameter in last_layer:
        parameter.grad = None
