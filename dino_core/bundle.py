"""A trained model on disk: written at once or not at all, and believed only after it has been checked.

    model.safetensors      the backbone's weights, under timm's names
    config.json            timm's format: `timm.create_model("local-dir:PATH", pretrained=True)` needs no more
    manifest.json          what the embedding depends on, fingerprint, SHA-256 of every other file, provenance
    projection.safetensors what follows the pooling, where something does
    reference.safetensors  embeddings of `reference_pictures`: what the model has to reproduce after loading
    README.md              the model card
    ...                    further files of the card

Tensors are read as safetensors and the rest as JSON; nothing is unpickled and no code is run.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from dino_core.backbones import make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BackboneError, BundleError, ProjectionError
from dino_core.manifest import (
    CARD,
    CONFIG,
    MANIFEST,
    PLAIN_NAME,
    PROJECTION,
    REFERENCE,
    RESTORE,
    WEIGHTS,
    Manifest,
    read_json,
    read_manifest,
    some,
    verify_files,
)
from dino_core.parity import reference_pixels
from dino_core.projection import Projection
from dino_core.reference import reference_pictures
from dino_core.timm_config import timm_config

__all__ = [
    "Bundle",
    "Manifest",
    "fingerprint_of",
    "load_bundle",
    "read_manifest",
    "reference_pictures",
    "verify_files",
    "write_bundle",
]

# Other processors and library versions sum in another order; wrong weights or channels are far below this.
MIN_REFERENCE_COSINE = 0.9999


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been loaded and verified.

    Attributes:
        path: Its directory.
        manifest: What it says of itself.
        model: In evaluation mode, on the device asked for.
    """

    path: Path
    manifest: Manifest
    model: EmbeddingModel


