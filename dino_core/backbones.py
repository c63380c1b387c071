"""Networks that turn images into embeddings: every timm model by name, and any module by one of its layers.

timm builds the network and owns its weights' names; what is added here is one way to ask for the class token,
the patches, the pooled embedding and the attention, at image sizes other than the one that the network was
built for.

Dimension key: B images · C channels · H W pixels · D embedding · N patch tokens · P prefix tokens · Q heads
"""

import difflib
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg, is_model_in_modules, list_models, split_model_name_tag
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_core.errors import BackboneError
from dino_core.vit import (
    LastAttention,
    PositionInterpolation,
    class_token,
    ends_in_class_token,
    resampling_forward_features,
)

Pooling = Literal["cls", "mean", "cls+mean"]
# timm's families that take any image size when asked to.
DYNAMIC_FAMILIES = {"vision_transformer", "vision_transformer_hybrid", "deit", "eva"}


class TimmNetwork(Protocol):
    """What is used of a timm model."""

    num_features: int

    def forward_features(self, x: Tensor) -> Tensor:
        """Gives tokens [B, P + N, D] or maps."""
        ...

    def forward_head(self, x: Tensor) -> Tensor:
        """Pools what `forward_features` gave."""
        ...


@dataclass(frozen=True)
class Features:
    """What a network says of a batch of images.

    Attributes:
        cls_BD: The class token after the last norm; None for networks that have none.
        mean_BD: The network's own pooling where it has no class token, else the mean of the patch tokens.
        patches_BND: Patch tokens, or the cells of the last map, row by row.
        grid_hw: Rows and columns of the patches; their product is N.
    """

    cls_BD: Tensor | None
    mean_BD: Tensor
    patches_BND: Tensor
    grid_hw: tuple[int, int]

    def pooled(self, pooling: Pooling) -> Tensor:
        """Gives one vector an image: [B, D], or [B, 2 D] for "cls+mean"."""
        if pooling == "mean":
            return self.mean_BD
        if self.cls_BD is None:
            raise BackboneError(
                f"pooling {pooling!r} needs a class token, and this network has none: use 'mean'"
            )
        return self.cls_BD if pooling == "cls" else torch.cat([self.cls_BD, self.mean_BD], dim=1)


