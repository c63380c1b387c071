"""Weights by name, where there is internet: timm's, torchvision's, and repositories of Hugging Face's hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import snapshot_download
from torch import Tensor
from torchvision.models import get_model_weights

from dino_core.backbones import make_backbone
from training.errors import ConfigError

TIMM, TORCHVISION, HUB = "timm:", "torchvision:", "hf:"
_HUB_FILES = [
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "*.safetensors",
    "*.safetensors.index.json",
]


def published_weights(name: str, model_kwargs: Mapping[str, Any], *, instead: str) -> dict[str, Tensor]:
    """The weights that timm has of a network, fetched where they aren't here yet.

    Args:
        name: timm's, with its tag.
        model_kwargs: Further arguments of the network.
        instead: What a user can do who can't have them.

    Raises:
        ConfigError: They cannot be had.
    """
    try:
        network = timm.create_model(name, pretrained=True, num_classes=0, **model_kwargs)
    except Exception as error:  # whatever the hub's client raises: no network, no such weights, no space
        raise ConfigError(
            f"timm's weights of {name} cannot be had ({type(error).__name__}): check the internet connection "
            f"and the name, or {instead}"
        ) from error
    return dict(network.state_dict())


def timm_configuration(name: str) -> dict[str, Any]:
    """What timm knows of its weights of a network: images, licence, classifier.

    Args:
        name: timm's; without a tag it means the default weights.

    Raises:
        BackboneError: There is no such network.
    """
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        make_backbone(name)  # refuses it, and names the nearest
    published = timm.get_pretrained_cfg(name)
    return dict(published.to_dict()) if published is not None else {}  # type: ignore[no-untyped-call]


def torchvision_weights(name: str) -> tuple[str, dict[str, Tensor], Any]:
    """The weights that torchvision has of a network.

    Args:
        name: torchvision's, such as resnet50 or resnet50.IMAGENET1K_V1; without a tag the default ones.

    Returns:
        Their full name, the tensors, and torchvision's transform of the images.

    Raises:
        ConfigError: There are none of that name, or they cannot be had.
    """
    model, _, tag = name.partition(".")
    try:
        all_weights = get_model_weights(model)
        weights = all_weights[tag] if tag else next(iter(all_weights)).DEFAULT
    except (ValueError, KeyError) as error:
        raise ConfigError(f"torchvision has no weights {name!r}: give a name such as resnet50") from error
    try:
        tensors = dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:  # whatever the download raises
        raise ConfigError(
            f"torchvision's weights of {name} cannot be had ({type(error).__name__}): check the internet "
            "connection, or give a file"
        ) from error
    return f"{model}.{weights.name}", tensors, weights.transforms()


def hub_directory(name: str) -> Path:
    """Fetches a repository of the hub, without anything that could be code.

    Raises:
        ConfigError: It cannot be had.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # whatever the hub's client raises: no network, no such name, no permission
        raise ConfigError(
            f"{HUB}{name} cannot be had ({type(error).__name__}): check the internet connection, the name, "
            "and whether its terms must be accepted first; or give a directory"
        ) from error
