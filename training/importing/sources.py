"""What a user names -> a model of timm's with all of its tensors.

    FILE.safetensors, .pth, .pt, .bin    DINO, DINOv2, DINOv3, ResNet; or any network of timm's, with its name
    DIRECTORY                            of timm or of transformers: config.json and tensors
    timm:NAME, torchvision:NAME          by name, where there is internet
    hf:OWNER/NAME                        such a directory on the hub

All tensors are accounted for: taken, or left out for a reason. One too many or too few is an error that
names it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_core.vit import PositionInterpolation
from training.errors import ConfigError
from training.importing.architecture import Architecture, checked, positions_px, recognised
from training.importing.heads import Heads, split_head
from training.importing.huggingface import (
    named_transformers,
    refuse_other_computation,
    refuse_other_kinds,
)
from training.importing.licences import (
    TORCHVISION_TERMS,
    UNKNOWN,
    licence_of_directory,
    licence_of_file,
    licence_of_timm,
)
from training.importing.model import ForeignModel
from training.importing.naming import Named, Rules, without
from training.importing.pixels import official_pixels, timm_pixels, transformers_pixels
from training.importing.published import (
    HUB,
    TIMM,
    TORCHVISION,
    hub_directory,
    published_weights,
    timm_configuration,
    torchvision_weights,
)
from training.importing.reading import TENSOR_FILES, read_contents
from training.importing.vits import family_of, is_vit, named_vit

_OTHER_OBJECTIVES: Rules = (
    (r"ibot_head\..*", "the head of another objective, iBOT"),
    (r"(dino_head|head)\.(mlp|last_layer)\..*", "a projection head of another form than DINO's first"),
)
_CLASSIFIER = "a classifier's, for which an embedding has no use"
_COUNTER = "num_batches_tracked"


def foreign_model(
    source: str,
    *,
    name: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    heads: int | None = None,
) -> ForeignModel:
    """Reads a model that others made.

    Args:
        source: See above.
        name: timm's name of the network, where the tensors do not tell it or are to be held against it.
        model_kwargs: What is other in the network than timm has it; goes with `name`.
        heads: Attention heads of a ViT of a size of its own.

    Raises:
        BackboneError: There is no network of that name.
        ConfigError: There is nothing there, or it cannot be read, or it is no such network.
    """
    if source.startswith(TIMM):
        return _of_timm(source, source.removeprefix(TIMM))
    if source.startswith(TORCHVISION):
        return _of_torchvision(source)
    path = hub_directory(source.removeprefix(HUB)) if source.startswith(HUB) else Path(source)
    if path.is_dir():
        return _of_directory(source, path)
    if not path.is_file() or path.suffix not in TENSOR_FILES:
        raise ConfigError(
            f"{source} is {'no file of tensors' if path.exists() else 'not there'}: give a file "
            f"({', '.join(TENSOR_FILES)}), a directory of timm or transformers, or {TIMM}NAME, "
            f"{TORCHVISION}NAME, {HUB}OWNER/NAME"
        )
    named = None if name is None else Architecture(name=name, model_kwargs=dict(model_kwargs or {}))
    return _of_file(source, path, named=named, heads=heads)


def _of_file(source: str, path: Path, *, named: Architecture | None, heads: int | None) -> ForeignModel:
    contents = read_contents(path)
    tensors, head = split_head(contents.network)
    _, student_head = split_head(contents.student)
    if any(".embeddings." in f".{tensor}" or tensor.startswith("embedder.") for tensor in tensors):
        raise ConfigError(
            f"{source} has the names of Hugging Face's transformers: give the directory that it lies in, "
            "whose config.json says what the network is"
        )
    tensors, ignored = without(tensors, _OTHER_OBJECTIVES)
    configuration = timm_configuration(named.name) if named else {}
    found = _named(tensors, configuration)
    network, notes = _completed(found.tensors)
    if named is None:
        architecture = recognised(network, heads=heads, source=source)
        patch_px = architecture.image_size_px and network["patch_embed.proj.weight"].shape[-1]
        family = family_of(network) if is_vit(network) else "DINO" if head else ""
        kind = f"a ViT of {family}'s form" if is_vit(network) else "a ResNet"
        preprocessing, of_pixels = official_pixels(
            positions_px=architecture.image_size_px, patch_px=patch_px or 1
        )
        licence = licence_of_file(family)
    else:
        size = named.model_kwargs.get("img_size") or positions_px(network)
        arguments = {**_channels(network, configuration), **named.model_kwargs}
        architecture = Architecture(name=named.name, model_kwargs=arguments, image_size_px=size)
        kind = "a network of timm's"
        preprocessing, of_pixels = timm_pixels(configuration)
        of_pixels = (
            *of_pixels,
            f"the file says nothing of its images: those of timm's {named.name} are taken",
        )
        licence = UNKNOWN
    checked(network, architecture, source=source)
    if contents.left:
        notes = (*notes, f"also in the file, and not looked at: {', '.join(contents.left)}")
    return ForeignModel(
        source=source,
        kind=kind,
        fingerprint=_fingerprint(path),
        architecture=architecture,
        network=network,
        heads=Heads(teacher=head, student=student_head if head else {}),
        ignored=ignored | found.ignored,
        renamed=found.renamed,
        position_interpolation=_interpolation(network),
        preprocessing=preprocessing,
        notes=(*of_pixels, *notes),
        licence=licence,
    )


def _of_directory(source: str, directory: Path) -> ForeignModel:
    if (directory / "manifest.json").is_file():
        raise ConfigError(
            f"{source} is a bundle already: serve it, or go on from it with --backbone.weights {source}"
        )
    try:
        config = json.loads((directory / "config.json").read_bytes())
        if not isinstance(config, dict) or not ("architecture" in config or "model_type" in config):
            raise ValueError("neither timm's nor transformers'")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source} is no model's directory: config.json, which says what the network is, is missing or "
            "is neither timm's nor transformers'"
        ) from error
    files = _weights_in(directory, source)
    tensors = {name: tensor for file in files for name, tensor in read_contents(file).network.items()}
    fingerprint = _fingerprint(*files)
    if "architecture" in config:
        return _of_timm_directory(source, directory, config, tensors, fingerprint)
    return _of_transformers(source, directory, config, tensors, fingerprint)


def _of_timm_directory(
    source: str, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], fingerprint: str
) -> ForeignModel:
    name, arguments = str(config["architecture"]), dict(config.get("model_args") or {})
    arguments.pop("num_classes", None)
    configuration = {**timm_configuration(name), **dict(config.get("pretrained_cfg") or {})}
    found = _named(tensors, configuration)
    network, notes = _completed(found.tensors)
    size = arguments.pop("img_size", None) or positions_px(network)
    architecture = Architecture(name=name, model_kwargs=arguments, image_size_px=size)
    checked(network, architecture, source=source)
    preprocessing, of_pixels = timm_pixels(configuration)
    licence = licence_of_directory(directory)
    return ForeignModel(
        source=source,
        kind="a network of timm's",
        fingerprint=fingerprint,
        architecture=architecture,
        network=network,
        ignored=found.ignored,
        renamed=found.renamed,
        position_interpolation="antialias",
        preprocessing=preprocessing,
        notes=(*of_pixels, *notes),
        licence=licence if licence != UNKNOWN else licence_of_timm(config.get("pretrained_cfg") or {}),
    )


def _of_transformers(
    source: str, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], fingerprint: str
) -> ForeignModel:
    refuse_other_kinds(config, source=source)
    of_numerics = refuse_other_computation(config, source=source)
    found = named_transformers(tensors, config)
    network, notes = _completed(found.tensors)
    architecture = recognised(network, heads=config.get("num_attention_heads"), source=source)
    checked(network, architecture, source=source)
    file = directory / "preprocessor_config.json"
    try:
        preprocessing, of_pixels = transformers_pixels(json.loads(file.read_bytes()))
    except FileNotFoundError:
        patch_px = network["patch_embed.proj.weight"].shape[-1] if is_vit(network) else 1
        preprocessing, of_pixels = official_pixels(positions_px=architecture.image_size_px, patch_px=patch_px)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} does not say what the images are: mend it, or take it away") from error
    by_type: dict[str, PositionInterpolation] = {"vit": "bicubic", "dinov2": "bicubic"}
    return ForeignModel(
        source=source,
        kind=f"{config['model_type']} of transformers",
        fingerprint=fingerprint,
        architecture=architecture,
        network=network,
        ignored=found.ignored,
        renamed=found.renamed,
        position_interpolation=by_type.get(config["model_type"], "antialias"),
        preprocessing=preprocessing,
        notes=(*of_pixels, *of_numerics, *notes),
        licence=licence_of_directory(directory),
    )


def _of_timm(source: str, name: str) -> ForeignModel:
    configuration = timm_configuration(name)
    network, notes = _completed(published_weights(name, {}, instead="give a file or a directory"))
    architecture = Architecture(
        name=name.partition(".")[0], model_kwargs={}, image_size_px=positions_px(network)
    )
    checked(network, architecture, source=source)
    preprocessing, of_pixels = timm_pixels(configuration)
    return ForeignModel(
        source=source,
        kind="a network of timm's",
        fingerprint=source,
        architecture=architecture,
        network=network,
        ignored={},
        renamed=0,
        position_interpolation="antialias",
        preprocessing=preprocessing,
        notes=(*of_pixels, *notes),
        licence=licence_of_timm(configuration),
    )


def _of_torchvision(source: str) -> ForeignModel:
    name, tensors, transform = torchvision_weights(source.removeprefix(TORCHVISION))
    found = _named(tensors, {})
    network, notes = _completed(found.tensors)
    architecture = recognised(network, heads=None, source=source)
    checked(network, architecture, source=source)
    preprocessing, of_pixels = timm_pixels(
        {
            "input_size": (3, transform.crop_size[0], transform.crop_size[0]),
            "crop_pct": transform.crop_size[0] / transform.resize_size[0],
            "interpolation": transform.interpolation.value,
            "mean": tuple(transform.mean),
            "std": tuple(transform.std),
        }
    )
    return ForeignModel(
        source=source,
        kind=f"torchvision's {name}",
        fingerprint=f"{TORCHVISION}{name}",
        architecture=architecture,
        network=network,
        ignored=found.ignored,
        renamed=found.renamed,
        position_interpolation="official",
        preprocessing=preprocessing,
        notes=(*of_pixels, *notes),
        licence=TORCHVISION_TERMS,
    )


def _named(tensors: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> Named:
    """Timm's names; a classifier is left out, by what timm calls it or by what it is called in ResNets."""
    classifiers = configuration.get("classifier") or ("fc" if "layer1.0.conv1.weight" in tensors else ())
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    kept, ignored = without(tensors, [(rf"{name}\.(weight|bias)", _CLASSIFIER) for name in names])
    found = named_vit(kept) if is_vit(kept) else Named(tensors=kept, ignored={}, renamed=0)
    return Named(tensors=found.tensors, ignored=ignored | found.ignored, renamed=found.renamed)


