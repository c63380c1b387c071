"""A `TrainState` on disk: whole, checked, or refused.

    checkpoints/step-00001200/
        state.safetensors   every tensor of the state, by name
        state.json          format, step, settings of the run, SHA-256 of the tensors

A checkpoint appears under its name only when all of it is on the disk, so a crash leaves the one before it.
After a run has gone back to an earlier state (training.healing) names end in -rollback-1, -rollback-2, …, and
those of a later one are newer, whatever their step.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from training.config import CheckpointConfig, RunConfig, differences, sentence_of
from training.errors import CheckpointError
from training.loss_scale import LossScale
from training.state import Rollback, TrainState, new_state

FORMAT = "dinoserve-checkpoint"
FORMAT_VERSION = 1
TENSORS_FILE = "state.safetensors"
DESCRIPTION_FILE = "state.json"


def save_checkpoint(directory: Path, state: TrainState, config: RunConfig) -> Path:
    """Writes a checkpoint, then removes those that `config.checkpoints` doesn't keep.

    Args:
        directory: Of all checkpoints of the run.
        state: Anything between two steps.
        config: Of the run.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written, as on a full disk; checkpoints that were there stay.
    """
    final = directory / _name_of(state)
    temporary = directory / f".{final.name}.partial"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors = safetensors.torch.save(tensors_of(state))
        description = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "nonfinite_in_a_row": state.nonfinite_in_a_row,
            "rollbacks": [asdict(one) for one in state.rollbacks],
            "loss_scale": asdict(state.loss_scale) if state.loss_scale else None,
            "sha256": hashlib.sha256(tensors).hexdigest(),
            "config": config.model_dump(mode="json"),
        }
        write_synced(temporary / TENSORS_FILE, tensors)
        write_synced(temporary / DESCRIPTION_FILE, json.dumps(description, indent=1).encode())
        _put_in_place(temporary, final, tensors)
        sync_directory(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {state.step} cannot be written to {directory} ({error.strerror}): make "
            "room or set --run_dir to another disk, then go on with --resume from the checkpoint before"
        ) from error
    _remove_old(directory, state, config.checkpoints)
    return final


def _name_of(state: TrainState) -> str:
    ending = f"-rollback-{len(state.rollbacks)}" if state.rollbacks else ""
    return f"step-{state.step:08d}{ending}"


def _put_in_place(temporary: Path, final: Path, tensors: bytes) -> None:
    """Gives a written checkpoint its name. At no moment is there none where there was a whole one."""
    if final.exists():
        # The run went on from it and was stopped at once; or it was passed over, being damaged.
        if (final / TENSORS_FILE).exists() and (final / TENSORS_FILE).read_bytes() == tensors:
            (temporary / DESCRIPTION_FILE).replace(final / DESCRIPTION_FILE)
            shutil.rmtree(temporary)
            return
        shutil.rmtree(final)
    temporary.rename(final)


def _remove_old(directory: Path, state: TrainState, config: CheckpointConfig) -> None:
    """Leaves the newest, and those that are kept for good; never one that the run has gone back behind.

    One that a stop wrote between two others goes with the next: it shall not take the place of one that a
    run which was never stopped would have, and could go back to.
    """
    there = checkpoints_in(directory)
    given_up = [path for path in there if _is_given_up(path, state)]
    found = [path for path in there if path not in given_up]
    regular = [path for path in found if step_of(path) % config.every_steps == 0]
    for_good = [
        path for path in regular if config.keep_every_steps and step_of(path) % config.keep_every_steps == 0
    ]
    for old in {*given_up, *found[1:]} - {*regular[: config.keep], *for_good}:
        shutil.rmtree(old, ignore_errors=True)


def _is_given_up(path: Path, state: TrainState) -> bool:
    """Whether a rollback that came after a checkpoint led to a step before it, or to the same state."""
    later = state.rollbacks[_rollbacks_of(path) :]
    return any(step_of(path) >= rollback.to_step for rollback in later)


def most_on_disk(config: RunConfig) -> int:
    """How many checkpoints a run has on disk together at most: one is written before the oldest goes."""
    kept = config.checkpoints
    written = -(-config.steps // kept.every_steps)
    for_good = config.steps // kept.keep_every_steps if kept.keep_every_steps else 0
    return min(written, kept.keep + for_good) + 1


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(path.name.split("-")[1])


def _rollbacks_of(path: Path) -> int:
    return int(path.name.split("-")[3]) if "-rollback-" in path.name else 0


def checkpoints_in(directory: Path) -> list[Path]:
    """Folders of complete checkpoints, newest first."""
    found = [*directory.glob("step-????????"), *directory.glob("step-????????-rollback-*")]
    return sorted(found, key=lambda path: (_rollbacks_of(path), step_of(path)), reverse=True)


def load_checkpoint(
    path: Path, *, device: torch.device, config: RunConfig | None = None
) -> tuple[TrainState, RunConfig]:
    """Reads a checkpoint, all or nothing.

    Args:
        path: Its folder.
        device: Where the state will live.
        config: If given, what the checkpoint's networks must have been made with.

    Returns:
        The state, and the settings of its run.

    Raises:
        CheckpointError: It is missing, half-written, damaged, of another program, or of other networks.
    """
    description, saved, tensors_file = _read(path)
    if config is not None:
        _refuse_other_networks(path, saved, config)
    # Its own weights are in the checkpoint; those that it began with need not be there any more.
    own = saved.model_copy(update={"backbone": saved.backbone.model_copy(update={"weights": None})})
    state = new_state(own, device=device)
    with _foreign_tensors_refused(path):
        restore(state, safetensors.torch.load(tensors_file))
    state.step = int(description["step"])
    state.nonfinite_in_a_row = int(description["nonfinite_in_a_row"])
    state.rollbacks = tuple(Rollback(**one) for one in description.get("rollbacks", []))
    state.loss_scale = LossScale(**description["loss_scale"]) if description.get("loss_scale") else None
    return state, saved


def healthy_tensors(path: Path, config: RunConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the same run, on the CPU.

    Raises:
        CheckpointError: As of `load_checkpoint`; or a tensor holds NaN or infinity.
    """
    _, saved, tensors_file = _read(path)
    _refuse_other_networks(path, saved, config)
    with _foreign_tensors_refused(path):
        tensors = safetensors.torch.load(tensors_file)
    sick = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if sick:
        raise CheckpointError(f"{path} has NaN or infinity in {sick[0]}")
    return tensors