class Backbone(nn.Module):
    """A timm network without its classifier. Made by `make_backbone`; final.

    Attributes:
        network: The timm module; its state dict is the weights' public form.
        architecture: Its timm name, without a tag.
        model_args: What timm needs besides the name to build it again; JSON values.
        image_size_px: The size that it was built for.
        in_channels: Channels of its images.
        embed_dim: Length of the default embedding.
        default_pooling: What `forward` gives.
        poolings: What `Features.pooled` can give.
        position_interpolation: How learnt positions are resampled for other sizes.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        architecture: str,
        model_args: Mapping[str, Any],
        image_size_px: int,
        in_channels: int,
        position_interpolation: PositionInterpolation,
    ) -> None:
        super().__init__()
        self.network = network
        self.architecture = architecture
        self.model_args = dict(model_args)
        self.image_size_px = image_size_px
        self.in_channels = in_channels
        self.position_interpolation: PositionInterpolation = position_interpolation
        self.embed_dim: int = getattr(network, "head_hidden_size", None) or self._timm.num_features
        self._prefix_tokens: int = getattr(network, "num_prefix_tokens", 0)
        self.default_pooling: Pooling = "cls" if _pools_class_token(network) else "mean"
        self.poolings: tuple[Pooling, ...] = ("mean",)
        if _has_class_token(network):
            self.poolings = ("cls", "mean", "cls+mean")

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return next(self.network.parameters()).dtype

    def dimensions(self, pooling: Pooling) -> int:
        """Length of the vector that `Features.pooled` gives."""
        return 2 * self.embed_dim if pooling == "cls+mean" else self.embed_dim

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Gives the default embedding [B, D] of normalised images, as the timm network does."""
        net = self.network
        if ends_in_class_token(net):
            return self._timm.forward_head(
                class_token(net, images_BCHW, interpolation=self.position_interpolation)
            )
        return self._timm.forward_head(self._encoded(images_BCHW))

    def features(self, images_BCHW: Tensor) -> Features:
        """Gives class token, patches and their grid.

        Args:
            images_BCHW: Normalised; of any size where the network takes any.

        Returns:
            Tensors in the network's dtype.

        Raises:
            BackboneError: The network's output is no grid of patches.
        """
        encoded = self._encoded(images_BCHW)
        own_BD = self._timm.forward_head(encoded)
        if encoded.ndim == 4:
            maps_BHWD = (
                encoded if getattr(self.network, "output_fmt", "NCHW") == "NHWC" else encoded.movedim(1, 3)
            )
            return Features(None, own_BD, maps_BHWD.flatten(1, 2), (maps_BHWD.shape[1], maps_BHWD.shape[2]))
        patches_BND = encoded[:, self._prefix_tokens :]
        grid_hw = self._grid_hw(images_BCHW, patches_BND.shape[1])
        if self.default_pooling == "cls":
            return Features(own_BD, patches_BND.mean(dim=1), patches_BND, grid_hw)
        class_token_BD = encoded[:, 0] if "cls" in self.poolings else None
        return Features(class_token_BD, own_BD, patches_BND, grid_hw)

    def attention(self, images_BCHW: Tensor) -> Tensor:
        """Gives the last block's attention weights.

        Args:
            images_BCHW: Normalised.

        Returns:
            [B, heads, P + N, P + N]; row: the token that looks, column: the token looked at; rows sum to 1.
            Prefix tokens (class, then registers) come first.

        Raises:
            BackboneError: The network has no attention over all its tokens.
        """
        last = LastAttention()
        with last:
            encoded = self._encoded(images_BCHW)
        weights = last.weights()
        if (
            weights is None
            or encoded.ndim != 3
            or weights.shape[0] != len(encoded)
            or (weights.shape[2:] != (encoded.shape[1], encoded.shape[1]))
        ):
            raise BackboneError(
                f"{self.architecture} has no attention over all its patches in the last block: use a ViT"
            )
        return weights

    def attention_maps(self, images_BCHW: Tensor) -> Tensor:
        """Gives how much each patch is looked at in the last block: by the class token, in each head.

        Where no token stands before the patches, by all patches on average.

        Args:
            images_BCHW: Normalised.

        Returns:
            [B, heads, rows, columns]; what prefix tokens are looked at is left out of the sum of 1.

        Raises:
            BackboneError: The network has no attention over all its tokens.
        """
        weights_BQTT = self.attention(images_BCHW)
        prefix = self._prefix_tokens
        grid_hw = self._grid_hw(images_BCHW, weights_BQTT.shape[-1] - prefix)
        looked_BQT = weights_BQTT[:, :, 0] if prefix else weights_BQTT.mean(dim=2)
        return looked_BQT[..., prefix:].reshape(*looked_BQT.shape[:2], *grid_hw)

    @property
    def _timm(self) -> TimmNetwork:
        return cast("TimmNetwork", self.network)

    def _encoded(self, images_BCHW: Tensor) -> Tensor:
        """Runs timm's `forward_features`, with another resampling of positions where asked for."""
        net = self.network
        # Not its subclasses: they lay their tokens out in other ways.
        if self.position_interpolation != "antialias" and type(net) is VisionTransformer:
            return resampling_forward_features(net, images_BCHW, interpolation=self.position_interpolation)
        return self._timm.forward_features(images_BCHW)

    def _grid_hw(self, images_BCHW: Tensor, tokens: int) -> tuple[int, int]:
        height_px, width_px = images_BCHW.shape[2:]
        embed = getattr(self.network, "patch_embed", None)
        if embed is not None and hasattr(embed, "dynamic_feat_size"):
            rows, columns = embed.dynamic_feat_size((height_px, width_px))
        else:
            rows = round(math.sqrt(tokens * height_px / width_px))
            columns = tokens // rows
        if rows * columns != tokens:
            raise BackboneError(f"{self.architecture} gives {tokens} tokens, which are no grid of patches")
        return int(rows), int(columns)


