"""What DINO does between the backward pass and the optimiser's step, and how it groups parameters."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from timm.models import group_parameters
from torch import Tensor, nn

ClipMode = Literal["global", "per_parameter"]

# Keeps a zero norm from dividing by zero; the value is that of torch and of the official code.
NORM_EPSILON = 1e-6


def weight_decay_groups(
    network: nn.Module, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Splits trainable parameters into those that decay and those that don't, and by their learning rate.

    Biases and one-dimensional parameters (norms, LayerScale) don't decay: they have no redundancy for decay
    to remove.

    Args:
        network: Its parameters without gradient (a frozen prototype norm, a teacher) are left out.
        scales: Factor of the learning rate by a parameter's name, where it isn't 1.

    Returns:
        Groups for a torch optimiser. Each has `decays`, whether it takes the optimiser's weight decay and a
        schedule sets its `weight_decay` each step (else that is 0 and stays so), and `lr_scale`, by which a
        scheduled learning rate is to be multiplied. Without scales there are two: what decays, and the rest.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith("bias")
            groups.setdefault((decays, (scales or {}).get(name, 1.0)), []).append(parameter)
    return [
        {"params": parameters, "decays": decays, "lr_scale": scale}
        | ({} if decays else {"weight_decay": 0.0})
        for (decays, scale), parameters in groups.items()
    ]


def layer_scales(network: nn.Module, *, decay: float) -> dict[str, float]:
    """Learning rates that fall from the last layer of a timm network to its first.

        scale = decay ** (number of layers behind the parameter's)

    Args:
        network: A timm network; it says which parameters make a layer.
        decay: From 0 to 1; 1 leaves all alike.

    Returns:
        The factor of each parameter by its name.

    Reference: Clark et al. 2020 (ELECTRA), section 3.1; Bao et al. 2022 (BEiT), for ViTs.
    """
    layers = group_parameters(network, network.group_matcher(coarse=False))  # type: ignore[operator]
    last = max(layers)
    return {name: decay ** (last - layer) for layer, names in layers.items() for name in names}


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
