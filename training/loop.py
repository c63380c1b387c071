"""A run from its first step, or the one after its checkpoint, to its bundle; no mathematics here."""

import contextlib
import os
import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from dino_core.augment import augment
from training.checkpoint import checkpoints_in, load_newest, step_of
from training.config import RunConfig
from training.data.addresses import name_of
from training.data.images import Images, digests_of
from training.data.loader import Batch
from training.data.opening import open_split
from training.distributed import World, agree_on_step, any_of, join_world, leave_world
from training.errors import ConfigError, DataError, NoImagesCome
from training.evaluation.monitor import make_monitor
from training.export import export_teacher, holds_teacher
from training.guard import Sickness
from training.healing import face, guard_of, take_back, tell_rollbacks, with_lower_rates
from training.loading import findings, open_loader
from training.machine import hold_native_threads, keep_freed_memory
from training.parts import Parts, evaluate, save
from training.report.gallery import Gallery
from training.report.preview import write_preview
from training.report.writing import report_at_the_end
from training.rundir import (
    CHECK_FILE,
    RESULT_FILE,
    RunDirectory,
    RunPlan,
    own_run_directory,
)
from training.runlog import MetricsLog, Pace, Screen, step_line
from training.state import TrainState, new_state
from training.step import train_step, values_at
from training.trackers import open_trackers


def run(plan: RunPlan, run_dir: Path, *, resume: bool, console: Console) -> Path | None:
    """Trains, and writes the bundle.

    Args:
        plan: What to train on what, and where it goes.
        run_dir: Of this run alone.
        resume: Go on from the newest whole checkpoint.
        console: For people; programs read `metrics.jsonl`.

    Returns:
        The bundle, or none if the run was asked to stop before its end.

    Raises:
        TrainingError: Settings, folder, machine or disk are not as they need to be; the message says what to
            do.
        CollapseError: The run has lost its signal.
    """
    device = device_of(plan.config)
    if device.type == "cpu":
        keep_freed_memory()
        hold_native_threads()
    world = join_world(device)
    try:
        with own_run_directory(run_dir, plan, resume=resume, world=world) as directory:
            result = directory.result()
            if result is not None:
                console.print(f"this run is finished: its teacher is {result['bundle']}", soft_wrap=True)
                return Path(str(result["bundle"]))
            if plan.out.exists() and not (resume and _is_trained(directory, plan.config)):
                raise ConfigError(
                    f"{plan.out} is there already: give --out another name, or move it away first"
                )
            return _run_in(directory, plan, device=device, world=world, console=console)
    finally:
        leave_world()


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device that was asked for; `auto` takes a GPU if there is one.

    Raises:
        ConfigError: A GPU was asked for, and there is none, or none for this process.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "a GPU was asked for (device cuda) and PyTorch sees none: use --device auto, or install a "
            "PyTorch that was built for your GPU"
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun's: each process of a machine has its own GPU
    if number >= torch.cuda.device_count():
        raise ConfigError(
            f"torchrun started more processes than PyTorch sees GPUs ({torch.cuda.device_count()}): lower "
            "--nproc-per-node, or use --device cpu"
        )
    return torch.device("cuda", number)


def device_of(config: RunConfig) -> torch.device:
    """The device of a run.

    Raises:
        ConfigError: There is no such GPU, or it is a CPU and fp16 was asked for.
    """
    device = choose_device(config.device)
    if device.type == "cpu" and config.precision == "fp16":
        raise ConfigError(
            "CPUs compute in fp16 four to a hundred times slower than in float32: use --precision float32, "
            "or a GPU"
        )
    return device


