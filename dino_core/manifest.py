"""What a bundle says of itself, and whether its files are those that it speaks of.

Everything here reads bytes that may be damaged, foreign or hostile, and answers with a BundleError.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from dino_core.backbones import Pooling
from dino_core.errors import BundleError
from dino_core.preprocess import Preprocessing
from dino_core.vit import PositionInterpolation

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
REFERENCE = "reference.safetensors"
PROJECTION = "projection.safetensors"
CARD = "README.md"
MAX_JSON_BYTES = 4 * 2**20
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESTORE = "restore the bundle from where it came, or export it again"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What stands in manifest.json.

    Attributes:
        format_version: Of the bundle; this code reads FORMAT_VERSION.
        id: The model's name: that of its directory when it was written.
        architecture: timm's name of the backbone.
        model_args: timm's further arguments.
        image_size_px: What the backbone was built for.
        position_interpolation: See `make_backbone`.
        embedding_dimension: Length of an embedding.
        pooling: See `EmbeddingModel`.
        normalise: See `EmbeddingModel`.
        preprocessing: From bytes to the model's input.
        fingerprint: "sha256:..." over all that decides an embedding; see `fingerprint_of`.
        files: SHA-256 of every other file in the bundle, by name.
        provenance: Where the model came from; any JSON.
    """

    format_version: int = FORMAT_VERSION
    id: str
    architecture: str
    model_args: dict[str, Any]
    image_size_px: int
    position_interpolation: PositionInterpolation
    embedding_dimension: int
    pooling: Pooling
    normalise: bool
    preprocessing: Preprocessing
    fingerprint: str
    files: dict[str, str]
    provenance: dict[str, Any]


def read_manifest(path: Path | str) -> Manifest:
    """Reads and checks manifest.json; looks at no other file.

    Raises:
        BundleError: There is none, or it is not one that this version reads.
    """
    bundle_dir = Path(path)
    if not bundle_dir.is_dir():
        raise BundleError(f"{bundle_dir} is no directory: give the directory of a model bundle")
    values = read_json(bundle_dir / MANIFEST)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{bundle_dir} has format version {version!r}, this version of dinoserve reads {FORMAT_VERSION}: "
            "update dinoserve, or export the model again"
        )
    names = {field.name for field in fields(Manifest)}
    if set(values) != names:
        raise BundleError(
            f"{bundle_dir / MANIFEST} does not have the fields of a manifest: "
            f"missing {sorted(names - set(values))}, unknown {sorted(set(values) - names)}"
        )
    _check_types(bundle_dir / MANIFEST, values)
    try:
        preprocessing = Preprocessing.from_json(values["preprocessing"])
    except ValueError as error:
        raise BundleError(f"{bundle_dir / MANIFEST} has a preprocessing that is not ours: {error}") from error
    return Manifest(**{**values, "preprocessing": preprocessing})


def verify_files(path: Path | str) -> None:
    """Checks the SHA-256 of every file that the manifest names; loads nothing.

    Raises:
        BundleError: A file is missing, changed, or named in a way that leads out of the bundle.
    """
    bundle_dir, manifest = Path(path), read_manifest(path)
    if absent := sorted({WEIGHTS, CONFIG, REFERENCE, CARD} - set(manifest.files)):
        raise BundleError(f"{bundle_dir / MANIFEST} does not list {some(absent)}: {RESTORE}")
    for name, sha256 in manifest.files.items():
        if not PLAIN_NAME.fullmatch(name):
            raise BundleError(f"{bundle_dir / MANIFEST} lists a file {name!r}: only plain names are allowed")
        file = bundle_dir / name
        if not file.is_file():
            raise BundleError(f"{file} is missing: {RESTORE}")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise BundleError(f"{file} has changed: its SHA-256 is {found}, expected {sha256}; {RESTORE}")


def _check_types(file: Path, values: Mapping[str, Any]) -> None:
    """Holds a manifest's values against their types: a foreign one must not fail somewhere deep inside."""
    problems = [
        name
        for name, kind in {
            "id": str,
            "architecture": str,
            "model_args": dict,
            "image_size_px": int,
            "embedding_dimension": int,
            "normalise": bool,
            "preprocessing": dict,
            "fingerprint": str,
            "files": dict,
            "provenance": dict,
        }.items()
        if not isinstance(values[name], kind)
    ]
    if values["pooling"] not in get_args(Pooling):
        problems.append("pooling")
    if values["position_interpolation"] not in get_args(PositionInterpolation):
        problems.append("position_interpolation")
    if problems:
        raise BundleError(f"{file} has a wrong kind of value in {some(problems)}: {RESTORE}")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object of a bundle, if it is one and of a sane size."""
    if not file.is_file():
        raise BundleError(f"{file} is missing: is {file.parent} a model bundle?")
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise BundleError(
            f"{file} has {size:,} bytes, at most {MAX_JSON_BYTES:,} are read: it is no such file of ours"
        )
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file} is not JSON: {RESTORE}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{file} holds a JSON {type(values).__name__}, expected an object: {RESTORE}")
    return values


def some(names: list[str]) -> str:
    """Writes out the first of many names for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