def make_backbone(
    name: str,
    *,
    image_size_px: int = 224,
    in_channels: int = 3,
    drop_path: float = 0.0,
    position_interpolation: PositionInterpolation = "official",
    pretrained_path: Path | str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Backbone:
    """Builds any timm model as a backbone, at any image size.

    Args:
        name: timm's name; a tag after a dot is dropped.
        image_size_px: What learnt positions and windows are made for.
        in_channels: Channels of the images.
        drop_path: Stochastic depth; for the student only, and not recorded.
        position_interpolation: For ViTs with learnt positions, at other sizes: "official" is that of DINO
            (bicubic, no antialias, by a factor), "bicubic" that of transformers' ViT and DINOv2 (the same by
            the size), "antialias" timm's and that of DINOv2 with registers.
        pretrained_path: A safetensors file with exactly the network's tensors; None starts from random
            weights.
        model_kwargs: Further arguments of timm's model (`patch_size`, `embed_dim`, `depth`...); JSON values,
            as bundles record them.

    Returns:
        The network in training mode, on the CPU, in float32.

    Raises:
        BackboneError: No such model, or it does not take these arguments, or the weights are not its own.
    """
    architecture = split_model_name_tag(name)[0]
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, list_models(), n=3)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "`timm.list_models()` lists them"
        raise BackboneError(f"timm {timm.__version__} has no model {name!r}: {hint}")
    model_args = dict(model_kwargs or {})
    if is_model_in_modules(architecture, DYNAMIC_FAMILIES):
        model_args = {"img_size": image_size_px, "dynamic_img_size": True, **model_args}
    elif (cfg := get_pretrained_cfg(architecture)) is not None and cfg.fixed_input_size:
        model_args = {"img_size": image_size_px, **model_args}
    if in_channels != 3:
        model_args["in_chans"] = in_channels
    stochastic_depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path > 0 else {}
    try:
        network = timm.create_model(architecture, num_classes=0, **model_args, **stochastic_depth)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise BackboneError(
            f"timm cannot build {architecture} with {model_args | stochastic_depth}: "
            f"{type(error).__name__} {error}"
        ) from error
    if pretrained_path is not None:
        _load_weights(network, Path(pretrained_path))
    return Backbone(
        network,
        architecture=architecture,
        model_args=model_args,
        image_size_px=image_size_px,
        in_channels=model_args.get("in_chans", 3),
        position_interpolation=position_interpolation,
    )