def _read(path: Path) -> tuple[dict[str, Any], RunConfig, bytes]:
    """The description of a checkpoint, its settings, and its tensors, which are as they were written."""
    description = _description_of(path)
    try:
        tensors_file = (path / TENSORS_FILE).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path / TENSORS_FILE} cannot be read: the checkpoint is half-written"
        ) from error
    if hashlib.sha256(tensors_file).hexdigest() != description["sha256"]:
        raise CheckpointError(
            f"{path / TENSORS_FILE} is not what was written (its SHA-256 differs): it is damaged"
        )
    try:
        saved = RunConfig.model_validate(description["config"])
    except ValidationError as error:
        raise CheckpointError(
            f"{path} has settings that this version refuses: {sentence_of(error)}"
        ) from error
    return description, saved, tensors_file


def load_newest(
    directory: Path, *, device: torch.device, config: RunConfig
) -> tuple[TrainState | None, list[str]]:
    """The newest checkpoint that is whole; each that is not is passed over.

    Returns:
        The state, or none if there is no checkpoint at all, and a sentence for each that was refused.

    Raises:
        CheckpointError: There are checkpoints, and none is whole.
    """
    refused: list[str] = []
    for path in checkpoints_in(directory):
        try:
            return load_checkpoint(path, device=device, config=config)[0], refused
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(f"no checkpoint in {directory} can be used; the newest: {refused[0]}")
    return None, []


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until renames in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """All that a checkpoint holds, by its names there: networks, the optimiser's moments, the centre."""
    tensors: dict[str, Tensor] = {"center": state.center_K}
    for role, network in (("student", state.student), ("teacher", state.teacher)):
        tensors |= {f"{role}.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in state.student.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def restore(state: TrainState, tensors: dict[str, Tensor]) -> None:
    """Fills a state of the same networks, in place; a tensor too many or too few is an error."""
    state.optimizer.state.clear()
    state.center_K.copy_(tensors.pop("center"))
    for role, network in (("student", state.student), ("teacher", state.teacher)):
        names = [name for name in tensors if name.startswith(f"{role}.")]
        network.load_state_dict(
            {name.removeprefix(f"{role}."): tensors.pop(name) for name in names}, strict=True
        )
    parameters = dict(state.student.named_parameters())
    for full_name, tensor in tensors.items():
        kind, key, name = full_name.split(".", 2)
        if kind != "optimizer":
            raise KeyError(full_name)
        parameter = parameters[name]
        # As the optimiser would have made it: the parameter's memory layout, but for its scalar counter.
        empty = torch.empty_like(parameter) if tensor.shape == parameter.shape else torch.empty_like(tensor)
        state.optimizer.state[parameter][key] = empty.to(parameter.device).copy_(tensor).detach()


def _description_of(path: Path) -> dict[str, Any]:
    try:
        description = json.loads((path / DESCRIPTION_FILE).read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path / DESCRIPTION_FILE} cannot be read: {path} is no checkpoint, or a half-written one"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path / DESCRIPTION_FILE} is not JSON: the checkpoint is half-written"
        ) from error
    found = (
        (description.get("format"), description.get("format_version"))
        if isinstance(description, dict)
        else None
    )
    if found != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} says that its format is {found}, and this version reads {(FORMAT, FORMAT_VERSION)}: "
            "was it written by another program?"
        )
    missing = {"step", "nonfinite_in_a_row", "sha256", "config"} - set(description)
    if missing:
        raise CheckpointError(f"{path / DESCRIPTION_FILE} lacks {', '.join(sorted(missing))}: it is damaged")
    return dict(description)


def _refuse_other_networks(path: Path, saved: RunConfig, config: RunConfig) -> None:
    for part in ("backbone", "head", "optimizer"):
        if getattr(saved, part) != getattr(config, part):
            changed = [change for change in differences(saved, config) if change.startswith(f"{part}.")]
            raise CheckpointError(
                f"{path} was made with other settings: {', '.join(changed)}; resume with those of the "
                "checkpoint, or start a new run in another --run_dir"
            )


@contextlib.contextmanager
def _foreign_tensors_refused(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"the tensors of {path} are not those of its settings: it is damaged or of another version"
        ) from error
