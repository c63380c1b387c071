"""Files of tensors, read without running anything that stands in them.

PyTorch's files are pickles, and a pickle is a program. They are read with `weights_only`, which builds
tensors and plain values and refuses every other name. Checkpoints of the official DINO code hold three
more: the arguments of its run (`argparse.Namespace`), and learning rates as numpy's numbers, which are a
dtype and some bytes. These are read as blanks: the names lead to `_Blank` below, which does nothing with
what it is given, so neither argparse nor numpy is called by a file, and what stood there is gone. Nothing
here needs it.
"""

import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.errors import ConfigError

TENSOR_FILES = (".safetensors", ".pth", ".pt", ".bin")
_BLANKS = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",  # before numpy 2
    "numpy._core.multiarray.scalar",
)
# What wrappers put before every name: DistributedDataParallel, torch.compile.
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
_NESTED = ("state_dict", "model", "model_ema")


class _Blank:
    """In place of what a checkpoint holds besides tensors; keeps nothing and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The tensors of one file, by the names that they have there, without the wrappers' prefixes.

    Attributes:
        network: The teacher's where the file tells teacher and student apart.
        student: The student's; empty where the file doesn't.
        left: Whatever else is in the file, and is not looked at.
    """

    network: dict[str, Tensor]
    student: dict[str, Tensor]
    left: tuple[str, ...] = ()


def read_contents(file: Path) -> Contents:
    """Reads a file of tensors.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    content = read_file(file)
    student: Mapping[str, Any] = {}
    left: set[str] = set()
    if isinstance(content.get("teacher"), Mapping):
        student = content["student"] if isinstance(content.get("student"), Mapping) else {}
        left = set(content) - {"teacher", "student"}
        content = content["teacher"]
    for key in _NESTED:
        if isinstance(content.get(key), Mapping):
            left |= set(content) - {key}
            content = content[key]
    network = _tensors(content, file)
    if any(name.startswith("teacher.") for name in network):
        left |= {name for name in network if not name.startswith(("teacher.", "student."))}
        student, network = _under("student.", network), _under("teacher.", network)
    return Contents(
        network=network,
        student=_tensors(student, file) if student else {},
        left=tuple(sorted(str(key) for key in left)),
    )


def read_file(file: Path) -> dict[str, Any]:
    """Reads what a file holds at its top: names and, mostly, tensors.

    Raises:
        ConfigError: It cannot be read, or holds no names.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with (
            warnings.catch_warnings(action="ignore"),  # of torch's, at files that are refused with a sentence
            torch.serialization.safe_globals([(_Blank, name) for name in _BLANKS]),
        ):
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" (it asks for {found[1]})" if found else ""
        raise ConfigError(
            f"{file} is damaged, or holds more than tensors{what}, which is never run; save its tensors as "
            "safetensors"
        ) from error
    except Exception as error:  # a damaged file makes the readers fail in many ways
        if not isinstance(error, (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError)):
            raise
        raise ConfigError(
            f"{file} cannot be read as tensors ({type(error).__name__}): it is damaged or cut short; fetch "
            "it again"
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{file} holds no tensors by name: give a state dict, or a dictionary with one")
    return {str(name): value for name, value in content.items()}


def _tensors(content: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConfigError(f"{file} holds no tensors by name: give a state dict, or a dictionary with one")
    return {_WRAPPERS.sub("", str(name)): tensor for name, tensor in content.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
