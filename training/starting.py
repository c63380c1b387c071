"""What a run begins with, where it does not begin with nothing: weights that are good already.

    models/NAME                        a bundle
    runs/NAME                          the teacher of a run's newest checkpoint, with its head
    runs/NAME/checkpoints/step-…       the teacher of that checkpoint, with its head
    FILE.safetensors, .pth, .pt, .bin  tensors by the names of timm or DINO, and a head if there is one
    timm:resnet50.a1_in1k              published weights, where the internet has them

A file of tensors says nothing of its network: there `backbone.name` is needed. Files of PyTorch are read with
`weights_only`: they can hold tensors and no code.
"""

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_data_config
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.backbones import Backbone, PositionInterpolation, make_backbone
from dino_core.bundle import load_bundle, read_manifest
from dino_core.multicrop import ProjectedNetwork
from dino_core.preprocess import Preprocessing
from training.config import BackboneConfig, HeadConfig, RunConfig
from training.errors import ConfigError

TIMM = "timm:"
_TENSOR_FILES = (".safetensors", ".pth", ".pt", ".bin")
_CHECKPOINT, _CHECKPOINT_TENSORS = "state.json", "state.safetensors"
# What `make_backbone` works out for itself again.
_OWN_ARGUMENTS = {"img_size", "dynamic_img_size", "in_chans"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a network must be to take the weights, and how it was made to see.

    Attributes:
        weights: As the user named them.
        backbone: The network's settings.
        preprocessing: Of the images that it was made for.
        fingerprint: Which weights exactly: a bundle's own, the hash of a file, the name of published ones.
        head: Settings of the head that comes along; none if there is none.
        has_batch_norm: Whether the network normalises by the batch in training.
        cell_px: Sides of images must be multiples of it, or waste what is over.
    """

    weights: str
    backbone: BackboneConfig
    preprocessing: Preprocessing
    fingerprint: str
    head: HeadConfig | None
    has_batch_norm: bool
    cell_px: int


def described(weights: str, *, name: str | None = None) -> Start:
    """Reads what weights say of themselves; those of timm are looked up, and not fetched yet.

    Args:
        weights: See above.
        name: The network, where weights are a file; else what they say counts.

    Raises:
        BundleError: It is a damaged bundle.
        ConfigError: There is nothing of that name, or it cannot be read; the message says what to do.
    """
    if weights.startswith(TIMM):
        return _of_architecture(weights, weights.removeprefix(TIMM), fingerprint=weights, head=None)
    path = Path(weights)
    if path.suffix in _TENSOR_FILES and path.is_file():
        if name is None:
            raise ConfigError(
                f"{weights} does not say which network it is for: give --backbone.name too, a name of timm"
            )
        with path.open("rb") as file:
            fingerprint = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        _, head = _split(_tensors_in(path))
        return _of_architecture(weights, name, fingerprint=fingerprint, head=_head_of(head))
    if checkpoint := _checkpoint_in(path):
        return _of_checkpoint(weights, checkpoint)
    if not path.exists():
        raise ConfigError(
            f"backbone.weights: {weights} is not there: give a bundle (models/NAME), a run (runs/NAME), a "
            f"file ({', '.join(_TENSOR_FILES)}) or {TIMM}NAME"
        )
    manifest = read_manifest(path)
    arguments = {name: value for name, value in manifest.model_args.items() if name not in _OWN_ARGUMENTS}
    backbone = BackboneConfig(
        name=manifest.architecture,
        image_size_px=manifest.image_size_px,
        in_channels=int(manifest.model_args.get("in_chans", 3)),
        drop_path=0.0,
        pooling=manifest.pooling,
        position_interpolation=manifest.position_interpolation,
        model_kwargs=arguments,
    )
    return _start(weights, backbone, manifest.preprocessing, fingerprint=manifest.fingerprint)


def take_weights(student: ProjectedNetwork, config: BackboneConfig) -> None:
    """Gives a fresh network the weights that its settings name, if they name some; in place.

    A head that comes along is taken where it has the shape of the run's; else the run's stays as drawn.

    Raises:
        BundleError: It is a damaged bundle.
        ConfigError: The weights are those of another network, or other ones than when the run was made.
    """
    if config.weights is None:
        return
    start = described(config.weights, name=config.name)
    if start.backbone.name != config.name:
        raise ConfigError(
            f"{config.weights} is a {start.backbone.name} and backbone.name is {config.name}: leave out "
            "--backbone.name, or give the weights of such a network"
        )
    if config.weights_fingerprint not in (None, start.fingerprint):
        raise ConfigError(
            f"{config.weights} has changed since the run was made ({start.fingerprint} in place of "
            f"{config.weights_fingerprint}): start a new run"
        )
    assert isinstance(student.backbone, Backbone)  # `new_state` makes no other
    network, head = _weights_of(config.weights, config)
    network = _for_channels(network, student.backbone, start.backbone.in_channels)
    try:
        student.backbone.network.load_state_dict(network, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights of {config.weights} do not fit the network: backbone.image-size-px, in-channels "
            f"and model-kwargs must be those of the weights ({_first_mismatch(error)})"
        ) from error
    own = student.head.state_dict()
    if {name: tensor.shape for name, tensor in own.items()} == {
        name: tensor.shape for name, tensor in head.items()
    }:
        student.head.load_state_dict(head, strict=True)


def _for_channels(weights: dict[str, Tensor], backbone: Backbone, channels: int) -> dict[str, Tensor]:
    """First convolutions of RGB weights made to fit a network that takes other channels, by timm's rule.

    For one channel its three kernels are added up; for more they are repeated and scaled, so that equal
    channels give what grey gave.
    """
    if channels != 3 or backbone.in_channels == 3:
        return weights
    first = getattr(backbone.network, "pretrained_cfg", {}).get("first_conv") or ()
    names = {f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)}
    return {
        name: adapt_input_conv(backbone.in_channels, tensor)
        if name in names and tensor.shape[1] == channels
        else tensor
        for name, tensor in weights.items()
    }


def published_weights(name: str, config: BackboneConfig, *, instead: str) -> dict[str, Tensor]:
    """The weights that timm has of a network, fetched where they aren't here yet.

    Args:
        name: timm's, with its tag.
        config: Channels and further arguments of the network.
        instead: What a user can do who can't have them.

    Raises:
        ConfigError: They cannot be had.
    """
    arguments: dict[str, Any] = {**config.model_kwargs, "in_chans": config.in_channels}
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0, **arguments)
    except Exception as error:  # whatever the hub's client raises: no network, no such weights, no space
        raise ConfigError(
            f"timm's weights of {name} cannot be had ({type(error).__name__}): check the internet connection "
            f"and the name, or {instead}"
        ) from error
    return dict(network.state_dict())


def backbone_parameters(student: nn.Module) -> list[nn.Parameter]:
    """What stands still while the head warms up."""
    return [parameter for name, parameter in student.named_parameters() if not name.startswith("head.")]


def _of_architecture(weights: str, name: str, *, fingerprint: str, head: HeadConfig | None) -> Start:
    """What timm says of a network: it knows with which pixels it trained its published weights."""
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        make_backbone(name)  # refuses it, and names the nearest
    published = timm.get_pretrained_cfg(name)
    known: dict[str, Any] = published.to_dict() if published is not None else {}  # type: ignore[no-untyped-call]
    config = resolve_data_config({}, pretrained_cfg=known)  # type: ignore[no-untyped-call]
    side = int(config["input_size"][-1])
    preprocessing = Preprocessing(
        resize_px=max(side, round(side / float(config["crop_pct"]))),
        crop_px=side,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    interpolation: PositionInterpolation = "antialias" if weights.startswith(TIMM) else "official"
    backbone = BackboneConfig(
        name=architecture, image_size_px=side, drop_path=0.0, position_interpolation=interpolation
    )
    return _start(weights, backbone, preprocessing, fingerprint=fingerprint, head=head)


def _of_checkpoint(weights: str, checkpoint: Path) -> Start:
    try:
        description = json.loads((checkpoint / _CHECKPOINT).read_bytes())
        config = RunConfig.model_validate(description["config"])
        fingerprint = f"sha256:{description['sha256']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{checkpoint} cannot be read: give another checkpoint or a bundle") from error
    backbone = config.backbone.model_copy(
        update={"drop_path": 0.0, "weights": None, "weights_fingerprint": None}
    )
    return _start(weights, backbone, config.preprocessing(), fingerprint=fingerprint, head=config.head)


def _start(
    weights: str,
    backbone: BackboneConfig,
    preprocessing: Preprocessing,
    *,
    fingerprint: str,
    head: HeadConfig | None = None,
) -> Start:
    with torch.device("meta"):  # only its shape is looked at
        network = make_backbone(
            backbone.name,
            image_size_px=backbone.image_size_px,
            in_channels=backbone.in_channels,
            model_kwargs=backbone.model_kwargs,
        ).network
    stages = getattr(network, "feature_info", None)
    return Start(
        weights=weights,
        backbone=backbone,
        preprocessing=preprocessing,
        fingerprint=fingerprint,
        head=head,
        has_batch_norm=any(isinstance(module, _BatchNorm) for module in network.modules()),
        cell_px=int(stages[-1]["reduction"]) if isinstance(stages, list) and stages else 32,
    )


def _weights_of(weights: str, config: BackboneConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the network and, where there is one, of the head."""
    if weights.startswith(TIMM):
        return published_weights(weights.removeprefix(TIMM), config, instead="give a bundle or a file"), {}
    path = Path(weights)
    if checkpoint := _checkpoint_in(path):
        tensors = _tensors_in(checkpoint / _CHECKPOINT_TENSORS)
        return _split(
            {
                name.removeprefix("teacher."): tensor
                for name, tensor in tensors.items()
                if name.startswith("teacher.")
            }
        )
    if path.is_file():
        network, head = _split(_tensors_in(path))
        classifier = getattr(timm.get_pretrained_cfg(config.name), "classifier", None) or ()
        names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        # A classifier has no place in an embedding; whatever else is over or missing is refused.
        prefixes = tuple(f"{name}." for name in names)
        return {
            name: tensor for name, tensor in network.items() if not name.startswith(prefixes or ("\0",))
        }, head
    return dict(load_bundle(path).model.backbone.network.state_dict()), {}


def _checkpoint_in(path: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest of the run that it is."""
    if (path / _CHECKPOINT).is_file():
        return path
    of_run = sorted(path.glob(f"checkpoints/step-*/{_CHECKPOINT}"))
    return of_run[-1].parent if of_run else None


def _tensors_in(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name; of nested ones the teacher's, else the model's."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{file} cannot be read as tensors ({type(error).__name__}): it is damaged, or holds more than "
            "tensors, which is never run; save its tensors as safetensors"
        ) from error
    for key in ("teacher", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{file} holds no tensors by name: give a state dict, or a dictionary with one")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's tensors and those of DINO's head; where no name begins with `backbone.`, there is none."""
    if not any(name.startswith("backbone.") for name in tensors):
        return dict(tensors), {}
    network = {
        re.sub(r"^backbone\.(network\.)?", "", name): tensor
        for name, tensor in tensors.items()
        if name.startswith("backbone.")
    }
    head = {
        name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")
    }
    return network, head


def _head_of(tensors: Mapping[str, Tensor]) -> HeadConfig | None:
    """The settings of a head by the shapes of its tensors; None if it is none of DINO's."""
    prototypes = tensors.get("last_layer.weight_v")
    linears = [tensor for name, tensor in tensors.items() if name.startswith("mlp.") and tensor.ndim == 2]
    if prototypes is None or not linears:
        return None
    return HeadConfig(
        num_prototypes=prototypes.shape[0],
        bottleneck_dim=prototypes.shape[1],
        hidden_dim=linears[0].shape[0] if len(linears) > 1 else HeadConfig().hidden_dim,
        num_layers=len(linears),
        batch_norm=any(name.endswith("running_mean") for name in tensors),
    )


def _first_mismatch(error: RuntimeError) -> str:
    lines = str(error).splitlines()
    return lines[1].strip() if len(lines) > 1 else lines[0]
