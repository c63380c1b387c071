"""`kill -9` at many moments of one run, at its file operations too: in the end the same teacher, bit for bit.

The moments are drawn with a seed. A run is killed, goes on, is killed again, and so on; in its middle its
gradients go bad, so that it is killed while it goes back as well.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.training.conftest import MakeConfig, MakeFolder
from training.config import RunConfig
from training.loop import run
from training.rundir import RunPlan
from training.runlog import read_metrics
from training.state import TrainState
from training.step import train_step

FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
POISONED_BATCH = 9


def poisoned_step(state: TrainState, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - passed through
    """A step; behind one batch the student's weights are broken, and all gradients after it are NaN."""
    poisonous = state.next_batch == POISONED_BATCH
    metrics = train_step(state, *arguments, **named)
    if poisonous:
        with torch.no_grad():
            next(state.student.parameters()).fill_(torch.inf)
    return metrics


def train(config: RunConfig, data: Path, folder: Path, name: str, kill_at: int) -> None:
    """In a process of its own: goes on with a run; dies before its `kill_at`th file operation."""
    torch.set_num_threads(1)
    run_dir, out = folder / f"run-{name}", folder / f"out-{name}"
    places = tuple(os.fsencode(path) for path in (run_dir, out))
    operations: list[str] = []

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_OPERATIONS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        # TensorBoard's are a thread's, and come at other moments each time.
        where = os.fsencode(arguments[0])
        if where.startswith(places) and b"tensorboard" not in where:
            operations.append(os.fsdecode(where))
            if len(operations) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    plan = RunPlan(data=data, val_data=None, out=out, config=config)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.loop.train_step", poisoned_step)
        run(plan, run_dir, resume=True, console=Console(quiet=True))
    (folder / f"operations-{name}").write_text("\n".join(operations))


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Processes that need not import everything anew: each takes a second in place of five."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.test_kills"])
    yield context
    with contextlib.suppress(ImportError):
        from multiprocessing import forkserver

        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # it would live as long as pytest


class Killed:
    """A run that is killed and goes on, beside one that is not."""

    def __init__(self, processes: ForkServerContext, config: RunConfig, data: Path, folder: Path) -> None:
        self._processes, self._config, self._data, self._folder = processes, config, data, folder
        assert self.go_on("whole", kill_at=0)
        self.operations = (folder / "operations-whole").read_text().splitlines()

    def go_on(self, name: str, *, kill_at: int) -> bool:
        """Whether it came to its end; else it was killed."""
        process = self._processes.Process(
            target=train, args=(self._config, self._data, self._folder, name, kill_at)
        )
        process.start()
        process.join(timeout=120)
        assert process.exitcode in {0, -signal.SIGKILL}, "it must end well or be killed, and not fail"
        return process.exitcode == 0

    def assert_same(self, name: str) -> None:
        whole, killed = (self._of(one) for one in ("whole", name))
        assert killed[0] == whole[0]
        assert killed[1] == whole[1], "the teachers differ"

    def _of(self, name: str) -> tuple[list[tuple[object, ...]], bytes]:
        lines = read_metrics(self._folder / f"run-{name}/metrics.jsonl")
        told = [(line["step"], line["kind"], line.get("loss_nats"), line.get("words")) for line in lines]
        return sorted(told, key=str), (self._folder / f"out-{name}/model.safetensors").read_bytes()


@pytest.fixture
def killed(
    processes: ForkServerContext, make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> Killed:
    config = make_config(
        steps=16,
        guard={"max_nonfinite_steps": 3, "rollback_lr_factor": 0.5},
        checkpoints={"every_steps": 2, "keep": 1, "keep_every_steps": 4},
        evaluation={"every_steps": 8},
    )
    return Killed(processes, config, make_folder(), tmp_path)


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_teacher(killed: Killed) -> None:
    moments = random.Random(0)
    kills = 0
    while kills < 3 and not killed.go_on("killed", kill_at=moments.randrange(1, len(killed.operations) // 2)):
        kills += 1
    # The worst moments: while the run goes back, and between the bundle and the note that there is one.
    rolling_back = [place for place, one in enumerate(killed.operations, 1) if "-rollback-1.partial" in one]
    finishing = [place for place, one in enumerate(killed.operations, 1) if ".result.json.partial" in one]
    assert not killed.go_on("killed-2", kill_at=rolling_back[1])
    assert killed.go_on("killed-2", kill_at=0)
    assert not killed.go_on("killed-3", kill_at=finishing[0])
    assert killed.go_on("killed-3", kill_at=0)
    assert kills == 3
    assert killed.go_on("killed", kill_at=0)
    for name in ("killed", "killed-2", "killed-3"):
        killed.assert_same(name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_a_kill_before_many_of_its_file_operations(killed: Killed) -> None:
    last = len(killed.operations)
    for kill_at in sorted({*range(1, last, 5), *range(last - 20, last)}):
        name = f"killed-{kill_at}"
        assert not killed.go_on(name, kill_at=kill_at)
        assert killed.go_on(name, kill_at=0)
        killed.assert_same(name)
