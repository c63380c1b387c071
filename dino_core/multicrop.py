"""One network, views of several sizes: as few forwards as there are sizes.

Dimension key: S views · B images · C channels · H W pixels · D embedding · K prototypes
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dino_core.heads import ProjectionHead


def forward_views(network: Callable[[Tensor], Tensor], views: Sequence[Tensor]) -> Tensor:
    """Runs a network once for each distinct size of view.

        stack([network(view) for view in views])

    is what it gives (but for BatchNorm in training mode, which sees all views of a size together), with one
    batch for each height and width in place of one for each view.

    Args:
        network: Maps [N,C,H,W] to [N,...], with the same trailing shape for every size of picture.
        views: Tensors [B,C,H,W] of the same B and C; sizes may come in any order.

    Returns:
        [S,B,...], in the order of `views`.

    Raises:
        ValueError: There is no view, or the views hold different numbers of images.
    """
    if len({view.shape[0] for view in views}) != 1:
        raise ValueError(
            f"views hold {[len(view) for view in views]} images: give at least one, all of the same images"
        )
    positions_by_size: dict[tuple[int, ...], list[int]] = {}
    for position, view in enumerate(views):
        positions_by_size.setdefault(tuple(view.shape[1:]), []).append(position)

    outputs: list[Tensor] = [torch.empty(0)] * len(views)
    for positions in positions_by_size.values():
        output_NX = network(torch.cat([views[position] for position in positions]))
        for position, output_BX in zip(positions, output_NX.chunk(len(positions)), strict=True):
            outputs[position] = output_BX
    return torch.stack(outputs)


class ProjectedNetwork(nn.Module):
    """Backbone and projection head: what the student is, and what the teacher is a copy of.

    Args:
        backbone: Maps [N,C,H,W] to embeddings [N,D], at every size of view.
        head: Maps embeddings to prototypes.
    """

    def __init__(self, backbone: nn.Module, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Views [B,C,H,W] -> logits [S,B,K]; the head runs once, on all views together."""
        return cast(Tensor, self.head(forward_views(self.backbone, views)))
