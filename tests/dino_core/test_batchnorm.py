"""BatchNorm over the batches of two real processes equals torch's over one batch."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from dino_core.batchnorm import shared_batch_norm

ROOT = Path(__file__).parents[2]
# Each process takes its rows of the inputs, and answers with what came out on the way there and back.
SCRIPT = """
import sys
from pathlib import Path
from safetensors.torch import load_file, save_file
from torch import distributed
from dino_core.batchnorm import shared_batch_norm
from tests.dino_core.test_batchnorm import LAYERS, measured
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for name in LAYERS:
    given = {key: value.tensor_split([3])[rank] for key, value in load_file(folder / name).items()}
    with shared_batch_norm():
        save_file(measured(name, given), folder / f"{name}-{rank}")
distributed.destroy_process_group()
"""
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "pictures": (lambda: nn.BatchNorm2d(4), (8, 4, 5, 3), torch.float64),
    "embeddings": (lambda: nn.BatchNorm1d(6), (7, 6), torch.float64),
    "without scale": (lambda: nn.BatchNorm2d(4, affine=False), (8, 4, 5, 3), torch.float64),
    "without statistics": (lambda: nn.BatchNorm1d(6, track_running_stats=False), (7, 6), torch.float64),
    "with activation": (lambda: BatchNormAct2d(4), (8, 4, 5, 3), torch.float64),
    "far from zero": (lambda: nn.BatchNorm2d(4), (8, 4, 5, 3), torch.float32),
    "in half": (lambda: nn.BatchNorm2d(4), (8, 4, 5, 3), torch.bfloat16),
}


def measured(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a layer gives, the gradients of inputs and parameters, and its buffers afterwards."""
    make, _, dtype = LAYERS[name]
    layer = make().to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.linspace(0.5, 2.0 + number, parameter.numel()))
    inputs = given["inputs"].requires_grad_()
    outputs = layer(inputs)
    assert outputs.dtype == dtype
    torch.autograd.backward(outputs, given["gradient"])
    found = {"outputs": outputs.detach(), "inputs' gradient": inputs.grad}
    found |= {f"{key}'s gradient": parameter.grad for key, parameter in layer.named_parameters()}
    found |= {key: buffer for key, buffer in layer.named_buffers() if buffer.is_floating_point()}
    return {key: value.contiguous() for key, value in found.items() if value is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and what two processes made of three rows and the rest."""
    folder = tmp_path_factory.mktemp("batchnorm")
    generator = torch.Generator().manual_seed(1)
    for name, (_, shape, dtype) in LAYERS.items():
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + torch.arange(
            shape[0]
        ).view(-1, *[1] * (len(shape) - 1))
        if name == "far from zero":
            inputs += 1000
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        save_file({"inputs": inputs.to(dtype), "gradient": gradient.to(dtype)}, folder / name)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", SCRIPT, str(folder)]
    processes = [subprocess.Popen([*words, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    return folder


@pytest.mark.parametrize("name", LAYERS)
def test_two_processes_with_unequal_shares_give_what_one_gives(folder: Path, name: str) -> None:
    whole = measured(name, load_file(folder / name))
    first, second = (load_file(folder / f"{name}-{rank}") for rank in range(2))
    assert whole.keys() == first.keys() == second.keys()
    # float32 at 1000 and bfloat16 keep three and two digits of what is left without the mean.
    tolerance = {"far from zero": 1e-3, "in half": 2e-2}.get(name, 1e-10)
    for key, expected in whole.items():
        if key in ("outputs", "inputs' gradient"):
            found = torch.cat([first[key], second[key]])
        elif key.endswith("gradient"):
            found = first[key] + second[key]
        else:
            found = first[key]
            assert torch.equal(found, second[key]), "running statistics stay one"
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=f"{name}: {key}")


def test_a_process_alone_and_a_layer_at_rest_are_torchs() -> None:
    layer = nn.BatchNorm1d(3)
    rows = torch.randn(5, 3)
    for training in (True, False):
        layer.train(training)
        with shared_batch_norm():
            ours = layer(rows)
        assert torch.equal(ours, layer(rows))
