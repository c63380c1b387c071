"""timm's networks as transformers' models: configuration and names of the tensors.

What transformers has no equal of is refused. The names are those of the files on its hub; it knows others
inside.

Dimension key: D embedding · N positions · P prefix tokens
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dino_core.backbones import Backbone
from dino_core.errors import ConversionError
from dino_core.vit import official_positions
from training.importing.architecture import positions_px
from training.importing.naming import Rules, renamed
from training.importing.vits import family_of

_BLOCK = r"blocks\.(\d+)\."
_LAYER = r"encoder.layer.\1."
_VIT: Rules = (
    (r"(cls_token)", r"embeddings.\1"),
    (r"reg_token", "embeddings.register_tokens"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embeddings.projection.\1"),
    (_BLOCK + r"attn\.(query|key|value)\.(.*)", _LAYER + r"attention.attention.\2.\3"),
    (_BLOCK + r"attn\.proj\.(.*)", _LAYER + r"attention.output.dense.\2"),
    (_BLOCK + r"ls([12])\.gamma", _LAYER + r"layer_scale\2.lambda1"),
    (r"norm\.(.*)", r"layernorm.\1"),
)
_OF_VIT: Rules = (
    (_BLOCK + r"norm1\.(.*)", _LAYER + r"layernorm_before.\2"),
    (_BLOCK + r"norm2\.(.*)", _LAYER + r"layernorm_after.\2"),
    (_BLOCK + r"mlp\.fc1\.(.*)", _LAYER + r"intermediate.dense.\2"),
    (_BLOCK + r"mlp\.fc2\.(.*)", _LAYER + r"output.dense.\2"),
)
_OF_DINOV2: Rules = (
    (_BLOCK + r"norm([12])\.(.*)", _LAYER + r"norm\2.\3"),
    (_BLOCK + r"mlp\.fc([12])\.(.*)", _LAYER + r"mlp.fc\2.\3"),
)
_OF_SWIGLU: Rules = (
    (_BLOCK + r"norm([12])\.(.*)", _LAYER + r"norm\2.\3"),
    (_BLOCK + r"mlp\.fc1\.(.*)", _LAYER + r"mlp.weights_in.\2"),
    (_BLOCK + r"mlp\.fc2\.(.*)", _LAYER + r"mlp.weights_out.\2"),
)
_OF_DINOV3: Rules = (
    (r"(cls_token)", r"embeddings.\1"),
    (r"reg_token", "embeddings.register_tokens"),
    (r"patch_embed\.proj\.(.*)", r"embeddings.patch_embeddings.\1"),
    (_BLOCK + r"norm([12])\.(.*)", r"layer.\1.norm\2.\3"),
    (_BLOCK + r"gamma_([12])", r"layer.\1.layer_scale\2.lambda1"),
    (_BLOCK + r"attn\.query\.(.*)", r"layer.\1.attention.q_proj.\2"),
    (_BLOCK + r"attn\.key\.(.*)", r"layer.\1.attention.k_proj.\2"),
    (_BLOCK + r"attn\.value\.(.*)", r"layer.\1.attention.v_proj.\2"),
    (_BLOCK + r"attn\.proj\.(.*)", r"layer.\1.attention.o_proj.\2"),
    (_BLOCK + r"attn\.q_bias", r"layer.\1.attention.q_proj.bias"),
    (_BLOCK + r"attn\.v_bias", r"layer.\1.attention.v_proj.bias"),
    (_BLOCK + r"mlp\.fc1_g\.(.*)", r"layer.\1.mlp.gate_proj.\2"),
    (_BLOCK + r"mlp\.fc1_x\.(.*)", r"layer.\1.mlp.up_proj.\2"),
    (_BLOCK + r"mlp\.fc1\.(.*)", r"layer.\1.mlp.up_proj.\2"),
    (_BLOCK + r"mlp\.fc2\.(.*)", r"layer.\1.mlp.down_proj.\2"),
)


def as_transformers(backbone: Backbone, *, crop_px: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Describes a backbone as a model of transformers.

    Args:
        backbone: A plain ViT, DINOv2 (also with registers or SwiGLU), DINOv3 or ResNet.
        crop_px: The size at which both have to agree; a table of positions is resampled to it.

    Returns:
        config.json, and the tensors.

    Raises:
        ConversionError: transformers has no such model.
    """
    network = backbone.network
    if isinstance(network, ResNet):
        return _resnet(network, backbone.architecture)
    tensors = network.state_dict()
    plain = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    if not plain <= set(tensors) or "blocks.0.attn.qkv.weight" not in tensors:
        raise _unknown(backbone.architecture)
    if "blocks.0.gamma_1" in tensors and "pos_embed" not in tensors and "reg_token" in tensors:
        return _dinov3(network, tensors, crop_px=crop_px)
    if type(network) is VisionTransformer and "pos_embed" in tensors:
        return _vit(backbone, tensors, crop_px=crop_px)
    raise _unknown(backbone.architecture)


