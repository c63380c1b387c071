"""A tiny run and a folder of made pictures, for all tests of the trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.config import RunConfig

MakeConfig = Callable[..., RunConfig]
MakeFolder = Callable[..., Path]

# Drop path is on: the one random thing that is no function of the image.
TINY: dict[str, Any] = {
    "recipe": "tiny",
    "steps": 6,
    "batch_size": 4,
    "device": "cpu",
    "log_every_steps": 1,
    "backbone": {
        "name": "vit_tiny_patch16_224",
        "image_size_px": 16,
        "drop_path": 0.3,
        "model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "head": {"num_prototypes": 32, "hidden_dim": 24, "bottleneck_dim": 16},
    "crops": {"global_px": 16, "local_px": 8, "local_count": 2, "blur_sigma_px": [0.1, 0.5]},
    "loss": {"teacher_temperature": 0.07, "teacher_temperature_warmup_steps": 3},
    "teacher": {"momentum_start": 0.9},
    "optimizer": {"peak_lr": 0.01, "warmup_steps": 2, "freeze_last_layer_steps": 1},
    "loading": {"canvas_px": 20, "workers": 0, "cache": "off"},
    "evaluation": {"every_steps": 3, "resize_px": 16, "crop_px": 16, "neighbours": 3},
    "checkpoints": {"every_steps": 2},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of a nested dictionary with some values replaced."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and key != "model_kwargs":
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


@pytest.fixture
def make_config() -> MakeConfig:
    """A run of a few steps of a two-block ViT on the CPU, with changes by keyword."""

    def make(**changes: Any) -> RunConfig:  # noqa: ANN401 - any part of the settings
        return RunConfig.model_validate(merged(TINY, changes))

    return make


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Two classes that differ in their stripes; `corrupt` adds files that are no pictures."""

    def make(
        name: str = "pictures", *, per_class: int = 6, flat: bool = False, corrupt: int = 0, seed: int = 0
    ) -> Path:
        root = tmp_path / name
        noise = np.random.default_rng(seed)
        for label, kind in enumerate(("across", "down")):
            folder = root if flat else root / kind
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                pixels = noise.integers(0, 60, (26, 24, 3)) + 30
                stripes = pixels if label == 0 else pixels.transpose(1, 0, 2)
                stripes[::4] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{kind}-{number}.png")
        for number in range(corrupt):
            (root / "across" / f"broken-{number}.jpg").write_bytes(b"\xff\xd8\xff no picture")
        return root

    return make
