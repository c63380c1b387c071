"""A real service in a process of its own, on a tiny bundle of random weights; and pictures to send it."""

import contextlib
import io
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_core.backbones import make_backbone
from dino_core.bundle import write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing

ROOT = Path(__file__).parents[2]
_URL = re.compile(r"http://127\.0\.0\.1:\d+")


def write_tiny_bundle(path: Path, *, seed: int = 0) -> Path:
    """A bundle that loads in no time; another seed is another model."""
    torch.manual_seed(seed)
    backbone = make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=32,
        model_kwargs={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    )
    model = EmbeddingModel(backbone, preprocessing=Preprocessing(resize_px=36, crop_px=32), pooling="cls")
    write_bundle(path, model, provenance={}, card="# A tiny network of random weights\n")
    return path


def picture(seed: int, *, format: str = "JPEG") -> bytes:
    """Noise over a gradient, of its own for each seed."""
    rng = np.random.default_rng(seed)
    height_px, width_px = rng.integers(30, 90, 2)
    gradient = np.linspace(0, 150, width_px)[None, :, None] * rng.random(3)
    pixels = (gradient + rng.random((height_px, width_px, 3)) * 100).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@dataclass
class Service:
    """A process that serves.

    Attributes:
        url: Where.
        process: To kill.
        log: What it said.
    """

    url: str
    process: "subprocess.Popen[str]"
    log: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running_service(bundle: Path, data_dir: Path, *flags: str, module: str = "app") -> Iterator[Service]:
    """Starts a service on a free port, waits until it answers, and kills it at the end."""
    command = [sys.executable, "-m", module, "run", "--model", str(bundle), "--data-dir", str(data_dir)]
    with subprocess.Popen(
        [*command, "--port", "0", *flags], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stderr is not None
        log: list[str] = []
        try:
            for line in process.stderr:
                log.append(line)
                if found := _URL.search(line):
                    break
            else:
                raise AssertionError(f"the service did not start: {''.join(log)}")
            # Read on, or its pipe fills and it stops at a log line.
            reader = threading.Thread(target=log.extend, args=(process.stderr,))
            reader.start()
            yield Service(found.group(), process, log)
        finally:
            process.kill()
            process.wait()
            if "reader" in locals():
                reader.join()
