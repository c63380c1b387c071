"""Back to a state from before the gradients went bad, and on from there in another way.

Steps whose gradients are NaN or infinite touch nothing, but where they don't end, what led to them lies in
the steps before. So the run takes up the newest checkpoint that is older than the first of them. From the
same state the same images and rates would lead to the same place, hence two things differ: images go on from
where they were, so that those of the steps which are given up are not seen again (PaLM went back some 100
steps and left out 200 to 500 batches), and learning rates are smaller (OPT-175B). When the sickness is back
before there is a newer checkpoint, the run goes back further.

All of it follows from the checkpoints and is in the next one, so a run that is killed at any moment does the
same again.

References: Chowdhery et al. 2022, section 5.1, https://arxiv.org/abs/2204.02311; Zhang et al. 2022, section
2.5, https://arxiv.org/abs/2205.01068.
"""

import math
from pathlib import Path

import torch

from dino_core.errors import CollapseError
from training.checkpoint import checkpoints_in, healthy_tensors, restore, step_of, tensors_of
from training.config import RunConfig
from training.distributed import any_of
from training.errors import CheckpointError
from training.guard import Guard, Sickness
from training.loss_scale import LossScale
from training.parts import Parts, save
from training.runlog import MetricsLog
from training.state import Rollback, TrainState, new_state
from training.step import StepMetrics
from training.vitals import sick_parts


def with_lower_rates(config: RunConfig, rollbacks: tuple[Rollback, ...]) -> RunConfig:
    """The settings of a run with the learning rates that its rollbacks have left it."""
    factor = math.prod(one.lr_factor for one in rollbacks)
    optimizer = config.optimizer
    rates = {"peak_lr": optimizer.peak_lr * factor, "end_lr": optimizer.end_lr * factor}
    return config.model_copy(update={"optimizer": optimizer.model_copy(update=rates)})


def go_back(state: TrainState, directory: Path, config: RunConfig) -> Rollback:
    """Puts a state back to before its gradients were sick; without any checkpoint, to the beginning.

    Nothing is written: save the state before the next step. Of several processes all do this together, from
    the same checkpoints.

    Args:
        state: Changed in place, as two of them might not fit into memory.
        directory: Of the run's checkpoints.
        config: Of the run, with the learning rates that it began with.

    Returns:
        What was done; it is in the state too.
    """
    sick_from = state.step - state.nonfinite_in_a_row
    to_step = 0
    for path in _candidates(state, directory, config, before=sick_from):
        try:
            restore(state, healthy_tensors(path, config))
        except CheckpointError:  # it is damaged, or sick itself: the one before it
            continue
        to_step = step_of(path)
        break
    else:
        restore(state, tensors_of(new_state(config, device=torch.device("cpu"))))
    rollback = Rollback(
        sick_from=sick_from,
        from_step=state.step,
        to_step=to_step,
        lr_factor=config.guard.rollback_lr_factor,
    )
    state.step, state.nonfinite_in_a_row = to_step, 0
    state.rollbacks = (*state.rollbacks, rollback)
    state.loss_scale = state.loss_scale and LossScale()  # it fell to the least for the sickness alone
    return rollback


def words_of(rollback: Rollback, *, number: int) -> str:
    """What was done, in a sentence; rollbacks are counted from 1, so that no two have the same."""
    given_up = f"steps {rollback.to_step + 1:,} to {rollback.from_step:,}"
    return (
        f"gradients were NaN or infinite from step {rollback.sick_from + 1:,} on, so the run went back to "
        f"step {rollback.to_step:,}: the images of {given_up} are left out, and learning rates are "
        f"multiplied by {rollback.lr_factor:g} (rollback {number})"
    )


def _candidates(state: TrainState, directory: Path, config: RunConfig, *, before: int) -> list[Path]:
    """Regular checkpoints from before a step, newest first."""
    found = [
        path
        for path in checkpoints_in(directory)
        if step_of(path) < before and step_of(path) % config.checkpoints.every_steps == 0
    ]
    # Where the last rollback led, it did not help; if there is nothing older, smaller rates may.
    if len(found) > 1 and state.rollbacks and step_of(found[0]) == state.rollbacks[-1].to_step:
        return [*found[1:], found[0]]
    return found


def face(sickness: Sickness, metrics: StepMetrics | None, state: TrainState, parts: Parts) -> None:
    """Says what a run suffers from, and stops it if that is wished or there is nothing else to do."""
    guard, sentence = parts.config.guard, sickness.value
    if sickness is Sickness.NOT_FINITE:
        if metrics is not None and metrics.vitals is not None and (where := sick_parts(metrics.vitals)):
            sentence = f"in {where}, {sentence}"
        if len(state.rollbacks) < guard.max_rollbacks:
            parts.screen.say(f"step {state.step}: {sentence}")
            return
        if state.rollbacks:
            sentence = f"{sentence}; going back {len(state.rollbacks)} times did not help"
    if parts.log is not None:
        parts.log.tell_once(state.step, "sickness", sentence)
    sentence = f"step {state.step}: {sentence}"
    if sickness is Sickness.NOT_FINITE or guard.stop:
        raise CollapseError(f"{sentence}. Checkpoints are in {parts.directory.checkpoints}")
    parts.screen.say(sentence)


def take_back(state: TrainState, parts: Parts) -> int:
    """Takes a run back to before its gradients were sick, and says so; gives the step."""
    rollback = go_back(state, parts.directory.checkpoints, parts.config)
    any_of(False, world=parts.world, device=state.device)  # everyone has read before the first writes
    if parts.log is not None:
        parts.directory.keep_given_up(len(state.rollbacks), after_step=rollback.to_step)
    save(state, parts)
    if parts.log is not None:
        parts.log.go_back(rollback.to_step)
        tell_rollbacks(state, parts.log)
    if parts.gallery is not None:
        parts.gallery.go_back(rollback.to_step)
    parts.screen.say(f"step {rollback.from_step}: {words_of(rollback, number=len(state.rollbacks))}")
    return state.step


def tell_rollbacks(state: TrainState, log: MetricsLog) -> None:
    """Holds the log to what the state knows: what one says of a rollback may be lost with a kill."""
    for number, rollback in enumerate(state.rollbacks, 1):
        log.tell_once(rollback.to_step, "rollback", words_of(rollback, number=number))


def guard_of(state: TrainState, config: RunConfig) -> Guard:
    """A guard that knows what the state does."""
    sick_steps = state.nonfinite_in_a_row
    sickness = Sickness.NOT_FINITE if sick_steps else None
    return Guard(config.guard, config.head.num_prototypes, sickness=sickness, lasted_steps=sick_steps)