def _run_in(
    directory: RunDirectory, plan: RunPlan, *, device: torch.device, world: World, console: Console
) -> Path | None:
    config = plan.config
    images, val_images = open_split(plan.data, plan.val_data)
    if len(images) < 2:
        raise DataError(f"{images.origin} holds one image, and there is nothing to tell it from: add images")
    as_before = not world.is_first or directory.holds_to(digests_of(images))
    state, refused = load_newest(directory.checkpoints, device=device, config=config)
    state = state or new_state(config, device=device)
    agree_on_step(state.step, world=world, device=device)

    # What an earlier process told of later steps is done again; of a run that begins, the beginning too.
    told_to_step = -1 if _begins(state) else state.step

    with contextlib.ExitStack() as stack:
        if world.is_first:
            stack.callback(report_at_the_end, directory.path, console)
        screen = stack.enter_context(
            Screen(
                total_steps=config.steps,
                num_prototypes=config.head.num_prototypes,
                console=console if world.is_first else Console(quiet=True),
            )
        )
        for sentence in refused:
            screen.say(f"passed over: {sentence}")
        if not as_before:
            screen.say("files of the data are newer or of another size than before: as copies, or as others")
        if config.planes() is not None:
            screen.say(_about_planes(config))
        screen.say(_opening(config, images, state, device))
        monitor = log = gallery = None
        if world.is_first:
            if _begins(state):
                _look_at(images, val_images, config, directory, screen)
            write_preview(images, config, directory.path)
            monitor = make_monitor(images, val_images, config.preprocessing(), config.evaluation)
            gallery = Gallery(
                directory.path / "pictures",
                monitor,
                images.class_names,
                from_step=told_to_step,
                say=screen.say,
            )
            trackers = stack.enter_context(
                open_trackers(
                    config.trackers,
                    directory.path,
                    config.model_dump(mode="json"),
                    from_step=told_to_step,
                    say=screen.say,
                )
            )
            log = stack.enter_context(
                MetricsLog(directory.metrics, keep_to_step=told_to_step, trackers=trackers)
            )
            tell_rollbacks(state, log)
        parts = Parts(
            config=config,
            directory=directory,
            images=images,
            loader=stack.enter_context(
                open_loader(images, config, directory.path, world=world, device=device, say=screen.say)
            ),
            monitor=monitor,
            gallery=gallery,
            log=log,
            screen=screen,
            world=world,
        )
        finished = _train(state, parts, stack.enter_context(stop_requests()))
        skipped = parts.loader.skipped | (parts.monitor.skipped if parts.monitor else {})
        _report_skipped(skipped, parts)
        if not finished:
            screen.say(
                f"stopped after step {state.step}; go on with: dino-train run --resume --run-dir "
                f"{directory.path}"
            )
            return None
        if not world.is_first:
            return plan.out
        _write_result(state, skipped, plan, parts)
        return plan.out


def _train(state: TrainState, parts: Parts, stop: "StopRequest") -> bool:
    """Steps, measurements and checkpoints, until the end or a request to stop; says which it was."""
    config = parts.config
    guard, pace = guard_of(state, config), Pace()
    saved_step = -1
    if _begins(state):
        evaluate(state, parts)
    config, batches = with_lower_rates(config, state.rollbacks), _batches_from(state.next_batch, parts)
    while state.step < config.steps and not any_of(stop.requested, world=parts.world, device=state.device):
        waiting_since_s = time.perf_counter()
        epoch, batch = _next(batches, state, parts)
        waited_s = time.perf_counter() - waiting_since_s
        if wrong := guard.look_at(batch.pixels_BCHW):
            face(wrong, None, state, parts)

        values = values_at(state.step, config)
        is_logged = (state.step + 1) % config.log_every_steps == 0 or state.step + 1 == config.steps
        metrics = train_step(
            state,
            views_of(batch, epoch, config=config, device=state.device),
            config=config,
            rank=parts.world.rank,
            closely=is_logged or state.nonfinite_in_a_row > 0,
        )
        pace.step(images=config.batch_size, waited_s=waited_s, now_s=time.perf_counter())

        if parts.log and is_logged:
            parts.log.write(state.step, "step", step_line(metrics, values, pace))
        parts.screen.step(state.step, metrics, pace)
        if sickness := guard.observe(metrics):
            face(sickness, metrics, state, parts)
            if sickness is Sickness.NOT_FINITE:
                saved_step = take_back(state, parts)
                guard, config = guard_of(state, config), with_lower_rates(parts.config, state.rollbacks)
                batches.close()
                batches = _batches_from(state.next_batch, parts)
                pace.pause()
                continue
        if state.step % config.evaluation.every_steps == 0 or state.step == config.steps:
            evaluate(state, parts)
            pace.pause()
        # While steps are skipped there is nothing new to save, and healthy checkpoints to lose.
        due = state.step % config.checkpoints.every_steps == 0 and not state.nonfinite_in_a_row
        if due or state.step == config.steps:
            save(state, parts)
            saved_step = state.step
            pace.pause()
    if saved_step != state.step:
        save(state, parts)
    return state.step >= config.steps


