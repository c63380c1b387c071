"""What timm's vision transformers do not offer: the official resampling of positions, and attention.

Dimension key: B images · C channels · H W pixels or patches · D embedding · N patches · P prefix tokens
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def official_positions(
    positions_1ND: Tensor, *, old_grid_hw: tuple[int, int], grid_hw: tuple[int, int]
) -> Tensor:
    """Resamples learnt positions as the official DINO code does.

    Bicubic without antialias, by a scale factor that is a tenth of a patch above the ratio of the grids: the
    tenth guards the size of the result against rounding, and shifts the sampling points by a little. That is
    part of how published weights were trained, so it is kept.

    Args:
        positions_1ND: One vector a patch, row by row.
        old_grid_hw: The grid that they were learnt for.
        grid_hw: The grid wanted.

    Returns:
        [1, rows * columns, D].

    Reference: facebookresearch/dino, vision_transformer.py, `interpolate_pos_encoding`.
    """
    map_1DHW = positions_1ND.reshape(1, *old_grid_hw, -1).movedim(3, 1)
    scale = [(new + 0.1) / old for new, old in zip(grid_hw, old_grid_hw, strict=True)]
    resampled_1DHW = functional.interpolate(map_1DHW.float(), scale_factor=scale, mode="bicubic")
    return resampled_1DHW.movedim(1, 3).flatten(1, 2).to(positions_1ND.dtype)


def official_forward_features(net: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """`VisionTransformer.forward_features`, but for how positions are resampled."""
    built_hw = tuple(net.patch_embed.grid_size)
    if net.pos_embed is None or net.patch_embed.dynamic_feat_size(images_BCHW.shape[2:]) == built_hw:
        encoded: Tensor = net.forward_features(images_BCHW)
        return encoded
    patches_BHWD = net.patch_embed(images_BCHW)
    of_prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    resampled_1ND = official_positions(
        net.pos_embed[:, of_prefix:],
        old_grid_hw=built_hw,
        grid_hw=(patches_BHWD.shape[1], patches_BHWD.shape[2]),
    )
    prefix = [
        token.expand(len(patches_BHWD), -1, -1)
        for token in (net.cls_token, net.reg_token)
        if token is not None
    ]
    tokens = torch.cat([*prefix, patches_BHWD.flatten(1, 2)], dim=1)
    # A network that gives its prefix no position is one whose prefix has the position nought.
    before_1PD = (
        net.pos_embed[:, :of_prefix]
        if of_prefix
        else tokens.new_zeros(1, net.num_prefix_tokens, tokens.shape[2])
    )
    tokens = tokens + torch.cat([before_1PD, resampled_1ND], dim=1)
    normed: Tensor = net.norm(net.blocks(net.norm_pre(net.patch_drop(net.pos_drop(tokens)))))
    return normed


class LastAttention(TorchFunctionMode):
    """Sees every attention that runs in this thread, and keeps the operands of the last.

    Fused attention never forms its weights; they are computed afterwards, for the last block only. Nothing in
    the network is changed or hooked, so that other threads may use it meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights: Callable[[], Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            bound = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            self._weights = functools.partial(
                _attention_weights, bound["query"], bound["key"], bound.get("attn_mask"), bound.get("scale")
            )
        elif func in (Tensor.softmax, functional.softmax, torch.softmax):
            self._weights = lambda: result
        return result

    def weights(self) -> Tensor | None:
        """Gives the last weights [B, heads, queries, keys], None if nothing attended."""
        return self._weights() if self._weights else None


def _attention_weights(query: Tensor, key: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    logits = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1)
