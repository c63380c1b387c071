"""Foreign networks at image sizes that their table of learnt positions was not made for.

Many ViTs keep one vector for each patch of their native size and, for a smaller image, take the first few:
the patches of a 3 x 3 image then get the positions of the first row of an 8 x 8 one. Nothing fails, and the
network learns nonsense about where things are. Here the table is resampled to the image's grid instead.
timm's networks and `Backbone` look after theirs themselves.

Dimension key: B images · C channels · H W pixels · D embedding · P prefix tokens · N patches
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dino_core.backbones import HookedBackbone
from dino_core.errors import BackboneError
from dino_core.vit import official_positions

TABLE_NAMES = (
    "pos_embedding",
    "pos_embed",
    "position_embedding",
    "position_embeddings",
    "positional_embedding",
)
# Class token and registers; more than these in front of a square number of positions is no ViT that we know.
MAX_PREFIX_TOKENS = 16


class ResampledPositions(nn.Module):
    """A backbone whose positions are resampled to each image's own grid. Made by `at_other_sizes`; final.

    Attributes:
        backbone: The network as given; shared, not copied.
        image_size_px: The size that the table is for.
        embed_dim: Length of the embedding.
    """

    def __init__(self, backbone: HookedBackbone, *, table_name: str, image_size_px: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size_px = image_size_px
        self.embed_dim = backbone.embed_dim
        self._table_name = table_name

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Gives embeddings [B,D]; each side of the images must be a multiple of the patch."""
        height_px, width_px = images_BCHW.shape[2:]
        if height_px == width_px == self.image_size_px:
            return cast(Tensor, self.backbone(images_BCHW))
        table = self.backbone.get_parameter(self._table_name)
        grid = _native_grid(table)
        rows, columns = (round(side_px * grid / self.image_size_px) for side_px in (height_px, width_px))
        table_PND = table.reshape(-1, table.shape[-1])
        prefix_PD, patches_ND = table_PND[: -(grid**2)], table_PND[-(grid**2) :]
        resampled_1ND = official_positions(
            patches_ND[None], old_grid_hw=(grid, grid), grid_hw=(rows, columns)
        )
        resampled = torch.cat([prefix_PD, resampled_1ND[0]]).reshape(*table.shape[:-2], -1, table.shape[-1])
        return cast(Tensor, functional_call(self.backbone, {self._table_name: resampled}, (images_BCHW,)))


def at_other_sizes(
    backbone: HookedBackbone, *, image_size_px: int, other_size_px: int, in_channels: int
) -> HookedBackbone | ResampledPositions:
    """Makes sure that a network gives right embeddings at a second image size.

    Two blank images of the second size are sent through, in evaluation mode, changing nothing. The second
    goes through with the table's surplus positions set to NaN: an embedding that stays finite never looked at
    them.

    Args:
        backbone: A network cut at a layer.
        image_size_px: The native size.
        other_size_px: The size of the smaller crops.
        in_channels: Channels of the images.

    Returns:
        The backbone itself where it takes both sizes, else the backbone with its positions resampled.

    Raises:
        BackboneError: The network cannot take the second size.
    """
    if other_size_px == image_size_px:
        return backbone
    table_name = _table_name(backbone)
    example = next(backbone.parameters(), torch.empty(0))
    blank = torch.zeros(
        1, in_channels, other_size_px, other_size_px, device=example.device, dtype=example.dtype
    )
    training = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            if table_name is None:
                backbone(blank)
                return backbone
            if _looks_at_the_whole_table(backbone, table_name, blank):
                return backbone
            resampled = ResampledPositions(backbone, table_name=table_name, image_size_px=image_size_px)
            resampled(blank)
            return resampled
    except Exception as error:  # a foreign network may raise anything
        raise BackboneError(
            f"{type(backbone.net).__name__} takes images of {image_size_px} px and no local crops of "
            f"{other_size_px} px ({type(error).__name__}: {error}): give a local_size that it takes, "
            f"build it for any size (timm: dynamic_img_size=True), or give local_size={image_size_px} at "
            "the cost of a global crop"
        ) from error
    finally:
        for module, was_training in training:
            module.training = was_training


def _table_name(backbone: HookedBackbone) -> str | None:
    """The name of a table with one vector for each patch of a square grid, if there is just one."""
    names = [
        name
        for name, parameter in backbone.named_parameters()
        if name.rsplit(".", 1)[-1] in TABLE_NAMES
        and parameter.ndim in (2, 3)
        and parameter.shape[:-2].numel() == 1
        and _native_grid(parameter) > 1
        and parameter.shape[-2] - _native_grid(parameter) ** 2 <= MAX_PREFIX_TOKENS
    ]
    return names[0] if len(names) == 1 else None


def _native_grid(table: Tensor) -> int:
    return math.isqrt(table.shape[-2])


def _looks_at_the_whole_table(backbone: HookedBackbone, table_name: str, blank: Tensor) -> bool:
    """Whether a smaller image's embedding depends on the table's last position.

    A network that resamples its table by itself looks at all of it. One that cuts it off doesn't, and one
    that adds it as it stands fails.
    """
    table = backbone.get_parameter(table_name).clone()
    table[..., -1, :] = torch.nan
    try:
        embedding = functional_call(backbone, {table_name: table}, (blank,))
    except Exception:  # a foreign network may raise anything; the caller runs it again
        return False
    return not bool(torch.isfinite(embedding).all())
