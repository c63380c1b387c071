"""Which of timm's networks tensors are, by their names and shapes.

Nothing in a ViT's tensors tells its number of attention heads: for the widths of the published models it is
known, for others the user has to say it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from dino_core.backbones import make_backbone
from dino_core.errors import BackboneError
from training.errors import ConfigError
from training.importing.naming import some
from training.importing.vits import family_of

# Width and depth of the published sizes, by family and by whether the MLP is gated (SwiGLU); the first of
# each is what networks of other sizes are built from.
_SIZES = {
    ("DINO", False): {"small": (384, 12), "tiny": (192, 12), "base": (768, 12), "large": (1024, 24)},
    ("DINOv2", False): {"small": (384, 12), "base": (768, 12), "large": (1024, 24)},
    ("DINOv2", True): {"giant": (1536, 40)},
    ("DINOv3", False): {"small": (384, 12), "base": (768, 12), "large": (1024, 24)},
    ("DINOv3", True): {"small_plus": (384, 12), "huge_plus": (1280, 32), "7b": (4096, 40)},
}
_WIDTHS = sorted({width for sizes in _SIZES.values() for width, _ in sizes.values()})
_PER_HEAD = {4096: 128}  # the 7B model; all others have 64 dimensions a head
_RESNETS = (
    "resnet50",
    "resnet18",
    "resnet34",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
# One of each family, to say what unknown tensors are nearest to.
_REPRESENTATIVES = (
    *("vit_base_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3_qkvb", "resnet50"),
    *(
        "resnet18",
        "convnext_tiny",
        "efficientnet_b0",
        "swin_tiny_patch4_window7_224",
        "mobilenetv3_large_100",
    ),
    *(
        "regnety_008",
        "densenet121",
        "vgg16",
        "mixer_b16_224",
        "xcit_small_12_p16_224",
        "beit_base_patch16_224",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A network of timm's.

    Attributes:
        name: timm's.
        model_kwargs: What is other than timm has it.
        image_size_px: What its positions are for; None where it has none.
    """

    name: str
    model_kwargs: dict[str, Any]
    image_size_px: int | None = None


def recognised(tensors: Mapping[str, Tensor], *, heads: int | None, source: str) -> Architecture:
    """Recognises a network.

    Args:
        tensors: By timm's names.
        heads: Attention heads, where the user or a configuration says it.
        source: For the message.

    Raises:
        ConfigError: It is none that is known by its tensors, or the heads are.
    """
    if "patch_embed.proj.weight" in tensors and "blocks.0.attn.qkv.weight" in tensors:
        return _vit(tensors, heads=heads, source=source)
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return _resnet(tensors, source=source)
    raise ConfigError(f"{source} has tensors {some(tensors)}, and {_nearest(tensors)}")


def positions_px(tensors: Mapping[str, Tensor]) -> int | None:
    """The size that a ViT's table of positions is for; None where it has none."""
    table, patches = tensors.get("pos_embed"), tensors.get("patch_embed.proj.weight")
    if table is None or patches is None or table.ndim != 3:
        return None
    count = table.shape[1] if "reg_token" in tensors else table.shape[1] - 1
    return math.isqrt(count) * int(patches.shape[-1]) if math.isqrt(count) ** 2 == count else None


def checked(tensors: Mapping[str, Tensor], architecture: Architecture, *, source: str) -> None:
    """Makes sure that the tensors are those of the network: all of them, of its shapes, and no others.

    Raises:
        ConfigError: They are not; the message names the first.
    """
    expected = _built(architecture).state_dict()
    if missing := set(expected) - set(tensors):
        raise ConfigError(
            f"{source} lacks {some(missing)} of {architecture.name}: {_advice(tensors, architecture.name)}"
        )
    if extra := set(tensors) - set(expected):
        raise ConfigError(
            f"{source} has {some(extra)}, which {architecture.name} has not: "
            f"{_advice(tensors, architecture.name)}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ConfigError(
                f"{name} in {source} is {list(tensor.shape)}, and {list(expected[name].shape)} in "
                f"{architecture.name}: {_advice(tensors, architecture.name)}"
            )


