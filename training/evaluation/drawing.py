"""Draws that never change: which images are in which part, by the hash of their names alone.

Dimension key: N images
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from training.data.images import Images

FOLDS = 10
_HELD_OUT = 5


def by_hash(images: Images) -> list[int]:
    """Places of the images in an order that depends on their names alone: a draw that never changes."""
    return sorted(range(len(images)), key=lambda index: _hash_of(images.names[index]))


def by_name(images: Images) -> list[int]:
    """Places of the images in the order of their names, so that the order of a list changes nothing."""
    return sorted(range(len(images)), key=lambda index: images.names[index])


def folds_of(names: Sequence[str]) -> Tensor:
    """Which tenth each image is in, int64 [N]."""
    return torch.tensor([_hash_of(name) % FOLDS for name in names], dtype=torch.int64)


def held_out(names: Sequence[str]) -> Tensor:
    """A fifth of the images, bool [N]; it has nothing to do with the tenths."""
    return torch.tensor([_hash_of(name) // FOLDS % _HELD_OUT == 0 for name in names], dtype=torch.bool)


def _hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
