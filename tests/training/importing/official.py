"""Checkpoints as the official code writes them, made here."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden" / "dino_reference.safetensors"


def golden(prefix: str) -> dict[str, Tensor]:
    """Of the official tiny ViT; see the golden file's README."""
    found = load_file(GOLDEN)
    return {name.removeprefix(prefix): t for name, t in found.items() if name.startswith(prefix)}


def drawn_head(
    in_dim: int, *, prototypes: int = 40, seed: int = 0, norm_last_layer: bool = True
) -> dict[str, Tensor]:
    """A head's tensors by the official names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "mlp.0.weight": (24, in_dim),
        "mlp.0.bias": (24,),
        "mlp.2.weight": (24, 24),
        "mlp.2.bias": (24,),
        "mlp.4.weight": (16, 24),
        "mlp.4.bias": (16,),
        "last_layer.weight_v": (prototypes, 16),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["last_layer.weight_g"] = torch.full((prototypes, 1), 1.0 if norm_last_layer else 1.5)
    return tensors


def full_checkpoint(
    backbone: Mapping[str, Tensor],
    heads: Mapping[str, Mapping[str, Tensor]],
    *,
    student: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """All that `main_dino.py` saves: a wrapped student, the run's arguments, numpy's numbers.

    Args:
        backbone: The teacher's tensors, by the official names.
        heads: Tensors of the heads of `teacher` and `student`.
        student: The student's backbone; the teacher's if not given.
    """

    def parts(tensors: Mapping[str, Tensor], head: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}backbone.{name}": t for name, t in tensors.items()} | {
            f"{prefix}head.{name}": t for name, t in head.items()
        }

    return {
        "student": parts(student or backbone, heads["student"], "module."),
        "teacher": parts(backbone, heads["teacher"], ""),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.0005), "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, lr=0.0005, global_crops_scale=(0.4, 1.0)),
        "dino_loss": {"center": torch.zeros(1, 40)},
        "fp16_scaler": {"scale": 65536.0},
    }


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())
