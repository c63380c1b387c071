"""Several processes train as one; a single one needs nothing of it."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.training.conftest import MakeConfig, MakeFolder
from training.checkpoint import checkpoints_in
from training.distributed import World, any_of, average_gradients, join_world, leave_world

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from training.config import RunConfig
from training.loop import run
from training.rundir import RunPlan
folder, data, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
config = RunConfig.model_validate_json((folder / "config.json").read_text())
plan = RunPlan(data=data, val_data=None, out=folder / f"out-{name}", config=config)
run(plan, folder / f"run-{name}", resume=False, console=Console(stderr=True))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start(
    folder: Path, data: Path, name: str, *, rank: int = 0, size: int = 1, port: int = 0
) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    words = [sys.executable, "-c", SCRIPT, str(folder), str(data), name]
    return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("networks", "tolerance"),
    [
        # Drop path is drawn by each process for itself, so it is off.
        pytest.param({"backbone": {"drop_path": 0.0}}, 1e-5, id="no BatchNorm"),
        pytest.param(
            {
                "backbone": {"name": "test_resnet", "drop_path": 0.0, "model_kwargs": {}},
                "head": {"batch_norm": True},
            },
            1e-4,  # variances of a few values may be small, and blow rounding up
            id="BatchNorm in backbone and head",
        ),
    ],
)
def test_two_processes_go_the_way_of_one(
    networks: dict[str, Any],
    tolerance: float,
    make_config: MakeConfig,
    make_folder: MakeFolder,
    tmp_path: Path,
) -> None:
    # SGD, as Adam blows rounding up.
    config = make_config(
        **networks,
        optimizer={"name": "sgd", "peak_lr": 0.1, "clip": "global"},
        evaluation={"every_steps": 100},
    )
    (tmp_path / "config.json").write_text(config.model_dump_json())
    data, port = make_folder(), free_port()
    runs = [start(tmp_path, data, "one")]
    runs += [start(tmp_path, data, "two", rank=rank, size=2, port=port) for rank in (0, 1)]
    assert [process.wait(timeout=200) for process in runs] == [0, 0, 0]
    one, two = (
        load_file(checkpoints_in(tmp_path / f"run-{name}" / "checkpoints")[0] / "state.safetensors")
        for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Only the order of sums differs: 1e-5 is a thousand times less than the weights move.
        torch.testing.assert_close(two[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def test_a_process_alone_joins_and_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for environment in ({}, {"WORLD_SIZE": "1"}):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert join_world(cpu) == World(rank=0, size=1)
    layer = nn.BatchNorm1d(2)
    layer.weight.grad = torch.ones(2)
    average_gradients(layer.parameters())
    assert torch.equal(layer.weight.grad, torch.ones(2))
    assert any_of(True, world=World(), device=cpu)
    assert not any_of(False, world=World(), device=cpu)
    leave_world()
