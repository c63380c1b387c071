"""What a run begins with, where it does not begin with nothing: the weights of a bundle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dino_core.backbones import Backbone, Pooling
from dino_core.bundle import load_bundle, read_manifest
from dino_core.preprocess import Preprocessing
from training.config import BackboneConfig
from training.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a network must be to take the weights, and how it was made to see."""

    architecture: str
    model_kwargs: dict[str, Any]
    image_size_px: int
    in_channels: int
    pooling: Pooling
    preprocessing: Preprocessing
    fingerprint: str


def described(weights: Path) -> Start:
    """Reads what a bundle says of itself.

    Raises:
        BundleError: It is none, or damaged.
    """
    manifest = read_manifest(weights)
    # What `make_backbone` works out for itself again.
    own = {"img_size", "dynamic_img_size", "in_chans"}
    return Start(
        architecture=manifest.architecture,
        model_kwargs={name: value for name, value in manifest.model_args.items() if name not in own},
        image_size_px=manifest.image_size_px,
        in_channels=int(manifest.model_args.get("in_chans", 3)),
        pooling=manifest.pooling,
        preprocessing=manifest.preprocessing,
        fingerprint=manifest.fingerprint,
    )


def take_weights(network: Backbone, config: BackboneConfig) -> None:
    """Gives a fresh network the weights of the bundle that its settings name, if they name one.

    Raises:
        BundleError: It is none, or damaged.
        ConfigError: Its network is another one.
    """
    if config.weights is None:
        return
    source = load_bundle(config.weights).model.backbone
    if source.architecture != network.architecture:
        raise ConfigError(
            f"{config.weights} is a {source.architecture} and backbone.name is {config.name}: leave out "
            "--backbone.name, or give the weights of such a network"
        )
    try:
        network.network.load_state_dict(source.network.state_dict(), strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights of {config.weights} do not fit the network: backbone.image-size-px, in-channels "
            f"and model-kwargs must be those of the bundle ({_first_mismatch(error)})"
        ) from error


def backbone_parameters(student: nn.Module) -> list[nn.Parameter]:
    """What stands still while the head warms up."""
    return [parameter for name, parameter in student.named_parameters() if not name.startswith("head.")]


def _first_mismatch(error: RuntimeError) -> str:
    lines = str(error).splitlines()
    return lines[1].strip() if len(lines) > 1 else lines[0]
