"""A bundle's model as ONNX, for backends that read it: converted once, then found in the user's cache.

A conversion takes 5 to 10 seconds of a core, and reading its result a fraction of one. A file is named by the
model's fingerprint and by the versions that converted it, is written whole or not at all, and begins with its
own SHA-256. It is believed no further than that: each backend is compared with torch before it serves.
"""

import contextlib
import hashlib
import logging
import os
import secrets
from importlib.metadata import version
from pathlib import Path
from typing import Final

from app.users_cache import users_cache
from dino_core.bundle import Bundle
from dino_core.onnx import to_onnx

_DIGEST_BYTES: Final = 32
_KEPT: Final = 4  # files; who trains makes a new model again and again

logger = logging.getLogger(__name__)


def onnx_of(bundle: Bundle, *, cache: Path | None = None) -> bytes:
    """The bundle's model as an ONNX file.

    Args:
        bundle: Loaded on the CPU.
        cache: Directory of converted models; None for the user's.

    Raises:
        ConversionError: See `to_onnx`.
    """
    users = users_cache()
    folder = cache or (users and users / "onnx")
    versions = [f"{name} {version(name)}" for name in ("dinoserve", "torch", "onnx", "onnxscript")]
    name = hashlib.sha256("\n".join([bundle.manifest.fingerprint, *versions]).encode()).hexdigest()
    file = folder / f"{name}.onnx" if folder else None
    data = _read(file) if file else None
    if data is None:
        logger.info("converting %s to ONNX; this takes some seconds", bundle.manifest.id)
        data = to_onnx(bundle.model)
        if file:
            _keep(file, data)
    return data


def _read(file: Path) -> bytes | None:
    """What was kept; None where nothing was, or where it isn't whole."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        logger.warning("%s is damaged and is made anew", file)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # the one used last stays longest
    return data


def _keep(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{secrets.token_hex(4)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(hashlib.sha256(data).digest() + data)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        for old in sorted(file.parent.glob("*.onnx"), key=_used_s)[:-_KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        logger.info("the converted model is not kept, the next start converts again: %s", error)


def _used_s(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process was quicker
        return 0.0
