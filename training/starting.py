"""What a run begins with, where it does not begin with nothing: weights that are good already.

    models/NAME                        a bundle, and the head beside it if there is one
    runs/NAME                          the teacher of a run's newest checkpoint, with its head
    runs/NAME/checkpoints/step-…       the teacher of that checkpoint, with its head
    timm:resnet50.a1_in1k              published weights, where the internet has them
    whatever else `dino-train import` takes: files and directories of others, with their heads

`training.importing` reads what others made; nothing here does.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.backbones import Backbone, make_backbone
from dino_core.bundle import load_bundle, read_manifest
from dino_core.manifest import MANIFEST
from dino_core.multicrop import ProjectedNetwork
from dino_core.preprocess import Preprocessing
from training.config import BackboneConfig, HeadConfig, RunConfig
from training.errors import ConfigError
from training.importing.headfile import heads_beside
from training.importing.heads import Heads, head_settings, split_head
from training.importing.model import ForeignModel
from training.importing.pixels import timm_pixels
from training.importing.published import HUB, TIMM, TORCHVISION, published_weights, timm_configuration
from training.importing.reading import TENSOR_FILES, read_contents
from training.importing.sources import foreign_model

_CHECKPOINT, _CHECKPOINT_TENSORS = "state.json", "state.safetensors"
# What `make_backbone` works out for itself again.
_OWN_ARGUMENTS = {"img_size", "dynamic_img_size", "in_chans"}
_NO_HEADS = Heads(teacher={}, student={})


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


def described(
    weights: str, *, name: str | None = None, model_kwargs: Mapping[str, Any] | None = None
) -> Start:
    """Reads what weights say of themselves; those of timm are looked up, and not fetched yet.

    Args:
        weights: See above.
        name: The network, for a file whose tensors do not tell it.
        model_kwargs: Its further arguments, as far as they are known.

    Raises:
        BundleError: It is a damaged bundle.
        ConfigError: There is nothing of that name, or it cannot be read; the message says what to do.
    """
    if weights.startswith(TIMM):
        return _of_timm(weights)
    path = Path(weights)
    if checkpoint := _checkpoint_in(path):
        return _of_checkpoint(weights, checkpoint)
    if (path / MANIFEST).is_file():
        return _of_bundle(weights, path)
    return _of_foreign(weights, _foreign(weights, name=name, model_kwargs=model_kwargs or {}))


def take_weights(student: ProjectedNetwork, config: BackboneConfig) -> dict[str, Tensor]:
    """Gives a fresh network the weights that its settings name, if they name some; in place.

    A head that comes along is taken where it has the shape of the run's; else the run's stays as drawn.

    Returns:
        The teacher's head, where it is another one than the student's; else nothing.

    Raises:
        BundleError: It is a damaged bundle.
        ConfigError: The weights are those of another network, or other ones than when the run was made.
    """
    if config.weights is None:
        return {}
    start = described(config.weights, name=config.name, model_kwargs=config.model_kwargs)
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
    network, heads = _weights_of(config.weights, config)
    network = _for_channels(network, student.backbone, start.backbone.in_channels)
    try:
        student.backbone.network.load_state_dict(network, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights of {config.weights} do not fit the network: backbone.image-size-px, in-channels "
            f"and model-kwargs must be those of the weights ({_first_mismatch(error)})"
        ) from error
    if _shapes(student.head.state_dict()) != _shapes(heads.teacher):
        return {}
    has_own = _shapes(heads.student) == _shapes(heads.teacher)
    student.head.load_state_dict(heads.student if has_own else heads.teacher, strict=True)
    return heads.teacher if has_own else {}


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


def backbone_parameters(student: nn.Module) -> list[nn.Parameter]:
    """What stands still while the head warms up."""
    return [parameter for name, parameter in student.named_parameters() if not name.startswith("head.")]


def _of_timm(weights: str) -> Start:
    """What timm says of a network: it knows with which pixels it trained its published weights."""
    name = weights.removeprefix(TIMM)
    preprocessing, _ = timm_pixels(timm_configuration(name))
    backbone = BackboneConfig(
        name=name.partition(".")[0],
        image_size_px=preprocessing.crop_px,
        drop_path=0.0,
        position_interpolation="antialias",
    )
    return _start(weights, backbone, preprocessing, fingerprint=weights)


def _of_bundle(weights: str, path: Path) -> Start:
    manifest = read_manifest(path)
    backbone = BackboneConfig(
        name=manifest.architecture,
        image_size_px=manifest.image_size_px,
        in_channels=int(manifest.model_args.get("in_chans", 3)),
        drop_path=0.0,
        pooling=manifest.pooling,
        position_interpolation=manifest.position_interpolation,
        model_kwargs=_without_own(manifest.model_args),
    )
    return _start(
        weights,
        backbone,
        manifest.preprocessing,
        fingerprint=manifest.fingerprint,
        head=head_settings(heads_beside(path, fingerprint=manifest.fingerprint).teacher),
    )


def _foreign(weights: str, *, name: str | None, model_kwargs: Mapping[str, Any]) -> ForeignModel:
    if not Path(weights).exists() and not weights.startswith((HUB, TORCHVISION)):
        raise ConfigError(
            f"backbone.weights: {weights} is not there: give a bundle (models/NAME), a run (runs/NAME), a "
            f"file ({', '.join(TENSOR_FILES)}), {TIMM}NAME, or what else dino-train import takes"
        )
    heads = model_kwargs.get("num_heads")
    try:
        return foreign_model(
            weights, name=name, model_kwargs=model_kwargs, heads=heads if isinstance(heads, int) else None
        )
    except ConfigError as error:
        # The same in the words of `dino-train run`.
        sentence = (
            str(error).replace("--name", "--backbone.name").replace("--heads", "--backbone.model-kwargs")
        )
        raise ConfigError(sentence) from error


def _of_foreign(weights: str, model: ForeignModel) -> Start:
    architecture = model.architecture
    backbone = BackboneConfig(
        name=architecture.name,
        image_size_px=architecture.image_size_px or model.preprocessing.crop_px,
        in_channels=int(architecture.model_kwargs.get("in_chans", 3)),
        drop_path=0.0,
        position_interpolation=model.position_interpolation,
        model_kwargs=_without_own(architecture.model_kwargs),
    )
    return _start(
        weights,
        backbone,
        model.preprocessing,
        fingerprint=model.fingerprint,
        head=head_settings(model.heads.teacher),
    )


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


def _weights_of(weights: str, config: BackboneConfig) -> tuple[dict[str, Tensor], Heads]:
    """Tensors of the network and, where there are some, of the heads."""
    if weights.startswith(TIMM):
        arguments = {**config.model_kwargs, "in_chans": config.in_channels}
        published = published_weights(
            weights.removeprefix(TIMM), arguments, instead="give a bundle or a file"
        )
        return published, _NO_HEADS
    path = Path(weights)
    if checkpoint := _checkpoint_in(path):
        network, head = split_head(read_contents(checkpoint / _CHECKPOINT_TENSORS).network)
        return network, Heads(teacher=head, student={})
    if (path / MANIFEST).is_file():
        bundle = load_bundle(path)
        tensors = dict(bundle.model.backbone.network.state_dict())
        return tensors, heads_beside(path, fingerprint=bundle.manifest.fingerprint)
    model = _foreign(weights, name=config.name, model_kwargs=config.model_kwargs)
    return model.network, model.heads


def _without_own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _OWN_ARGUMENTS}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _checkpoint_in(path: Path) -> Path | None:
    """The checkpoint that a folder is, or the newest of the run that it is."""
    if (path / _CHECKPOINT).is_file():
        return path
    of_run = sorted(path.glob(f"checkpoints/step-*/{_CHECKPOINT}"))
    return of_run[-1].parent if of_run else None


def _first_mismatch(error: RuntimeError) -> str:
    lines = str(error).splitlines()
    return lines[1].strip() if len(lines) > 1 else lines[0]
