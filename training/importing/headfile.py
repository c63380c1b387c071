"""The head beside a bundle: `models/NAME.head.safetensors`, with which self-distillation goes on.

A bundle is what is served, and holds no head. What came along with an imported teacher lies beside it,
bound to it by the bundle's fingerprint: `teacher.…` and `student.…`, with the names of `dino_core.heads`.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.errors import ConfigError
from training.importing.heads import Heads

_FINGERPRINT = "bundle_fingerprint"


def head_file(bundle: Path) -> Path:
    """Where the head of a bundle is, if it has one."""
    return bundle.parent / f"{bundle.name}.head.safetensors"


def write_heads(bundle: Path, heads: Heads, *, fingerprint: str) -> Path:
    """Writes heads beside their bundle: at once, or not at all.

    Args:
        bundle: Its directory.
        heads: At least the teacher's.
        fingerprint: Of the bundle.
    """
    file = head_file(bundle)
    tensors = _prefixed("teacher", heads.teacher) | _prefixed("student", heads.student)
    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt", _FINGERPRINT: fingerprint})
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def heads_beside(bundle: Path, *, fingerprint: str) -> Heads:
    """Reads the heads of a bundle; empty ones if there are none.

    Raises:
        ConfigError: The file beside it cannot be read, or belongs to another bundle.
    """
    file = head_file(bundle)
    if not file.is_file():
        return Heads(teacher={}, student={})
    try:
        with safe_open(file, framework="pt") as content:
            of = (content.metadata() or {}).get(_FINGERPRINT)
            names = list(content.keys())
            tensors = {name: content.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{file} cannot be read as tensors: import the model again, or take it away"
        ) from error
    if of != fingerprint:
        raise ConfigError(
            f"{file} is the head of another bundle ({of} in place of {fingerprint}): take it away to begin "
            "with a fresh head"
        )
    return Heads(
        teacher={
            name.removeprefix("teacher."): t for name, t in tensors.items() if name.startswith("teacher.")
        },
        student={
            name.removeprefix("student."): t for name, t in tensors.items() if name.startswith("student.")
        },
    )


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor.float().contiguous().clone() for name, tensor in tensors.items()}
