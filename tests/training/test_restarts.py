"""Workers that are killed under `torchrun` cost the steps since the last checkpoint, and nothing else."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from tests.training.conftest import MakeConfig, MakeFolder
from training.checkpoint import checkpoints_in
from training.distributed import World, agree_on_step, launch_name, meet
from training.errors import RunDirectoryError
from training.rundir import RunPlan, begun_by_this_launch, own_run_directory
from training.runlog import read_metrics

ROOT = Path(__file__).parents[2]
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--max-restarts", "2", "--monitor-interval", "0.1", "--nproc-per-node", "2", "-m", "training"),
)
PATIENCE_S = 240


def as_toml(part: dict[str, Any]) -> str:
    """Settings as inline TOML: its scalars, strings and lists are JSON's."""
    pairs = (
        f"{key} = {as_toml(value) if isinstance(value, dict) else json.dumps(value)}"
        for key, value in part.items()
        if value is not None
    )
    return f"{{{', '.join(pairs)}}}"


def launch(folder: Path, data: Path, name: str) -> subprocess.Popen[bytes]:
    """The command of a user; errors and what the run says go to a file."""
    words = ["run", "--data", str(data), "--config", str(folder / "settings.toml")]
    words += ["--run-dir", str(folder / name), "--out", str(folder / f"teacher-{name}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / f"{name}.txt").open("wb") as said:
        return subprocess.Popen([*TORCHRUN, *words], env=environment, stdout=said, stderr=said, cwd=folder)


def worker_of(launcher: subprocess.Popen[bytes], *, rank: int, restarts: int) -> int | None:
    """The process that torchrun started as a rank after so many restarts; none if it isn't there yet."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    asked = {f"RANK={rank}".encode(), f"TORCHELASTIC_RESTART_COUNT={restarts}".encode()}
    for child in children:
        try:
            if asked <= set(Path(f"/proc/{child}/environ").read_bytes().split(b"\0")):
                return int(child)
        except OSError:  # it has just ended
            continue
    return None


def kill_after_checkpoint(
    launcher: subprocess.Popen[bytes], run_dir: Path, *, rank: int, restarts: int
) -> int:
    """SIGKILL to a worker once its attempt has written a checkpoint; the step of the newest one."""
    deadline_s = time.monotonic() + PATIENCE_S
    worker, known = None, set(checkpoints_in(run_dir / "checkpoints"))
    while time.monotonic() < deadline_s and launcher.poll() is None:
        worker = worker or worker_of(launcher, rank=rank, restarts=restarts)
        newer = [path for path in checkpoints_in(run_dir / "checkpoints") if path not in known]
        if worker and newer:
            os.kill(worker, signal.SIGKILL)
            return int(newer[0].name.removeprefix("step-"))
        time.sleep(0.01)
    pytest.fail(f"rank {rank} wrote no checkpoint after restart {restarts}")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers under /proc")
@pytest.mark.timeout(600)
def test_killed_workers_cost_the_steps_since_the_last_checkpoint_and_change_nothing(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    config = make_config(
        steps=80, evaluation={"every_steps": 1000}, checkpoints={"every_steps": 10, "keep": 100}
    )
    settings = config.model_dump(mode="json", exclude_none=True) | {"recipe": "smoke"}
    (tmp_path / "settings.toml").write_text(
        "".join(
            f"{key} = {as_toml(value) if isinstance(value, dict) else json.dumps(value)}\n"
            for key, value in settings.items()
        )
    )
    data = make_folder()
    calm = launch(tmp_path, data, "calm")
    assert calm.wait(timeout=PATIENCE_S) == 0, (tmp_path / "calm.txt").read_text()

    hurt = launch(tmp_path, data, "hurt")
    try:
        begun = [kill_after_checkpoint(hurt, tmp_path / "hurt", rank=1, restarts=0)]
        # Rank 0 owns the run's folder.
        begun.append(kill_after_checkpoint(hurt, tmp_path / "hurt", rank=0, restarts=1))
        assert hurt.wait(timeout=PATIENCE_S) == 0, (tmp_path / "hurt.txt").read_text()
    finally:
        hurt.terminate()
        hurt.wait(timeout=60)

    said = (tmp_path / "hurt.txt").read_text()
    went_on = [int(part.split()[0]) for part in said.split("goes on after step ")[1:]]
    assert len(went_on) == 2
    for killed_after, step in zip(begun, went_on, strict=True):
        assert killed_after <= step <= killed_after + 10, "one more checkpoint may have been on its way"
    lines = [
        line["step"] for line in read_metrics(tmp_path / "hurt" / "metrics.jsonl") if line["kind"] == "step"
    ]
    assert lines == list(range(1, 81)), "each step is logged once"

    newest = [
        tmp_path / name / "checkpoints" / "step-00000080" / "state.safetensors" for name in ("calm", "hurt")
    ]
    assert newest[0].read_bytes() == newest[1].read_bytes()
    teachers = [tmp_path / f"teacher-{name}" / "model.safetensors" for name in ("calm", "hurt")]
    assert teachers[0].read_bytes() == teachers[1].read_bytes()


def test_a_run_goes_on_by_itself_only_under_the_launch_that_began_it(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = RunPlan(data=Path("pictures"), val_data=None, out=Path("models/one"), config=make_config())
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch_name() is None
    for given in (None, "job-7", "none"):
        if given:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", given)
        run_dir = tmp_path / str(given)
        assert not begun_by_this_launch(run_dir), "there is no run yet"
        with own_run_directory(run_dir, plan, resume=False, world=World()):
            pass
        assert begun_by_this_launch(run_dir) is (given is not None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-8")
    assert not begun_by_this_launch(tmp_path / "job-7")
    (tmp_path / "job-7" / "config.json").write_text("{")
    assert not begun_by_this_launch(tmp_path / "job-7")


def test_a_process_alone_agrees_with_itself() -> None:
    agree_on_step(3, world=World(), device=torch.device("cpu"))


def test_processes_that_meet_again_do_not_take_the_words_of_dead_ones() -> None:
    store = HashStore()
    store.set("word/1", "dead")  # of an attempt that was killed, as it is found in torchrun's store
    store.set("answer/dead", "an old name")
    patience = timedelta(seconds=60)
    with ThreadPoolExecutor() as pool:
        names: list[str] = []
        for _ in range(2):
            first = pool.submit(meet, store, rank=0, size=3, patience=patience)
            others = [pool.submit(meet, store, rank=rank, size=3, patience=patience) for rank in (1, 2)]
            names.append(first.result())
            assert [other.result() for other in others] == [names[-1]] * 2
    assert len({"an old name", *names}) == 3


def test_a_process_that_does_not_come_is_named() -> None:
    with pytest.raises(RunDirectoryError, match="1 of 2 processes did not start, first that of rank 1"):
        meet(HashStore(), rank=0, size=2, patience=timedelta())
