"""Directories of Hugging Face's transformers -> timm's names: ViT, DINOv2, DINOv3 and ResNet.

    config.json                what the network is
    model.safetensors          its tensors, perhaps in parts; or pytorch_model.bin
    preprocessor_config.json   what its images are

Names become those of the authors' code first, then timm's (`vits`). Queries, keys and values become one
tensor.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import ConfigError
from training.importing.naming import Named, Rules, renamed, some, without
from training.importing.vits import named_vit

MODEL_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "resnet")
_CLASSIFIER = "a classifier's, for which an embedding has no use"
_IGNORED: Rules = (
    (r"classifier\..*", _CLASSIFIER),
    (r"pooler\..*", "it comes after the class token, which is the embedding"),
)
_BLOCK = r"encoder\.layer\.(\d+)\."
_VIT: Rules = (
    (r"embeddings\.(cls_token|mask_token|register_tokens)", r"\1"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.(.*)", r"patch_embed.proj.\1"),
    (_BLOCK + r"(?:norm1|layernorm_before)\.(.*)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"(?:norm2|layernorm_after)\.(.*)", r"blocks.\1.norm2.\2"),
    (_BLOCK + r"attention\.attention\.(query|key|value)\.(.*)", r"blocks.\1.attn.\2.\3"),
    (_BLOCK + r"attention\.output\.dense\.(.*)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (_BLOCK + r"(?:mlp\.fc1|intermediate\.dense)\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"(?:mlp\.fc2|output\.dense)\.(.*)", r"blocks.\1.mlp.fc2.\2"),
    (_BLOCK + r"mlp\.weights_in\.(.*)", r"blocks.\1.mlp.w12.\2"),
    (_BLOCK + r"mlp\.weights_out\.(.*)", r"blocks.\1.mlp.w3.\2"),
    (r"layernorm\.(.*)", r"norm.\1"),
)
_LAYER = r"(?:model\.)?layer\.(\d+)\."
_DINOV3: Rules = (
    (r"embeddings\.(cls_token|mask_token)", r"\1"),
    (r"embeddings\.register_tokens", "storage_tokens"),
    (r"embeddings\.patch_embeddings\.(.*)", r"patch_embed.proj.\1"),
    (_LAYER + r"norm([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (_LAYER + r"attention\.q_proj\.(.*)", r"blocks.\1.attn.query.\2"),
    (_LAYER + r"attention\.k_proj\.(.*)", r"blocks.\1.attn.key.\2"),
    (_LAYER + r"attention\.v_proj\.(.*)", r"blocks.\1.attn.value.\2"),
    (_LAYER + r"attention\.o_proj\.(.*)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
)
_PLAIN_MLP: Rules = (
    (_LAYER + r"mlp\.up_proj\.(.*)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"mlp\.down_proj\.(.*)", r"blocks.\1.mlp.fc2.\2"),
)
_GATED_MLP: Rules = (
    (_LAYER + r"mlp\.gate_proj\.(.*)", r"blocks.\1.mlp.w1.\2"),
    (_LAYER + r"mlp\.up_proj\.(.*)", r"blocks.\1.mlp.w2.\2"),
    (_LAYER + r"mlp\.down_proj\.(.*)", r"blocks.\1.mlp.w3.\2"),
)
# LayerNorm's epsilon in timm's networks.
_EPSILON = {"vit": 1e-6, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}


def named_transformers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Named:
    """Gives the tensors of a model of transformers timm's names.

    Args:
        tensors: As saved; a model with a head on top has the network under `vit.`, `dinov2.`…
        config: config.json.

    Raises:
        ConfigError: Tensors are there that such a model does not have.
    """
    bare = {
        re.sub(r"^(vit|dinov2|dinov2_with_registers|dinov3_vit|resnet)\.", "", k): t
        for k, t in tensors.items()
    }
    kept, ignored = without(bare, _IGNORED)
    if config["model_type"] == "resnet":
        result = renamed(kept, _resnet_rules(config))
    elif config["model_type"] == "dinov3_vit":
        result = renamed(kept, (*_DINOV3, *(_GATED_MLP if config.get("use_gated_mlp") else _PLAIN_MLP)))
        result = _joined(result)
    else:
        result = _joined(renamed(kept, _VIT))
    if config["model_type"] == "resnet":
        return Named(tensors=result, ignored=ignored, renamed=len(set(kept) - set(result)))
    official = named_vit(result)
    return Named(
        tensors=official.tensors,
        ignored=ignored
        | {name: why for name, why in official.ignored.items() if not name.endswith("qkv.bias")},
        renamed=len(set(kept) - set(official.tensors) - set(official.ignored)),
    )


def refuse_other_computation(config: Mapping[str, Any], *, source: str) -> tuple[str, ...]:
    """Looks for settings with which timm's network would compute something else.

    Returns:
        Notes: what differs by less than anybody sees.

    Raises:
        ConfigError: There is one.
    """
    kind = config["model_type"]
    expected: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "num_channels": (3,)}
    if kind == "resnet":
        expected |= {
            "hidden_act": ("relu",),
            "downsample_in_bottleneck": (False,),
            "downsample_in_first_stage": (False,),
        }
    if kind == "dinov3_vit":
        expected |= {
            "key_bias": (False,),
            "rope_theta": (100, 100.0),
            "mlp_bias": (True,),
            "proj_bias": (True,),
        }
        if config.get("use_gated_mlp"):
            expected["hidden_act"] = ("silu",)
    elif config.get("use_swiglu_ffn"):
        del expected["hidden_act"]  # SwiGLU has its own
    for setting, allowed in expected.items():
        found = config.get(setting, allowed[0])
        if found not in allowed:
            raise ConfigError(
                f"{source} has {setting} {found!r} in its config.json, and timm's network {allowed[0]!r}: "
                "it would compute something else"
            )
    if kind not in _EPSILON:
        return ()
    ours, theirs = _EPSILON[kind], float(config.get("layer_norm_eps", _EPSILON[kind]))
    if abs(ours - theirs) > 1e-6:
        raise ConfigError(
            f"{source} adds {theirs:g} in its layer norms, and timm's network {ours:g}: it would compute "
            "something else"
        )
    if ours != theirs:
        return (f"the source adds {theirs:g} in its layer norms, timm's network {ours:g}",)
    return ()


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one tensor; keys without a bias get one of nought."""
    result = {
        name: tensor for name, tensor in tensors.items() if not re.search(r"\.(query|key|value)\.", name)
    }
    for name, tensor in tensors.items():
        if ".attn.query." in name:
            parts = [tensors.get(name.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
            result[name.replace(".query.", ".qkv.")] = torch.cat(
                [torch.zeros_like(tensor) if part is None else part for part in parts]
            )
    return result


def _resnet_rules(config: Mapping[str, Any]) -> Rules:
    first = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
    stages = range(len(config["depths"]))
    rules: list[tuple[str, str]] = [
        (r"embedder\.embedder\.convolution\.(.*)", r"conv1.\1"),
        (r"embedder\.embedder\.normalization\.(.*)", r"bn1.\1"),
    ]
    for stage in stages:
        here = first.replace(r"(\d+)", str(stage), 1)
        there = rf"layer{stage + 1}.\1."
        rules += [
            (here + r"shortcut\.convolution\.(.*)", there + r"downsample.0.\2"),
            (here + r"shortcut\.normalization\.(.*)", there + r"downsample.1.\2"),
        ]
        for index in range(3):
            rules += [
                (here + rf"layer\.{index}\.convolution\.(.*)", there + rf"conv{index + 1}.\2"),
                (here + rf"layer\.{index}\.normalization\.(.*)", there + rf"bn{index + 1}.\2"),
            ]
    return rules


def refuse_other_kinds(config: Mapping[str, Any], *, source: Path | str) -> None:
    """Refuses models of transformers that are none of ours.

    Raises:
        ConfigError: It is one.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"{source} is a model of the type {kind!r} in transformers, and those that are known are "
            f"{some(MODEL_TYPES[:3])}, {', '.join(MODEL_TYPES[3:])}: look for a version of it in timm, "
            "timm:NAME"
        )
