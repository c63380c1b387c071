"""A model -> an ONNX file, put in place once ONNX Runtime computes from it what torch does."""

import secrets
from pathlib import Path

from dino_core.embedding import EmbeddingModel
from dino_core.onnx import to_onnx
from training.errors import ConfigError


def write_onnx(model: EmbeddingModel, out: Path) -> None:
    """Writes an ONNX file, at once or not at all.

    Args:
        model: In float32, on the CPU.
        out: The file to make.

    Raises:
        ConfigError: Something is at `out`.
        ConversionError: A package is missing, or the result computes something else.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: give --onnx another name, or move it away")
    data = to_onnx(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(data)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