def _write_result(state: TrainState, skipped: dict[str, str], plan: RunPlan, parts: Parts) -> None:
    """Writes the bundle, and that the run is finished."""
    summary = {
        "name": name_of(plan.data),
        "images": len(parts.images),
        "classes": len(parts.images.class_names),
        "skipped": len(skipped),
    }
    if not holds_teacher(plan.out, state):  # else a kill came between the bundle and the result
        export_teacher(state, plan.config, plan.out, directory=parts.directory, data=summary)
    parts.directory.write(RESULT_FILE, {"bundle": str(plan.out), "steps": state.step, "data": summary})
    parts.screen.say(
        f"serve it: dino-serve run --model {plan.out}"
        if plan.config.planes() is None
        else f"measure it: dino-train eval {plan.out} --data DIR"
    )


def _is_trained(directory: RunDirectory, config: RunConfig) -> bool:
    """Whether there is nothing left to do but to write the bundle."""
    return any(step_of(path) >= config.steps for path in checkpoints_in(directory.checkpoints)[:1])


def _begins(state: TrainState) -> bool:
    """Whether nothing was done yet; a run that went back to its beginning has been looked at before."""
    return state.step == 0 and not state.rollbacks


def _batches_from(first: int, parts: Parts) -> Generator[tuple[int, Batch]]:
    """Every batch from one on, with its epoch; the order is a function of its number."""
    epoch, start_batch = divmod(first, parts.loader.batches_per_epoch)
    while True:
        for batch in parts.loader.batches(
            epoch, start_batch=start_batch, rank=parts.world.rank, world_size=parts.world.size
        ):
            yield epoch, batch
        epoch, start_batch = epoch + 1, 0


def _next(batches: Iterator[tuple[int, Batch]], state: TrainState, parts: Parts) -> tuple[int, Batch]:
    try:
        return next(batches)
    except NoImagesCome as error:
        if parts.log is not None:
            parts.log.tell_once(state.step, "sickness", str(error))
        raise


def views_of(batch: Batch, epoch: int, *, config: RunConfig, device: torch.device) -> Iterator[list[Tensor]]:
    """Views of a batch, one accumulated part after the other, so that only one is in memory."""
    part_size = len(batch.indices_B) // config.accumulation_steps
    for pixels_BCHW, sizes_px_B2, indices_B in zip(
        torch.split(batch.pixels_BCHW, part_size),
        torch.split(batch.sizes_px_B2, part_size),
        torch.split(batch.indices_B, part_size),
        strict=True,
    ):
        views = augment(
            pixels_BCHW.to(device, non_blocking=True),
            sizes_px_B2=sizes_px_B2,
            views=config.crops.views(),
            seed=config.seed,
            epoch=epoch,
            indices_B=indices_B,
            mean=config.crops.mean,
            std=config.crops.std,
        )
        yield [view.contiguous(memory_format=torch.channels_last) for view in views]


def _report_skipped(skipped: dict[str, str], parts: Parts) -> None:
    if not parts.world.is_first:
        return
    parts.directory.write("skipped.json", skipped)
    if skipped:
        name, reason = next(iter(skipped.items()))
        parts.screen.say(
            f"{len(skipped)} files could not be read and were left out, first {name} ({reason}); all of "
            f"them are in {parts.directory.path / 'skipped.json'}"
        )


def _opening(config: RunConfig, images: Images, state: TrainState, device: torch.device) -> str:
    classes = f" in {len(images.class_names)} classes" if images.class_names else ""
    verb = f"goes on after step {state.step} of" if state.step else "begins"
    return (
        f"{config.recipe} {verb} {config.steps} steps of {config.batch_size} images on {device}: "
        f"{config.backbone.name}, {config.head.num_prototypes} prototypes; {len(images)} images{classes}"
    )


def _look_at(
    images: Images, val_images: Images | None, config: RunConfig, directory: RunDirectory, screen: Screen
) -> None:
    """Says before the first step what is wrong with the images, and writes which ones."""
    found = findings(images, val_images, config)
    if found is not None:
        report, sentence = found
        directory.write(CHECK_FILE, report.to_json())
        screen.say(f"{sentence}; they are named in {directory.path / CHECK_FILE}")


def _about_planes(config: RunConfig) -> str:
    """What is done otherwise for images that are no RGB pictures."""
    channels = config.backbone.in_channels
    colours = "" if channels == 3 else "; colour jitter and grey are left out, as they are made for RGB"
    scale = zip(config.loading.scale_low, config.loading.scale_high, strict=True)
    ranges = ", ".join(f"{low:g} to {high:g}" for low, high in scale) or "0 to 255"
    return f"images of {channels} channels, scaled to 8 bits from {ranges}{colours}"


@dataclass
class StopRequest:
    """Whether someone asked the run to stop; the step at hand is finished first."""

    requested: bool = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first Ctrl-C or SIGTERM into a request; a second Ctrl-C ends the process as always."""
    stop = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