def write_bundle(
    path: Path | str,
    model: EmbeddingModel,
    *,
    provenance: Mapping[str, object],
    card: str,
    assets: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes a model as a bundle: beside its place, loaded from there as a test, then renamed.

    A reader never sees half a bundle, and a bundle that would not load is never left behind.

    Args:
        path: The directory to make; its name becomes the model's id.
        model: In float32, on any device.
        provenance: Recipe, data summary, seed, versions, metrics...; JSON values.
        card: README.md.
        assets: Further files of the card, by plain name.
        overwrite: Whether a bundle that is already there is replaced; anything else there never is.

    Returns:
        The manifest written.

    Raises:
        BundleError: The place is taken, a name or value cannot be written, or the result does not load.
    """
    target = Path(path).absolute()
    if not PLAIN_NAME.fullmatch(target.name):
        raise BundleError(f"a bundle cannot be called {target.name!r}: use letters, digits, '.', '_' and '-'")
    _check_target(target, overwrite=overwrite)
    contents = _contents(target.name, model, provenance=provenance, card=card, assets=assets or {})
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        for name, content in contents.items():
            _write_durably(partial / name, content)
        manifest = load_bundle(partial).manifest
        _put_in_place(partial, target, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def load_bundle(path: Path | str, *, device: str | torch.device = "cpu") -> Bundle:
    """Loads a bundle and proves that it is what was written.

    In this order: manifest, hashes of all files, weights name by name, fingerprint, and the embeddings of the
    reference pictures as computed here and now on the device.

    Args:
        path: The bundle's directory.
        device: Where the model goes.

    Returns:
        The bundle, ready to embed.

    Raises:
        BundleError: What was found, what was expected, and what to do.
    """
    bundle_dir = Path(path)
    manifest = read_manifest(bundle_dir)
    verify_files(bundle_dir)
    model = _build(bundle_dir, manifest)
    if model.dimensions != manifest.embedding_dimension:
        raise BundleError(
            f"{bundle_dir / MANIFEST} promises {manifest.embedding_dimension} dimensions, "
            f"the model has {model.dimensions}: {RESTORE}"
        )
    fingerprint = fingerprint_of(model)
    if fingerprint != manifest.fingerprint:
        raise BundleError(
            f"{bundle_dir} has the fingerprint {fingerprint}, its manifest says {manifest.fingerprint}: "
            f"weights or settings were changed after it was written; {RESTORE}"
        )
    model.to(device)
    _check_reference(bundle_dir, model)
    return Bundle(bundle_dir, manifest, model)


def fingerprint_of(model: EmbeddingModel) -> str:
    """Names a model by all that decides its embeddings; equal fingerprints may share a collection.

    Args:
        model: In the precision in which it was trained: a copy in half precision is another model.

    Returns:
        "sha256:" and 64 hexadecimal digits, over the settings as canonical JSON, then each weight tensor by
        the order of names: name, type, shape, bytes; those of a projection come last.
    """
    backbone = model.backbone
    settings = {
        "architecture": backbone.architecture,
        "model_args": backbone.model_args,
        "position_interpolation": backbone.position_interpolation,
        "pooling": model.pooling,
        "normalise": model.normalise,
        "preprocessing": model.preprocessing.to_json(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    projection = {} if model.projection is None else model.projection.state_dict(prefix="projection.")
    for name, tensor in [*sorted(backbone.network.state_dict().items()), *sorted(projection.items())]:
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return f"sha256:{digest.hexdigest()}"


def _contents(
    model_id: str,
    model: EmbeddingModel,
    *,
    provenance: Mapping[str, object],
    card: str,
    assets: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Makes the bytes of every file, the manifest last, as it names the others."""
    backbone = model.backbone
    weights = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in backbone.network.state_dict().items()
    }
    contents = {
        WEIGHTS: save(weights, metadata={"format": "pt"}),
        CONFIG: _json_bytes(timm_config(model), what="the model's arguments"),
        REFERENCE: save({"embeddings": reference_embeddings(model).cpu()}),
        CARD: card.encode(),
    }
    if model.projection is not None:
        contents[PROJECTION] = save(
            {name: tensor.cpu() for name, tensor in model.projection.state_dict().items()}
        )
    for name, content in assets.items():
        if not PLAIN_NAME.fullmatch(name) or name in contents or name in {MANIFEST, PROJECTION}:
            raise BundleError(
                f"a bundle cannot hold a further file called {name!r}: choose another plain name"
            )
        contents[name] = content
    manifest = Manifest(
        id=model_id,
        architecture=backbone.architecture,
        model_args=dict(backbone.model_args),
        image_size_px=backbone.image_size_px,
        position_interpolation=backbone.position_interpolation,
        embedding_dimension=model.dimensions,
        pooling=model.pooling,
        normalise=model.normalise,
        preprocessing=model.preprocessing,
        fingerprint=fingerprint_of(model),
        files={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
        provenance=dict(provenance),
    )
    values = {**asdict(manifest), "preprocessing": model.preprocessing.to_json()}
    contents[MANIFEST] = _json_bytes(values, what="the provenance")
    return contents


@torch.no_grad()
def reference_embeddings(model: EmbeddingModel) -> Tensor:
    """Embeds the reference pictures, [8, D], on the model's device."""
    device = next(model.parameters()).device
    embeddings: Tensor = model(reference_pixels(model.preprocessing).to(device))
    return embeddings


def _build(bundle_dir: Path, manifest: Manifest) -> EmbeddingModel:
    """Makes the network that the manifest describes and fills it with the weights, every one of them."""
    args = dict(manifest.model_args)
    try:
        backbone = make_backbone(
            manifest.architecture,
            image_size_px=manifest.image_size_px,
            in_channels=args.pop("in_chans", 3),
            position_interpolation=manifest.position_interpolation,
            model_kwargs=args,
        )
        model = EmbeddingModel(
            backbone,
            preprocessing=manifest.preprocessing,
            pooling=manifest.pooling,
            normalise=manifest.normalise,
            projection=_read_projection(bundle_dir) if PROJECTION in manifest.files else None,
        )
    except (BackboneError, ProjectionError) as error:
        raise BundleError(f"{bundle_dir} describes a model that cannot be built here: {error}") from error
    config = read_json(bundle_dir / CONFIG)
    if (config.get("architecture"), config.get("model_args")) != (manifest.architecture, manifest.model_args):
        raise BundleError(f"{bundle_dir / CONFIG} describes another model than {MANIFEST} does: {RESTORE}")
    weights = _read_tensors(bundle_dir / WEIGHTS)
    expected = backbone.network.state_dict()
    if missing := sorted(set(expected) - set(weights)):
        raise BundleError(f"{bundle_dir / WEIGHTS} lacks {some(missing)}: {RESTORE}")
    if extra := sorted(set(weights) - set(expected)):
        raise BundleError(
            f"{bundle_dir / WEIGHTS} has {some(extra)}, unknown to {manifest.architecture}: {RESTORE}"
        )
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise BundleError(
                f"{name} in {bundle_dir / WEIGHTS} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {expected[name].dtype} {list(expected[name].shape)}: {RESTORE}"
            )
        if not torch.isfinite(tensor).all():
            raise BundleError(f"{name} in {bundle_dir / WEIGHTS} has NaN or infinite values: train again")
    backbone.network.load_state_dict(weights, strict=True)
    return model


def _read_projection(bundle_dir: Path) -> Projection:
    tensors = _read_tensors(bundle_dir / PROJECTION)
    if set(tensors) != {"mean_D", "matrix_DE"}:
        raise BundleError(
            f"{bundle_dir / PROJECTION} has {some(sorted(tensors))}, expected mean_D and matrix_DE: {RESTORE}"
        )
    return Projection(tensors["mean_D"], tensors["matrix_DE"])


def _check_reference(bundle_dir: Path, model: EmbeddingModel) -> None:
    stored = _read_tensors(bundle_dir / REFERENCE).get("embeddings", torch.empty(0))
    computed = reference_embeddings(model).cpu()
    if stored.shape != computed.shape:
        raise BundleError(
            f"{bundle_dir / REFERENCE} has embeddings {list(stored.shape)}, "
            f"expected {list(computed.shape)}: {RESTORE}"
        )
    cosine = functional.cosine_similarity(stored, computed).min().item()
    if not cosine >= MIN_REFERENCE_COSINE:  # so written that NaN is refused as well
        raise BundleError(
            f"{bundle_dir} does not reproduce its reference embeddings: cosine {cosine:.6f}, "
            f"expected {MIN_REFERENCE_COSINE} or more; this machine or its libraries compute something else"
        )


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise BundleError(f"{file} is not in the safetensors format: {RESTORE}") from error


def _json_bytes(values: Mapping[str, Any], *, what: str) -> bytes:
    try:
        return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleError(f"{what} cannot be written as JSON: {error}") from error


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _check_target(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise BundleError(f"{target} exists: choose another name, or allow it to be replaced")
    if not (target / MANIFEST).is_file():
        raise BundleError(f"{target} is not a bundle, and is not replaced: choose another name")


def _write_durably(file: Path, content: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Renames a finished bundle to its name; what it replaces is moved aside first, and back on failure."""
    aside = partial.with_suffix(".replaced")
    if overwrite and target.exists():
        target.rename(aside)
    try:
        partial.rename(target)
    except OSError as error:
        if aside.exists():
            aside.rename(target)
        raise BundleError(
            f"{target} could not be put in place ({errno.errorcode.get(error.errno or 0)})"
        ) from error
    shutil.rmtree(aside, ignore_errors=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
