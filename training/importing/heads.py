"""DINO's projection heads in other people's files: which tensors they are, and what settings they have."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import HeadConfig

# DINO, and DINOv2's own; torch's parametrisation of the weight norm has other names for the same two tensors.
_HEAD = re.compile(r"^(?:dino_)?head\.((?:mlp|last_layer)\..*)$")
_SPELLED = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}
OTHER_HEADS = ("ibot_head.", "dino_head.", "head.mlp.", "head.last_layer.")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Projection heads by the names of `dino_core.heads`; empty where there is none.

    Attributes:
        teacher: The teacher's, or the only one.
        student: The student's.
    """

    teacher: dict[str, Tensor]
    student: dict[str, Tensor]


def split_head(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separates a network's tensors from those of its head.

    Args:
        tensors: Of a network with head, `backbone.` and `head.`; or of a network alone, without these
        prefixes.

    Returns:
        The network's without `backbone.`, and whatever else is there; the head's, by our names.
    """
    if not any(name.startswith("backbone.") for name in tensors):
        return dict(tensors), {}
    network: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := _HEAD.match(name):
            head[_SPELLED.get(found[1], found[1])] = tensor
        else:
            network[re.sub(r"^backbone\.(network\.)?", "", name)] = tensor
    if head_settings(head) is None:
        network |= {f"head.{name}": tensor for name, tensor in head.items()}
        head = {}
    return network, head


def head_settings(head: Mapping[str, Tensor]) -> HeadConfig | None:
    """The settings of a head by the shapes of its tensors; None if it is none of DINO's."""
    directions, norms = head.get("last_layer.weight_v"), head.get("last_layer.weight_g")
    linears = [tensor for name, tensor in head.items() if name.startswith("mlp.") and tensor.ndim == 2]
    if directions is None or norms is None or not linears:
        return None
    return HeadConfig(
        num_prototypes=directions.shape[0],
        bottleneck_dim=directions.shape[1],
        hidden_dim=linears[0].shape[0] if len(linears) > 1 else HeadConfig().hidden_dim,
        num_layers=len(linears),
        # Where the lengths of the prototypes have learnt, they go on learning.
        norm_last_layer=bool(torch.equal(norms, torch.ones_like(norms))),
        batch_norm=any(name.endswith("running_mean") for name in head),
    )
