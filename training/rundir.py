"""The folder of a run: one run, one process, and a reader can tell what it was.

runs/NAME/
    config.json      every setting, resolved, where data and bundle are, and which launch began the run
    data.json        how many images there were, and hashes of their names and stamps
    check.json       what was wrong with the images that were looked at before the first step
    metrics.jsonl    one line a logged step or evaluation
    rolled-back-N.jsonl  lines of the steps that the Nth rollback gave up (training.healing)
    checkpoints/     see training.checkpoint
    skipped.json     files that could not be read, with the reason
    preview.png      what the networks see of a few images
    pictures/        what the teacher sees of a few images, at each evaluation (training.report.gallery)
    tensorboard/     the log once more, for TensorBoard
    report.html      the run's account of itself, written when it ends or stops
    result.json      there when the run is finished: the bundle and its measurements
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import JsonValue, ValidationError

from training.checkpoint import checkpoints_in, step_of, sync_directory, write_synced
from training.config import RunConfig, sentence_of
from training.data.addresses import Where, where
from training.distributed import World, launch_name
from training.errors import RunDirectoryError
from training.runlog import read_metrics, write_lines

CONFIG_FILE = "config.json"
CHECK_FILE = "check.json"
DATA_FILE = "data.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What to train on what, and where it goes.

    Attributes:
        data: Images: a folder, a list, or files that hold them.
        val_data: Labelled images to measure with, if it isn't inside `data`.
        out: Where the bundle goes.
        config: All settings.
        reasons: Why settings are what they are, by their dotted names, where the recipe has reasons.
    """

    data: Where
    val_data: Where | None
    out: Path
    config: RunConfig
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """A run's folder that this process owns."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log, a JSON object a line."""
        return self.path / "metrics.jsonl"

    def result(self) -> dict[str, JsonValue] | None:
        """What the run ended with, if it is finished."""
        path = self.path / RESULT_FILE
        if not path.exists():
            return None
        result: dict[str, JsonValue] = json.loads(path.read_bytes())
        return result

    def holds_to(self, data: Mapping[str, str | int]) -> bool:
        """Keeps what the data of a new run is, and holds a resumed one to it: its order depends on the names.

        Args:
            data: As `training.data.images.digests_of` gives it.

        Returns:
            Whether the images are the same by their stamps too, which a copy of a folder does not keep.

        Raises:
            RunDirectoryError: There are more images, or fewer, or others.
        """
        path = self.path / DATA_FILE
        if not path.exists():
            self.write(DATA_FILE, data)
            return True
        before = json.loads(path.read_bytes())
        if (before["images"], before["names"]) != (data["images"], data["names"]):
            other = "others" if before["images"] == data["images"] else f"{data['images']:,}"
            raise RunDirectoryError(
                f"the data of the run in {self.path} had {before['images']:,} images and has {other} now: "
                "put it back as it was, or start a new run in another --run-dir"
            )
        return bool(before["stamps"] == data["stamps"])

    def keep_given_up(self, rollback: int, *, after_step: int) -> None:
        """Keeps the lines of the log that a rollback, counted from 1, is about to take away, to look at."""
        given_up = [line for line in read_metrics(self.metrics) if line["step"] > after_step]
        write_lines(self.path / f"rolled-back-{rollback}.jsonl", given_up)

    def write(self, name: str, value: Mapping[str, object]) -> None:
        """Writes a JSON file, all or nothing."""
        temporary = self.path / f".{name}.partial"
        write_synced(temporary, json.dumps(value, indent=1).encode())
        temporary.rename(self.path / name)
        sync_directory(self.path)


@contextlib.contextmanager
def own_run_directory(path: Path, plan: RunPlan, *, resume: bool, world: World) -> Iterator[RunDirectory]:
    """Takes a run's folder for this process until the end of the block.

    Args:
        path: The folder; made if it isn't there.
        plan: Written as `config.json` by a new run.
        resume: Whether a run that is there goes on.
        world: Of several processes only the first takes and writes it.

    Raises:
        RunDirectoryError: Another process has it, or there is a run and `resume` is off.
    """
    if not world.is_first:
        yield RunDirectory(path)
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("a+")
    except OSError as error:
        raise RunDirectoryError(
            f"{path} cannot be used as run directory ({error.strerror}): give --run-dir a folder that can "
            "be written"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise RunDirectoryError(
                f"a run is already going on in {path} ({owner}): wait for it, or give this one another "
                "--run-dir"
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()}\n")
        lock.flush()
        directory = RunDirectory(path)
        if not resume:
            _refuse_old_run(directory)
            (path / DATA_FILE).unlink(missing_ok=True)
            directory.write(CONFIG_FILE, _json_of(plan))
        yield directory


def read_plan(run_dir: Path) -> RunPlan:
    """What a run in a folder was told to do.

    Raises:
        RunDirectoryError: There is no run, or its settings cannot be read.
    """
    path = run_dir / CONFIG_FILE
    try:
        saved = json.loads(path.read_bytes())
        return RunPlan(
            data=where(saved["data"]),
            val_data=where(saved["val_data"]) if saved["val_data"] else None,
            out=Path(saved["out"]),
            config=RunConfig.model_validate(saved["config"]),
            reasons=dict(saved.get("reasons", {})),
        )
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"there is no run to resume in {run_dir} ({CONFIG_FILE} is missing): leave out --resume to "
            "start one"
        ) from error
    except ValidationError as error:
        raise RunDirectoryError(f"{path} is of another version: {sentence_of(error)}") from error
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise RunDirectoryError(f"{path} cannot be read: start a new run in another --run-dir") from error


def begun_by_this_launch(run_dir: Path) -> bool:
    """Whether the run in a folder is one that this `torchrun` began before it started its workers anew."""
    launch = launch_name()
    if launch is None:
        return False
    try:
        saved = json.loads((run_dir / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(saved, dict) and saved.get("launch") == launch


def _refuse_old_run(directory: RunDirectory) -> None:
    path = directory.path
    result = directory.result()
    if result is not None:
        raise RunDirectoryError(
            f"{path} holds a finished run, whose teacher is {result['bundle']}: give the new one another "
            "--run-dir"
        )
    checkpoints = checkpoints_in(directory.checkpoints)
    if checkpoints:
        raise RunDirectoryError(
            f"{path} holds a run that stopped after step {step_of(checkpoints[0])}: go on "
            "with --resume, or give the new one another --run-dir"
        )
    foreign = {entry.name for entry in path.iterdir()} - {
        "lock",
        CONFIG_FILE,
        CHECK_FILE,
        DATA_FILE,
        "metrics.jsonl",
        "skipped.json",
        "preview.png",
        "report.html",
        "trackers.json",
    }
    if foreign - {"checkpoints", "cache", "pictures", "tensorboard", "wandb"}:
        raise RunDirectoryError(
            f"{path} is not empty (it holds {sorted(foreign)[0]}): give --run-dir a new or empty folder"
        )


def _json_of(plan: RunPlan) -> dict[str, object]:
    return {
        "data": str(plan.data),
        "val_data": str(plan.val_data) if plan.val_data else None,
        "out": str(plan.out),
        "config": plan.config.model_dump(mode="json"),
        "reasons": dict(plan.reasons),
        "launch": launch_name(),
    }
