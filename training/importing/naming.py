"""Other people's names of tensors -> timm's, each taken, or left out for a reason that is told."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from training.errors import ConfigError

# Patterns of whole names, each with what becomes of it; the first that fits counts.
Rules = Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Named:
    """Tensors under timm's names.

    Attributes:
        tensors: What the network is made of.
        ignored: What was left out: its name in the source, and why.
        renamed: How many tensors of the source have another name now, or are part of another tensor.
    """

    tensors: dict[str, Tensor]
    ignored: dict[str, str]
    renamed: int


def without(tensors: Mapping[str, Tensor], reasons: Rules) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Leaves out what fits a pattern.

    Returns:
        The rest; and for each name left out the reason.
    """
    ignored: dict[str, str] = {}
    for name in tensors:
        for pattern, reason in reasons:
            if re.fullmatch(pattern, name):
                ignored[name] = reason
                break
    return {name: tensor for name, tensor in tensors.items() if name not in ignored}, ignored


def renamed(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Gives tensors their new names; those that fit no pattern keep theirs.

    Raises:
        ConfigError: Two tensors would have the same name.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rules:
            new, count = re.subn(f"^(?:{pattern})$", replacement, name)
            if count:
                break
        if new in result:
            raise ConfigError(
                f"two tensors are the network's {new}, one of them {name}: give a state dict of one"
            )
        result[new] = tensor
    return result


def some(names: Iterable[str]) -> str:
    """Writes out the first of many names for a message."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
