"""How far the student is from its teacher, and where in it the gradients are: measured at logged steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from dino_core.multicrop import ProjectedNetwork

# Parameters that are subtracted at once: a copy of all weights would be in memory else.
_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """A few numbers that tell where a run hurts.

    Attributes:
        teacher_student_distance: |student - teacher| / |teacher| over all parameters, after the step.
        gradient_norm_stem: Of what turns pixels into the first features (patch embedding and positions, or
            the first convolution), before clipping.
        gradient_norm_blocks: Of the rest of the backbone.
        gradient_norm_head: Of the head without its last layer.
        gradient_norm_last_layer: Of the prototypes; also where the step leaves them frozen.
    """

    teacher_student_distance: float
    gradient_norm_stem: float
    gradient_norm_blocks: float
    gradient_norm_head: float
    gradient_norm_last_layer: float


def sick_parts(vitals: Vitals) -> str:
    """Where gradients are NaN or infinite, in words; nothing where none is."""
    norms = {
        "the stem": vitals.gradient_norm_stem,
        "the blocks": vitals.gradient_norm_blocks,
        "the head": vitals.gradient_norm_head,
        "the last layer": vitals.gradient_norm_last_layer,
    }
    return ", ".join(name for name, norm in norms.items() if not math.isfinite(norm))


@torch.no_grad()
def distance(student: nn.Module, teacher: nn.Module) -> Tensor:
    """|student - teacher| / |teacher|, a scalar tensor on their device."""
    apart: list[Tensor] = []
    lengths: list[Tensor] = []
    pairs = list(zip(student.parameters(), teacher.parameters(), strict=True))
    for start in range(0, len(pairs), _AT_ONCE):
        ours, theirs = zip(*pairs[start : start + _AT_ONCE], strict=True)
        apart += torch._foreach_norm(torch._foreach_sub(ours, theirs))
        lengths += torch._foreach_norm(theirs)
    return _joined(apart) / _joined(lengths)


@torch.no_grad()
def gradient_norms(student: ProjectedNetwork) -> Tensor:
    """Norms of the gradients of stem, blocks, head and last layer [4]; 0 where there is no gradient."""
    parts: tuple[list[Tensor], ...] = ([], [], [], [])
    for part, parameter in _by_part(student):
        if parameter.grad is not None:
            parts[part].append(parameter.grad)
    device = next(student.parameters()).device
    return torch.stack(
        [
            _joined(torch._foreach_norm(gradients)) if gradients else torch.zeros((), device=device)
            for gradients in parts
        ]
    )


def vitals_of(distance: Tensor, gradient_norms_4: Tensor) -> Vitals:
    """Waits for the device once, for all of them."""
    apart, stem, blocks, head, last_layer = torch.cat([distance[None], gradient_norms_4]).tolist()
    return Vitals(
        teacher_student_distance=apart,
        gradient_norm_stem=stem,
        gradient_norm_blocks=blocks,
        gradient_norm_head=head,
        gradient_norm_last_layer=last_layer,
    )


def _joined(norms: Sequence[Tensor]) -> Tensor:
    """The norm of all, by the norms of the parts."""
    joined: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return joined


def _by_part(student: ProjectedNetwork) -> Iterator[tuple[int, nn.Parameter]]:
    network = student.backbone.get_submodule("network")
    # timm says which parameters make a layer; the first is the stem.
    layers = group_parameters(network, network.group_matcher(coarse=False))  # type: ignore[operator]
    stem = set(layers[min(layers)])
    for name, parameter in network.named_parameters():
        yield (0 if name in stem else 1), parameter
    for name, parameter in student.head.named_parameters():
        yield (3 if "last_layer" in name.split(".") else 2), parameter