def _vit(tensors: Mapping[str, Tensor], *, heads: int | None, source: str) -> Architecture:
    width, channels, _, patch_px = tensors["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    name = _vit_name(tensors, width=width, depth=depth, patch_px=patch_px)
    known: Any = _built(Architecture(name=name, model_kwargs={}))
    is_v3, first = family_of(tensors) == "DINOv3", _first_of_mlp(tensors)
    if heads is None and width not in _WIDTHS:
        raise ConfigError(
            f"{source} is a ViT of width {width}, depth {depth} and patch {patch_px}, and its tensors do "
            "not tell its attention heads, which are known for the published widths "
            f"({', '.join(map(str, _WIDTHS))}): give --heads"
        )
    heads = heads or width // _PER_HEAD.get(width, 64)
    if width % heads:
        raise ConfigError(
            f"{source} is a ViT of width {width}, which {heads} heads cannot share: give --heads"
        )
    registers_name = "num_reg_tokens" if is_v3 else "reg_tokens"
    found: dict[str, Any] = {
        "in_chans": channels,
        "patch_size": patch_px,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": _ratio(tensors[first].shape[0], width),
        registers_name: registers,
        "qkv_bias": _has_bias(tensors),
    }
    theirs = known.state_dict()
    have: dict[str, Any] = {
        "in_chans": 3,
        "patch_size": known.patch_embed.patch_size[0],
        "embed_dim": known.embed_dim,
        "depth": len(known.blocks),
        "num_heads": known.blocks[0].attn.num_heads,
        "mlp_ratio": _ratio(theirs[first].shape[0], known.embed_dim),
        registers_name: theirs["reg_token"].shape[1] if "reg_token" in theirs else 0,
        "qkv_bias": _has_bias(theirs),
    }
    kwargs = {key: value for key, value in found.items() if value != have[key]}
    if is_v3:  # timm's own default is the mean of the patches, and the authors take the class token
        kwargs["global_pool"] = "token"
    return Architecture(name=name, model_kwargs=kwargs, image_size_px=positions_px(tensors))


def _vit_name(tensors: Mapping[str, Tensor], *, width: int, depth: int, patch_px: int) -> str:
    """Timm's name of the published network, or of one that differs in sizes only."""
    family = family_of(tensors)
    first, last = tensors[_first_of_mlp(tensors)], tensors["blocks.0.mlp.fc2.weight"]
    gated = "fc1_g" in _first_of_mlp(tensors) or first.shape[0] != last.shape[1]
    sizes = _SIZES[family, gated and family != "DINO"]
    size = next((size for size, shape in sizes.items() if shape == (width, depth)), next(iter(sizes)))
    match family:
        case "DINOv3":
            has_bias = "blocks.0.attn.q_bias" in tensors and size != "7b"
            return f"vit_{size}_patch16_dinov3{'_qkvb' if has_bias else ''}"
        case "DINOv2":
            return f"vit_{size}_patch14{'_reg4' if 'reg_token' in tensors else ''}_dinov2"
        case _:
            name = f"vit_{size}_patch{patch_px}_224"
            return name if timm.is_model(name) else f"vit_{size}_patch16_224"


def _has_bias(tensors: Mapping[str, Tensor]) -> bool:
    """Whether queries have a bias; DINOv3's are tensors of their own."""
    return "blocks.0.attn.qkv.bias" in tensors or "blocks.0.attn.q_bias" in tensors


def _first_of_mlp(tensors: Mapping[str, Tensor]) -> str:
    gated = "blocks.0.mlp.fc1_g.weight"
    return gated if gated in tensors else "blocks.0.mlp.fc1.weight"


def _ratio(hidden: int, width: int) -> float:
    """What timm turns back into the hidden width: it computes int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _resnet(tensors: Mapping[str, Tensor], *, source: str) -> Architecture:
    layers = [
        len({name.split(".")[1] for name in tensors if name.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    ]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name in _RESNETS:
        known = Architecture(name=name, model_kwargs={})
        if shapes == {key: tensor.shape for key, tensor in _built(known).state_dict().items()}:
            return known
    for name in _RESNETS:  # another number of blocks, of a known kind
        other = Architecture(name=name, model_kwargs={"layers": layers})
        if shapes == {key: tensor.shape for key, tensor in _built(other).state_dict().items()}:
            return other
    raise ConfigError(
        f"{source} is a ResNet of {' + '.join(map(str, layers))} blocks that is none of "
        f"{', '.join(_RESNETS)}: give --name with timm's name of it"
    )


def _built(architecture: Architecture) -> nn.Module:
    """The network without values."""
    arguments = {name: value for name, value in architecture.model_kwargs.items() if name != "in_chans"}
    with torch.device("meta"):
        return make_backbone(
            architecture.name,
            image_size_px=architecture.image_size_px or 224,
            in_channels=architecture.model_kwargs.get("in_chans", 3),
            model_kwargs=arguments,
        ).network


@cache
def _names_of(architecture: str) -> frozenset[str]:
    return frozenset(_built(Architecture(name=architecture, model_kwargs={})).state_dict())


def _nearest(tensors: Mapping[str, Tensor]) -> str:
    shares = {name: len(_names_of(name) & set(tensors)) for name in _REPRESENTATIVES}
    best = max(shares, key=lambda name: shares[name] / len(_names_of(name) | set(tensors)))
    if not shares[best]:
        return "no network that is known has one of them: give --name with timm's name of the network"
    return (
        f"no network is recognised by them; {best} is nearest, with {shares[best]} of its "
        f"{len(_names_of(best))} names: give --name with timm's name of the network"
    )


def _advice(tensors: Mapping[str, Tensor], name: str) -> str:
    """What else the tensors may be."""
    try:
        other = recognised(tensors, heads=None, source="it")
    except (ConfigError, BackboneError):
        return "give the whole state dict of such a network, or --name with timm's name of another"
    if other.name == name:
        return f"the tensors are nearly those of {name}: give a whole state dict, and nothing else in it"
    return f"the tensors look like {other.name}: leave --name out, or give the right file"