class HookedBackbone(nn.Module):
    """Any network, cut at one of its layers, as a backbone. Made by `wrap_module`; final.

    Attributes:
        net: The network as given; shared, not copied.
        layer_name: Where it is cut, as in `net.named_modules()`.
        tokens: How a layer that emits [B, N, D] is pooled.
        embed_dim: Length of the embedding.
    """

    def __init__(
        self, net: nn.Module, *, layer_name: str, tokens: Literal["mean", "first"], embed_dim: int
    ) -> None:
        super().__init__()
        self.net = net
        self.layer_name = layer_name
        self.tokens: Literal["mean", "first"] = tokens
        self.embed_dim = embed_dim

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Runs the network up to the layer, and no further, and pools what the layer gives to [B, D].

        Raises:
            BackboneError: The layer never ran, or gave something that is no embedding.
        """
        return _pooled(_output_of(self.net, self.layer_name, images_BCHW), self.layer_name, self.tokens)


def wrap_module(
    net: nn.Module,
    *,
    layer: str | int = -1,
    image_size_px: int = 224,
    in_channels: int = 3,
    embed_dim: int | None = None,
    tokens: Literal["mean", "first"] = "mean",
) -> HookedBackbone:
    """Makes a backbone of any network by the layer whose output is the embedding.

    What the layer emits becomes [B, D]: vectors stay as they are; of tokens [B, N, D] the mean or the first
    (the class token, in most ViTs) is taken; of maps [B, D, H, W] the mean over the map.

    Args:
        net: Any module that takes images; it is shared, not copied.
        layer: A name of `net.named_modules()`, or an index into `net.children()`, negative ones from the end.
        image_size_px: Size of the blank image that is sent through once (in evaluation mode, changing
            nothing) to learn `embed_dim`.
        in_channels: Channels of that image.
        embed_dim: Known length; nothing is sent through then.
        tokens: How tokens are pooled.

    Returns:
        The backbone.

    Raises:
        BackboneError: There is no such layer, or its output is no embedding.
    """
    layer_name = _layer_name(net, layer)
    if embed_dim is None:
        example = next(net.parameters(), torch.empty(0))
        blank = torch.zeros(
            1, in_channels, image_size_px, image_size_px, device=example.device, dtype=example.dtype
        )
        training = [(module, module.training) for module in net.modules()]
        net.eval()
        try:
            with torch.no_grad():
                embed_dim = _pooled(_output_of(net, layer_name, blank), layer_name, tokens).shape[1]
        finally:
            for module, was_training in training:
                module.training = was_training
    return HookedBackbone(net, layer_name=layer_name, tokens=tokens, embed_dim=embed_dim)


def _pools_class_token(network: nn.Module) -> bool:
    return getattr(network, "global_pool", "") == "token" and getattr(network, "num_prefix_tokens", 0) > 0


def _has_class_token(network: nn.Module) -> bool:
    """Says whether the first token is a class token that has been through the last norm."""
    if getattr(network, "cls_token", None) is None:
        return False
    # With `fc_norm` the norm comes after the pooling, and the tokens themselves are not normalised.
    return _pools_class_token(network) or isinstance(getattr(network, "fc_norm", None), nn.Identity)


class _LayerReached(Exception):
    """Carries a layer's output out of the network that it is part of."""

    def __init__(self, output: object) -> None:
        self.output = output


def _output_of(net: nn.Module, layer_name: str, images_BCHW: Tensor) -> object:
    """Runs a network until the layer has given its output; what comes after the layer never runs."""
    this_thread = threading.get_ident()

    def stop(_module: nn.Module, _args: object, output: object) -> None:
        if threading.get_ident() == this_thread:
            raise _LayerReached(output)

    hook = net.get_submodule(layer_name).register_forward_hook(stop)
    try:
        net(images_BCHW)
    except _LayerReached as reached:
        return reached.output
    finally:
        hook.remove()
    raise BackboneError(
        f"the layer {layer_name!r} did not run in {type(net).__name__}.forward: "
        "choose a layer that every image passes"
    )


def _pooled(output: object, layer_name: str, tokens: Literal["mean", "first"]) -> Tensor:
    if not isinstance(output, Tensor):
        raise BackboneError(f"the layer {layer_name!r} gives a {type(output).__name__}, expected one tensor")
    match output.ndim:
        case 2:
            return output
        case 3:
            return output.mean(dim=1) if tokens == "mean" else output[:, 0]
        case 4:
            return output.mean(dim=(2, 3))
        case _:
            raise BackboneError(
                f"the layer {layer_name!r} gives {tuple(output.shape)}, "
                "expected [B, D], [B, N, D] or [B, D, H, W]"
            )


def _layer_name(net: nn.Module, layer: str | int) -> str:
    if isinstance(layer, int):
        children = [name for name, _ in net.named_children()]
        if not -len(children) <= layer < len(children):
            raise BackboneError(f"{type(net).__name__} has {len(children)} layers, there is no index {layer}")
        return children[layer]
    names = [name for name, _ in net.named_modules() if name]
    if layer not in names:
        nearest = difflib.get_close_matches(layer, names, n=3) or names[-3:]
        raise BackboneError(
            f"{type(net).__name__} has no layer {layer!r}: did you mean {', '.join(nearest)}?"
        )
    return layer


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path} cannot be read as safetensors: {error}") from error
    except RuntimeError as error:
        raise BackboneError(f"{path} is not a state dict of this network: {error}") from error