def _channels(network: Mapping[str, Tensor], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """How many channels of an image the first layer takes, where they are not three."""
    first = network.get(f"{configuration.get('first_conv')}.weight")
    return {} if first is None or first.shape[1] == 3 else {"in_chans": first.shape[1]}


def _interpolation(network: Mapping[str, Tensor]) -> PositionInterpolation:
    """How the authors resample: DINO and DINOv2 by a factor, DINOv2 with registers with antialias."""
    return "antialias" if "reg_token" in network else "official"


def _completed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors in the precision of bundles, with what old files lack: BatchNorm's counters of batches."""
    short = [name for name, tensor in tensors.items() if tensor.dtype in (torch.float16, torch.bfloat16)]
    result = {
        name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    counters = {
        name.removesuffix("running_mean") + _COUNTER for name in tensors if name.endswith("running_mean")
    } - set(tensors)
    notes = []
    if short:
        notes.append(f"{len(short)} tensors are in 16 bits, and are kept in 32")
    if counters:
        notes.append(f"{len(counters)} counters of batches were not saved, and begin at 0: nothing asks them")
    return {**result, **{name: torch.tensor(0) for name in counters}}, tuple(notes)


def _weights_in(directory: Path, source: str) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return [directory / name]
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            parts = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            if parts and all(Path(part).name == part for part in parts):
                return [directory / part for part in parts]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        raise ConfigError(f"{index} does not name the parts of the weights: fetch the directory again")
    raise ConfigError(
        f"{source} has no weights: model.safetensors or pytorch_model.bin is expected beside config.json"
    )


def _fingerprint(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256")
        if len(files) == 1:
            return f"sha256:{content.hexdigest()}"
        digest.update(content.digest())
    return f"sha256:{digest.hexdigest()}"
