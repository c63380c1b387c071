"""Computing activations again changes no gradient, and keeps less."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dino_core.backbones import make_backbone
from dino_core.recompute import recompute_cheap_activations

ROOT = Path(__file__).parents[2]


def gradients(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(3)  # of the dropped paths
    network.train()
    network(images).square().sum().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def vit(*, drop_path: float) -> nn.Module:
    return make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=32,
        drop_path=drop_path,
        model_kwargs={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    ).network


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_gradients_stay_the_same_bit_for_bit(drop_path: float) -> None:
    plain = vit(drop_path=drop_path)
    lean = copy.deepcopy(plain)
    assert recompute_cheap_activations(lean)
    images = torch.randn(6, 3, 32, 32)
    pairs = list(zip(gradients(plain, images), gradients(lean, images), strict=True))
    assert len(pairs) > 30
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


PEAK = """
import sys
from pathlib import Path
import torch
from dino_core.backbones import make_backbone
from dino_core.recompute import recompute_cheap_activations

def peak_kb():  # not getrusage: that begins with the peak of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

network = make_backbone("vit_tiny_patch16_224", image_size_px=96, model_kwargs={"depth": 6}).network
if sys.argv[1] == "lean":
    recompute_cheap_activations(network)
network(torch.zeros(1, 3, 96, 96)).sum().backward()
before = peak_kb()
network(torch.zeros(128, 3, 96, 96)).sum().backward()
print(peak_kb() - before)
"""


def peak_kb(choice: str) -> int:
    # Tensors that are freed go back to the system at once: else the peak is of what malloc has kept, too.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, choice],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_step_needs_less_memory() -> None:
    assert peak_kb("lean") < 0.8 * peak_kb("plain")


def test_names_of_the_state_stay() -> None:
    plain = vit(drop_path=0.0)
    names = list(plain.state_dict())
    recompute_cheap_activations(plain)
    assert list(plain.state_dict()) == names


def test_a_convolutional_network_stays_as_it_is() -> None:
    assert not recompute_cheap_activations(make_backbone("test_resnet").network)
