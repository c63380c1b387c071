"""A model that others made -> a bundle, its card, and its head beside it."""

import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from dino_core.backbones import Backbone, make_backbone
from dino_core.bundle import Manifest, write_bundle
from dino_core.embedding import EmbeddingModel
from training.errors import ConfigError
from training.importing.headfile import head_file, write_heads
from training.importing.heads import head_settings
from training.importing.model import ForeignModel
from training.importing.naming import some
from training.importing.pixels import with_crop


def imported_model(model: ForeignModel, *, image_size_px: int | None = None) -> EmbeddingModel:
    """The model as the service will run it.

    Args:
        model: As read.
        image_size_px: Another crop than the source's; learnt positions are resampled as the source does.

    Raises:
        BackboneError: The network does not take such images.
        ConfigError: The crop is no whole number of the network's patches.
    """
    preprocessing = model.preprocessing
    if image_size_px is not None:
        patch = model.network.get("patch_embed.proj.weight")
        if patch is not None and patch.ndim == 4 and image_size_px % patch.shape[-1]:
            raise ConfigError(
                f"--image-size {image_size_px} is no multiple of the network's patch of {patch.shape[-1]} "
                f"px: give {max(1, round(image_size_px / patch.shape[-1])) * patch.shape[-1]}"
            )
        preprocessing = with_crop(preprocessing, image_size_px)
    backbone = _backbone(model, crop_px=preprocessing.crop_px)
    return EmbeddingModel(backbone, preprocessing=preprocessing, pooling=backbone.default_pooling)


def write_import(model: ForeignModel, out: Path, *, image_size_px: int | None = None) -> Manifest:
    """Writes the bundle and, where a head came along, the file beside it.

    Raises:
        BackboneError: The network does not take such images.
        BundleError: What was written does not load again; nothing is put in place then.
        ConfigError: Something is there already.
    """
    refuse_taken(out)
    embedding = imported_model(model, image_size_px=image_size_px)
    manifest = write_bundle(
        out, embedding, provenance=_provenance(model), card=_card(out.name, model, embedding)
    )
    if model.heads.teacher:
        write_heads(out, model.heads, fingerprint=manifest.fingerprint)
    return manifest


def refuse_taken(out: Path) -> None:
    """Makes sure that nothing is where the bundle and its head go.

    Raises:
        ConfigError: Something is.
    """
    for path in (out, head_file(out)):
        if path.exists():
            raise ConfigError(f"{path} is there already: give --out another name, or move it away")


def report(model: ForeignModel) -> list[str]:
    """What became of the tensors, and what the user should know, line by line."""
    sizes = f" with {model.architecture.model_kwargs}" if model.architecture.model_kwargs else ""
    taken = len(model.network)
    lines = [
        f"{model.source}: {model.kind}; timm's {model.architecture.name}{sizes}",
        f"  {taken} tensors of the network, all that it has and no others; {model.renamed} of the source's "
        f"renamed or joined, {len(model.ignored)} left out",
    ]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in model.ignored.items():
        by_reason[reason].append(name)
    lines += [f"  left out: {some(names)}: {reason}" for reason, names in by_reason.items()]
    if settings := head_settings(model.heads.teacher):
        whose = "teacher's and student's" if model.heads.student else "the teacher's"
        lines.append(f"  a head of {settings.num_prototypes:,} prototypes came along, {whose}")
    lines += [f"  note: {note}" for note in model.notes]
    lines.append(f"  licence: {model.licence}")
    return lines


def _backbone(model: ForeignModel, *, crop_px: int) -> Backbone:
    arguments = dict(model.architecture.model_kwargs)
    backbone = make_backbone(
        model.architecture.name,
        image_size_px=model.architecture.image_size_px or crop_px,
        in_channels=arguments.pop("in_chans", 3),
        position_interpolation=model.position_interpolation,
        model_kwargs=arguments,
    )
    try:
        backbone.network.load_state_dict(model.network, strict=True)
    except RuntimeError as error:  # windows and the like, made for one size of image
        raise ConfigError(
            f"{model.architecture.name} cannot take images of {crop_px} px with these weights: leave "
            "--image-size out"
        ) from error
    return backbone


def _provenance(model: ForeignModel) -> dict[str, object]:
    return {
        "method": "import",
        "source": {"name": Path(model.source).name, "fingerprint": model.fingerprint, "kind": model.kind},
        "licence": model.licence,
        "tensors": {
            "taken": len(model.network),
            "renamed": model.renamed,
            "ignored": dict(model.ignored),
        },
        "head": settings.model_dump(mode="json")
        if (settings := head_settings(model.heads.teacher))
        else None,
        "notes": list(model.notes),
        "versions": {name: version(name) for name in ("dinoserve", "torch", "timm")}
        | {"python": platform.python_version()},
    }


def _card(name: str, model: ForeignModel, embedding: EmbeddingModel) -> str:
    preprocessing, backbone = embedding.preprocessing, embedding.backbone
    notes = "".join(f"- {note[0].upper()}{note[1:]}.\n" for note in model.notes)
    beside = (
        f"A projection head lies beside it, `{head_file(Path(name)).name}`: `dino-train run "
        f"--backbone.weights models/{name}` goes on with it.\n"
        if model.heads.teacher
        else ""
    )
    return f"""# {name}

Weights that others made, imported by dinoserve from `{Path(model.source).name}` ({model.kind}). Nothing in
them was trained or changed here; their tensors have timm's names.

| | |
|---|---|
| network | `{backbone.architecture}` (timm), {embedding.dimensions} dimensions |
| pooling | `{embedding.pooling}` |
| input | shorter side to {preprocessing.resize_px} px (bicubic), centre crop {preprocessing.crop_px} px |
| source | `{model.fingerprint}` |
| tensors | {len(model.network)} taken, {model.renamed} renamed or joined, {len(model.ignored)} left out |

Use it: `dino-serve run --model models/{name}`, or without dinoserve
`timm.create_model("local-dir:models/{name}", pretrained=True)`.
{beside}
## Measured
Nothing here yet: `dino-train eval models/{name} --data DIR` measures it on your images.

## What to know
{notes}- Similar means similar to this network: colours, textures and backgrounds count as well as objects.
- Whatever is over- or under-represented in its training images is so in its judgements. Do not use it to
  decide about people.

## Licence
Of the weights: {model.licence}.
The code that imported them is Apache-2.0.
"""
