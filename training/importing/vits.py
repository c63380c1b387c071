"""Vision transformers of the DINO family as their authors' code saves them -> timm's names.

    DINO       as timm's, tensor by tensor
    DINOv2     LayerScale `ls1.gamma`; `register_tokens`; SwiGLU `mlp.w12`, `mlp.w3`; blocks perhaps in chunks
    DINOv3     RoPE in place of positions; `storage_tokens`; SwiGLU `mlp.w1`, `w2`, `w3`; keys without bias

References: the state dicts of https://github.com/facebookresearch/dino, /dinov2 and /dinov3, and timm's
networks `vit_*_dinov2` and `vit_*_dinov3`, which compute the same.

Dimension key: D embedding · N positions
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from training.errors import ConfigError
from training.importing.naming import Named, Rules, renamed, some, without

ROPE_BASE = 100.0
_MASK = "only training with masked patches uses it"
_CLASSIFIER = "a classifier's, for which an embedding has no use"
_IGNORED: Rules = (
    (r"mask_token", _MASK),
    (r"head\.(weight|bias)|linear_head\..*|head_dist\.(weight|bias)", _CLASSIFIER),
)
_IGNORED_V3: Rules = (
    *_IGNORED,
    (r"rope_embed\.periods|rope\.periods", "worked out again: it is a formula of the size"),
    (r"local_cls_norm\..*", "only training's local crops use it"),
    (r"blocks\.\d+\.attn\.qkv\.bias_mask", "says that keys have no bias, as timm's network knows"),
)
_V2: Rules = (
    # Chunks of blocks, for FSDP; the second number counts through all of them.
    (r"blocks\.\d+\.(\d+)\.mlp\.w12\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (r"blocks\.\d+\.(\d+)\.mlp\.w3\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (r"blocks\.\d+\.(\d+)\.(.*)", r"blocks.\1.\2"),
    (r"(blocks\.\d+)\.mlp\.w12\.(.*)", r"\1.mlp.fc1.\2"),
    (r"(blocks\.\d+)\.mlp\.w3\.(.*)", r"\1.mlp.fc2.\2"),
    (r"register_tokens", "reg_token"),
)
_V3: Rules = (
    (r"storage_tokens", "reg_token"),
    (r"(blocks\.\d+)\.ls([12])\.gamma", r"\1.gamma_\2"),
    (r"(blocks\.\d+)\.mlp\.w1\.(.*)", r"\1.mlp.fc1_g.\2"),
    (r"(blocks\.\d+)\.mlp\.w2\.(.*)", r"\1.mlp.fc1_x.\2"),
    (r"(blocks\.\d+)\.mlp\.w3\.(.*)", r"\1.mlp.fc2.\2"),
)


def is_vit(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of a vision transformer, as the official codes or timm name them."""
    return "patch_embed.proj.weight" in tensors and any(
        re.match(r"blocks\.(\d+\.)?\d+\.attn\.qkv\.weight$", name) for name in tensors
    )


def is_dinov3(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the authors' DINOv3 saved them."""
    return "pos_embed" not in tensors and any(name.endswith("ls1.gamma") for name in tensors)


def family_of(tensors: Mapping[str, Tensor]) -> str:
    """What to call a vision transformer, by timm's names of its tensors."""
    if "blocks.0.gamma_1" in tensors:
        return "DINOv3"
    return "DINOv2" if "blocks.0.ls1.gamma" in tensors else "DINO"


def named_vit(tensors: Mapping[str, Tensor]) -> Named:
    """Gives a vision transformer's tensors timm's names.

    Raises:
        ConfigError: There are values that timm's network would compute something else with.
    """
    if is_dinov3(tensors):
        return _named_dinov3(tensors)
    kept, ignored = without(tensors, _IGNORED)
    result = renamed(kept, _V2)
    if "register_tokens" in kept and "pos_embed" in result and "cls_token" in result:
        # Registers have no positions, and timm's network then has none for the class token either.
        result["cls_token"] = result["cls_token"] + result["pos_embed"][:, :1]
        result["pos_embed"] = result["pos_embed"][:, 1:]
    return Named(tensors=result, ignored=ignored, renamed=len(set(kept) - set(result)))


def _named_dinov3(tensors: Mapping[str, Tensor]) -> Named:
    kept, ignored = without(tensors, _IGNORED_V3)
    _check_periods(tensors)
    biases = {name: bias for name, bias in kept.items() if name.endswith("attn.qkv.bias")}
    result = renamed({name: tensor for name, tensor in kept.items() if name not in biases}, _V3)
    thirds = {name: bias.chunk(3) for name, bias in biases.items()}
    for name, (_, of_keys, _) in thirds.items():
        # With RoPE a bias of the keys would turn with them, and count. The mask takes it away.
        if f"{name}_mask" not in tensors and of_keys.count_nonzero():
            raise ConfigError(f"{name} has a bias of the keys, and DINOv3 has none: it is another network")
    if any(
        of_queries.count_nonzero() or of_values.count_nonzero()
        for of_queries, _, of_values in thirds.values()
    ):
        for name, (of_queries, _, of_values) in thirds.items():
            attention = name.removesuffix("qkv.bias")
            result[f"{attention}q_bias"], result[f"{attention}v_bias"] = of_queries, of_values
    else:
        ignored |= dict.fromkeys(biases, "nought in all of them, so that it adds nothing")
    return Named(tensors=result, ignored=ignored, renamed=len(set(kept) - set(result) - set(ignored)))


def _check_periods(tensors: Mapping[str, Tensor]) -> None:
    """Holds the rotation's periods, where they are saved, against the only ones that timm's networks have."""
    for name in ("rope_embed.periods", "rope.periods"):
        if name in tensors:
            found = tensors[name].float()
            expected = ROPE_BASE ** (torch.arange(len(found)) / len(found))
            # Some are saved in bfloat16, with 8 bits.
            if not torch.allclose(found, expected, rtol=2**-7):
                raise ConfigError(
                    f"{some([name])} are {found[:3].tolist()}…, and those of DINOv3 are "
                    f"{expected[:3].tolist()}…: timm has no network that rotates so"
                )