def _vit(
    backbone: Backbone, tensors: Mapping[str, Tensor], *, crop_px: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    network: Any = backbone.network
    parts = _with_positions(backbone, tensors, crop_px=crop_px)
    first, last = tensors["blocks.0.mlp.fc1.weight"], tensors["blocks.0.mlp.fc2.weight"]
    gated = first.shape[0] != last.shape[1]
    config = {
        **_sizes(network, tensors, crop_px=crop_px),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    }
    if family_of(tensors) == "DINO":
        if gated or "reg_token" in tensors:
            raise _unknown(backbone.architecture)
        config |= {"model_type": "vit", "architectures": ["ViTModel"], "intermediate_size": first.shape[0]}
        return config, renamed(_split(parts), (*_OF_VIT, *_VIT))
    ratio = _mlp_ratio(last.shape[1], network.embed_dim, gated=gated)
    if ratio is None:
        raise _unknown(backbone.architecture)
    config |= {"mlp_ratio": ratio, "use_swiglu_ffn": gated}
    has_registers = "reg_token" in tensors
    config |= {
        "model_type": "dinov2_with_registers" if has_registers else "dinov2",
        "architectures": ["Dinov2WithRegistersModel" if has_registers else "Dinov2Model"],
        **({"num_register_tokens": tensors["reg_token"].shape[1]} if has_registers else {}),
    }
    result = renamed(_split(parts), (*(_OF_SWIGLU if gated else _OF_DINOV2), *_VIT))
    result["embeddings.mask_token"] = torch.zeros(1, network.embed_dim)
    return config, result


def _dinov3(
    network: Any,  # noqa: ANN401  untyped
    tensors: Mapping[str, Tensor],
    *,
    crop_px: int,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    gated = "blocks.0.mlp.fc1_g.weight" in tensors
    has_bias = "blocks.0.attn.q_bias" in tensors
    config = {
        **_sizes(network, tensors, crop_px=crop_px),
        "model_type": "dinov3_vit",
        "architectures": ["DINOv3ViTModel"],
        "intermediate_size": tensors["blocks.0.mlp.fc2.weight"].shape[1],
        "num_register_tokens": tensors["reg_token"].shape[1],
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "query_bias": has_bias,
        "value_bias": has_bias,
        "key_bias": False,
    }
    result = renamed(_split(tensors), _OF_DINOV3)
    result["embeddings.mask_token"] = torch.zeros(1, 1, network.embed_dim)
    return config, result


def _resnet(network: ResNet, architecture: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = dict(network.state_dict())
    stages: list[Any] = [network.layer1, network.layer2, network.layer3, network.layer4]
    blocks = [block for stage in stages for block in stage]
    kind = type(blocks[0])
    if kind not in (BasicBlock, Bottleneck) or any(block.se is not None for block in blocks):
        raise _unknown(architecture)
    config = {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "layer_type": "basic" if kind is BasicBlock else "bottleneck",
        "embedding_size": tensors["conv1.weight"].shape[0] if "conv1.weight" in tensors else 0,
        "hidden_sizes": [
            block[-1].bn3.num_features if kind is Bottleneck else block[-1].bn2.num_features
            for block in stages
        ],
        "depths": [len(stage) for stage in stages],
        "hidden_act": "relu",
        "dtype": "float32",
    }
    rules: list[tuple[str, str]] = [
        (r"conv1\.(.*)", r"embedder.embedder.convolution.\1"),
        (r"bn1\.(.*)", r"embedder.embedder.normalization.\1"),
    ]
    for number in range(4):
        here, there = rf"layer{number + 1}\.(\d+)\.", rf"encoder.stages.{number}.layers.\1."
        rules += [
            (here + r"downsample\.0\.(.*)", there + r"shortcut.convolution.\2"),
            (here + r"downsample\.1\.(.*)", there + r"shortcut.normalization.\2"),
        ]
        for index in range(3):
            rules += [
                (here + rf"conv{index + 1}\.(.*)", there + rf"layer.{index}.convolution.\2"),
                (here + rf"bn{index + 1}\.(.*)", there + rf"layer.{index}.normalization.\2"),
            ]
    return config, renamed(tensors, rules)


def _mlp_ratio(hidden: int, width: int, *, gated: bool) -> int | None:
    """The whole number from which transformers makes the hidden width; None if there is none.

    A SwiGLU gets two thirds of what the ratio says, rounded up to a multiple of 8.
    """
    for ratio in range(1, 17):
        made = -(-int(width * ratio * 2 / 3) // 8) * 8 if gated else width * ratio
        if made == hidden:
            return ratio
    return None


def _sizes(
    network: Any,  # noqa: ANN401  untyped
    tensors: Mapping[str, Tensor],
    *,
    crop_px: int,
) -> dict[str, Any]:
    return {
        "hidden_size": network.embed_dim,
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": network.blocks[0].attn.num_heads,
        "patch_size": tensors["patch_embed.proj.weight"].shape[-1],
        "image_size": crop_px,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": network.norm.eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": "float32",
    }


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as tensors of their own."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[name.replace(".qkv.", f".{part}.")] = third.clone()
        else:
            result[name] = tensor
    return result


def _with_positions(backbone: Backbone, tensors: Mapping[str, Tensor], *, crop_px: int) -> dict[str, Tensor]:
    """The tensors with positions for the crop, as the backbone resamples them."""
    network: Any = backbone.network
    table_1ND = tensors["pos_embed"]
    prefix = 0 if network.no_embed_class else 1
    built = network.patch_embed.grid_size
    side = crop_px // network.patch_embed.patch_size[0]
    native_px = positions_px(tensors)
    if native_px is None and not prefix:
        raise _unknown(backbone.architecture)
    patches_1ND = table_1ND[:, prefix:]
    if built != (side, side):
        patches_1ND = _resampled(backbone, patches_1ND, built_hw=built, side=side)
    of_class_11D = table_1ND[:, :1] if prefix else torch.zeros_like(table_1ND[:, :1])
    return {**tensors, "pos_embed": torch.cat([of_class_11D, patches_1ND], dim=1)}


def _resampled(backbone: Backbone, patches_1ND: Tensor, *, built_hw: tuple[int, int], side: int) -> Tensor:
    if backbone.position_interpolation != "antialias":
        by_size = backbone.position_interpolation == "bicubic"
        return official_positions(patches_1ND, old_grid_hw=built_hw, grid_hw=(side, side), by_size=by_size)
    map_1DHW = patches_1ND.reshape(1, *built_hw, -1).movedim(3, 1)
    resampled_1DHW = torch.nn.functional.interpolate(
        map_1DHW, size=(side, side), mode="bicubic", antialias=True
    )
    return resampled_1DHW.movedim(1, 3).flatten(1, 2)


def _unknown(architecture: str) -> ConversionError:
    return ConversionError(
        f"transformers has no model that computes what timm's {architecture} does; it has plain ViTs, "
        "DINOv2, DINOv3 and ResNets: export to ONNX with --onnx, or open the bundle with timm"
    )
