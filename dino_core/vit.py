"""What timm's vision transformers do not offer: official positions, the class token alone, attention.

Dimension key: B images · C channels · H W pixels or patches · D embedding · N patches · P prefix tokens
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PositionInterpolation = Literal["official", "bicubic", "antialias"]


def official_positions(
    positions_1ND: Tensor, *, old_grid_hw: tuple[int, int], grid_hw: tuple[int, int], by_size: bool = False
) -> Tensor:
    """Resamples learnt positions as the official DINO code does.

    Bicubic without antialias, by a scale factor that is a tenth of a patch above the ratio of the grids: the
    tenth guards the size of the result against rounding, and shifts the sampling points by a little. That is
    part of how published weights were trained, so it is kept.

    Args:
        positions_1ND: One vector a patch, row by row.
        old_grid_hw: The grid that they were learnt for.
        grid_hw: The grid wanted.
        by_size: Without the tenth, as transformers' ViT and DINOv2 do.

    Returns:
        [1, rows * columns, D].

    Reference: facebookresearch/dino, vision_transformer.py, `interpolate_pos_encoding`.
    """
    map_1DHW = positions_1ND.reshape(1, *old_grid_hw, -1).movedim(3, 1)
    if by_size:
        resampled_1DHW = functional.interpolate(map_1DHW.float(), size=grid_hw, mode="bicubic")
    else:
        scale = [(new + 0.1) / old for new, old in zip(grid_hw, old_grid_hw, strict=True)]
        resampled_1DHW = functional.interpolate(map_1DHW.float(), scale_factor=scale, mode="bicubic")
    return resampled_1DHW.movedim(1, 3).flatten(1, 2).to(positions_1ND.dtype)


def resampling_forward_features(
    net: VisionTransformer, images_BCHW: Tensor, *, interpolation: PositionInterpolation
) -> Tensor:
    """`VisionTransformer.forward_features`, but for how positions are resampled."""
    normed: Tensor = net.norm(net.blocks(embedded_patches(net, images_BCHW, interpolation=interpolation)))
    return normed


def embedded_patches(
    net: Any,  # noqa: ANN401  untyped
    images_BCHW: Tensor,
    *,
    interpolation: PositionInterpolation,
) -> Tensor:
    """What goes into the first block: prefix and patches [B, P + N, D], with positions.

    Args:
        net: A plain vision transformer.
        images_BCHW: Normalised, of any size that the network takes.
        interpolation: How positions are resampled; see `make_backbone`.
    """
    patches_BHWD = net.patch_embed(images_BCHW)
    built_hw = tuple(net.patch_embed.grid_size)
    is_built = net.pos_embed is None or net.patch_embed.dynamic_feat_size(images_BCHW.shape[2:]) == built_hw
    if is_built or interpolation == "antialias":
        tokens = net._pos_embed(patches_BHWD)
    else:
        of_prefix = 0 if net.no_embed_class else net.num_prefix_tokens
        resampled_1ND = official_positions(
            net.pos_embed[:, of_prefix:],
            old_grid_hw=built_hw,
            grid_hw=(patches_BHWD.shape[1], patches_BHWD.shape[2]),
            by_size=interpolation == "bicubic",
        )
        prefix = [
            token.expand(patches_BHWD.shape[0], -1, -1)  # not len(): exports keep the batch open
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
        tokens = net.pos_drop(tokens + torch.cat([before_1PD, resampled_1ND], dim=1))
    embedded: Tensor = net.norm_pre(net.patch_drop(tokens))
    return embedded


def ends_in_class_token(net: Any) -> bool:  # noqa: ANN401  any module
    """Says whether only the class token of the last block is used, and the block is one that we know.

    Subclasses lay their tokens out in other ways; so does a block that is sharded over processes.
    """
    if type(net) is not VisionTransformer or not len(net.blocks) or net.grad_checkpointing:
        return False
    known: Any = net
    last = known.blocks[-1]
    pools = known.global_pool == "token" and known.attn_pool is None and known.cls_token is not None
    return bool(pools and type(last) is Block and type(last.attn) is Attention and last.attn.fused_attn)


def class_token(
    net: Any,  # noqa: ANN401  untyped
    images_BCHW: Tensor,
    *,
    interpolation: PositionInterpolation,
) -> Tensor:
    """The class token after the last norm [B, 1, D], without what nobody looks at.

    In the last block all tokens are keys and values, but only the class token asks, and only it goes through
    the projection and the MLP: five sixths of the products of that block, a fourteenth of those of a network
    of twelve, would compute tokens that are thrown away. Numbers, gradients and dropped paths are the same.

    Args:
        net: One for which `ends_in_class_token` is true.
        images_BCHW: Normalised.
        interpolation: As for `embedded_patches`.
    """
    tokens_BND = net.blocks[:-1](embedded_patches(net, images_BCHW, interpolation=interpolation))
    block = net.blocks[-1]
    asking_B1D = tokens_BND[:, :1]
    looked_B1D = _looked_up(block.attn, block.norm1(tokens_BND))
    asking_B1D = asking_B1D + block.drop_path1(block.ls1(looked_B1D))
    asking_B1D = asking_B1D + block.drop_path2(block.ls2(block.mlp(block.norm2(asking_B1D))))
    normed: Tensor = net.norm(asking_B1D)
    return normed


def _looked_up(attention: Any, tokens_BND: Tensor) -> Tensor:  # noqa: ANN401  untyped
    """`Attention.forward` for the first token only."""
    batch, count, _ = tokens_BND.shape
    width, heads = attention.attn_dim, attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    of_query, of_both = (None, None) if bias is None else (bias[:width], bias[width:])
    query = functional.linear(tokens_BND[:, :1], weight[:width], of_query)
    both = functional.linear(tokens_BND, weight[width:], of_both)
    query_BQ1E = query.view(batch, 1, heads, -1).transpose(1, 2)
    key_BQNE, value_BQNE = both.view(batch, count, 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    looked_BQ1E = functional.scaled_dot_product_attention(
        attention.q_norm(query_BQ1E),
        attention.k_norm(key_BQNE),
        value_BQNE,
        dropout_p=attention.attn_drop.p if attention.training else 0.0,
    )
    looked_B1D = attention.norm(looked_BQ1E.transpose(1, 2).reshape(batch, 1, width))
    if attention.gate is not None:
        looked_B1D = looked_B1D * attention.gate(tokens_BND[:, :1]).sigmoid()
    projected: Tensor = attention.proj_drop(attention.proj(looked_B1D))
    return projected


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
