"""What a run takes, measured by a few of its own steps before anything is spent; nothing is written.

The steps are real: the run's networks, its optimiser, the user's first images, cropped and coloured as the
run would. What can be counted (steps, passes, bytes on disk) is computed; seconds and memory are measured.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from training.checkpoint import most_on_disk, tensors_of
from training.config import RunConfig
from training.data.canvases import Canvas, load_canvas
from training.data.images import Images, UnreadableImage
from training.data.loader import Batch
from training.errors import ConfigError, DataError
from training.export import teacher_model
from training.loop import device_of, views_of
from training.machine import forget_peak_memory, free_memory_bytes, peak_memory_bytes, usable_cores
from training.state import TrainState, new_state
from training.step import train_step

# Images of a measured step on a CPU, where time and memory grow with the batch in a straight line.
_CPU_SAMPLE = 32
_DECODED = 64  # images that are decoded for the measurement; a larger batch repeats them
_STEPS, _BUDGET_S = 5, 40.0  # a minute at most, the first step and the decoding included
_MARGIN = 0.8  # of the free memory: other batches have other crops, and evaluation and cache need some
_FEWEST_UPDATES = 1000
_LARGEST_BATCH = 1024  # the largest that a recipe of this project was published with


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a few steps took.

    Attributes:
        images: Of each of these steps.
        steps_s: Seconds of each, the first one (allocation, kernels that are chosen) left out.
        memory_bytes: The most that was in use: on the GPU, or by this process.
        state_bytes: Tensors that a checkpoint holds.
        evaluation_s: Seconds to embed one image.
        decoding_s: Seconds of one core to decode one image.
    """

    images: int
    steps_s: tuple[float, ...]
    memory_bytes: int
    state_bytes: int
    evaluation_s: float
    decoding_s: float


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run takes.

    Attributes:
        seconds: From the fastest to the slowest that the measured steps allow.
        step_s: Of one step, the median.
        measured_steps: How many were measured.
        measured_images: Images of each; fewer than the batch where the rest follows in a straight line.
        memory_bytes: At its peak.
        free_bytes: Of memory, when it was measured.
        cache_bytes: On disk, for decoded images.
        checkpoint_bytes: On disk, for one checkpoint.
        checkpoints: How many are on disk together at most: one is written before the oldest goes.
    """

    seconds: tuple[float, float]
    step_s: float
    measured_steps: int
    measured_images: int
    memory_bytes: int
    free_bytes: int
    cache_bytes: int
    checkpoint_bytes: int
    checkpoints: int


def sizes_of(config: RunConfig, images: Images) -> Sizes:
    """Measures a few steps of a run, and says what all of it takes.

    Raises:
        ConfigError: A GPU was asked for and is absent, or a step does not fit into its memory.
        DataError: None of the first images can be read.
    """
    device = device_of(config)
    free_bytes = _free_bytes(device)
    sample = config.batch_size if device.type == "cuda" else min(config.batch_size, _CPU_SAMPLE)
    try:
        measured = measure(config, images, device=device, batch_size=sample)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {config.batch_size} images does not fit into the GPU's memory: take --batch-size "
            "auto, or the same batch in --accumulation-steps parts"
        ) from error
    memory_bytes = measured.memory_bytes
    if sample < config.batch_size:
        fewer = measure(config, images, device=device, batch_size=max(2, sample // 4), max_steps=1)
        memory_bytes = _Line.through(fewer, measured, config).at(config.batch_size)
    return Sizes(
        seconds=_seconds(config, measured, num_images=len(images), device=device),
        step_s=median(measured.steps_s) * config.batch_size / sample,
        measured_steps=len(measured.steps_s),
        measured_images=sample,
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        cache_bytes=len(images) * _canvas_bytes(config) if config.loading.cache != "off" else 0,
        checkpoint_bytes=measured.state_bytes,
        checkpoints=most_on_disk(config),
    )


def fitting_batch(config: RunConfig, images: Images, *, steps_are_given: bool) -> tuple[int, str]:
    """Finds the largest batch that fits, within reason.

    Args:
        config: Of the run, with any batch size.
        images: Of the run; its first ones are used.
        steps_are_given: The user has set how many updates there are; else a larger batch makes fewer.

    Returns:
        The batch size, a multiple of 8 where it is above 8, and why it is not larger.

    Raises:
        ConfigError: Several processes would each find their own, or not even two images fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or config.accumulation_steps > 1:
        raise ConfigError(
            "--batch-size auto finds what one process computes at once: run it with --plan in one process "
            "and without accumulation, then give that number times processes and parts"
        )
    device = device_of(config)
    most, because = _most_sensible(config, len(images), steps_are_given=steps_are_given)
    fits = (
        _fits_on_gpu(config, images, device) if device.type == "cuda" else _fits_on_cpu(config, images, most)
    )
    found = largest_that_fits(fits, start=min(16, most), most=most)
    if found < 2:
        raise ConfigError(
            f"not even two images fit into memory with {config.backbone.name} at {config.crops.global_px} "
            "px: take a smaller network, smaller crops, or fewer prototypes"
        )
    if found < most:
        because = f"the largest that fits into {_free_bytes(device) / 1e9:.1f} GB with a margin"
    return found, f"{found:,}: {because}"


def largest_that_fits(fits: Callable[[int], bool], *, start: int, most: int) -> int:
    """The largest number that passes, up to a third: doubled until one fails, then once half of the way back.

    Args:
        fits: Whether a number passes; if one does, so do all smaller ones.
        start: The first that is tried; halved while it fails.
        most: Is not exceeded.

    Returns:
        A number from 1 to `most`, a multiple of 8 where it is above 8; 0 if nothing passes.
    """
    good, bad = 0, most + 1
    count = min(start, most)
    while count >= 1 and count < bad and count > good:
        if fits(count):
            good, count = count, min(2 * count, most)
        else:
            bad, count = count, count // 2
    between = _rounded((good + bad) // 2)
    if good and bad <= most and between > good and fits(between):
        good = between
    return _rounded(good)


def measure(
    config: RunConfig, images: Images, *, device: torch.device, batch_size: int, max_steps: int = _STEPS
) -> Measured:
    """Takes a few steps with a fresh state, and forgets it.

    Raises:
        DataError: None of the first images can be read.
        torch.OutOfMemoryError: They do not fit on the GPU.
    """
    run = config.model_copy(update={"batch_size": batch_size, "accumulation_steps": 1})
    started_s = time.perf_counter()
    canvases = _first_canvases(images, config, count=min(batch_size, _DECODED))
    decoding_s = (time.perf_counter() - started_s) / len(canvases)
    batch = _batch_of(canvases, batch_size)
    _forget_peak(device)
    state = new_state(run, device=device)
    seconds = [_timed_step(state, batch, run, device)]
    while len(seconds) <= max_steps and sum(seconds) * (1 + 1 / len(seconds)) < _BUDGET_S:
        if state.step >= run.steps:
            break
        seconds.append(_timed_step(state, batch, run, device))
    memory_bytes = _peak_bytes(device)
    return Measured(
        images=batch_size,
        steps_s=tuple(seconds[1:] or seconds),
        memory_bytes=memory_bytes,
        state_bytes=sum(tensor.nbytes for tensor in tensors_of(state).values()),
        evaluation_s=_evaluation_s(state, run, device),
        decoding_s=decoding_s,
    )


@dataclass(frozen=True)
class _Line:
    """Memory by the size of the batch on a CPU, through two measurements."""

    base_bytes: float
    image_bytes: float

    @classmethod
    def through(cls, fewer: Measured, more: Measured, config: RunConfig) -> "_Line":
        # Not less than an image's canvas and its crops in float32, with room for one copy: a peak that
        # something else made would hide them.
        pixels = 2 * config.crops.global_px**2 + config.crops.local_count * config.crops.local_px**2
        floor = _canvas_bytes(config) + 2 * 4 * config.backbone.in_channels * pixels
        slope = (more.memory_bytes - fewer.memory_bytes) / max(1, more.images - fewer.images)
        image_bytes = max(floor, slope)
        return cls(max(0.0, more.memory_bytes - more.images * image_bytes), image_bytes)

    def at(self, batch_size: int) -> int:
        return round(self.base_bytes + batch_size * self.image_bytes)


def _fits_on_cpu(config: RunConfig, images: Images, most: int) -> Callable[[int], bool]:
    device, free_bytes = torch.device("cpu"), free_memory_bytes()
    # A system without memory does not refuse, it kills: so two small batches are measured, and no large one.
    fewer, more = (
        measure(config, images, device=device, batch_size=count, max_steps=1)
        for count in (min(4, max(2, most // 2)), min(16, most))
    )
    line = _Line.through(fewer, more, config)
    return lambda count: line.at(count) <= _MARGIN * free_bytes


def _most_sensible(config: RunConfig, num_images: int, *, steps_are_given: bool) -> tuple[int, str]:
    """The largest batch that could do good, and why."""
    limits = [
        (max(2, num_images // 10), f"a tenth of the {num_images:,} images; more memory would take more"),
        (_LARGEST_BATCH, "more was never needed, though it would fit"),
    ]
    if not steps_are_given:
        seen = config.steps * config.batch_size
        limits.append(
            (
                max(2, seen // _FEWEST_UPDATES),
                f"the {seen:,} images that the recipe looks at make {_FEWEST_UPDATES:,} updates, which is "
                "few; more memory would take more",
            )
        )
    most, because = min(limits)
    return min(_rounded(most), num_images), because


def _fits_on_gpu(config: RunConfig, images: Images, device: torch.device) -> Callable[[int], bool]:
    def fits(count: int) -> bool:
        free_bytes = _free_bytes(device)
        try:
            measured = measure(config, images, device=device, batch_size=count, max_steps=1)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return measured.memory_bytes <= _MARGIN * free_bytes

    return fits


def _seconds(
    config: RunConfig, measured: Measured, *, num_images: int, device: torch.device
) -> tuple[float, float]:
    """The whole run, if its steps are as fast as the fastest measured one, or as slow as the slowest."""
    scale = config.batch_size / measured.images
    threads = max(1, min(config.loading.workers, usable_cores()))
    decode_batch_s = measured.decoding_s * config.batch_size / threads
    counted, once_s = 0.0, measured.decoding_s * _evaluated(config, num_images)
    if config.loading.cache != "off":
        once_s += measured.decoding_s * num_images / usable_cores()
    elif device.type == "cpu":  # decoding and training share the cores
        counted = measured.decoding_s * config.batch_size / usable_cores()
    evaluations = 1 + -(-config.steps // config.evaluation.every_steps)
    once_s += evaluations * measured.evaluation_s * _evaluated(config, num_images)
    low, high = (
        once_s
        + config.steps
        * max(step_s * scale + counted, 0.0 if config.loading.cache != "off" else decode_batch_s)
        for step_s in (min(measured.steps_s), max(measured.steps_s))
    )
    # A machine that has other work now and then was seen to vary by a tenth over a run.
    return low, 1.1 * high


def _evaluated(config: RunConfig, num_images: int) -> int:
    return min(num_images, config.evaluation.max_bank_images + config.evaluation.max_query_images)


def _first_canvases(images: Images, config: RunConfig, *, count: int) -> list[Canvas]:
    """The first images that can be read, fewer than `count` if there are no more."""
    canvases: list[Canvas] = []
    reason = ""
    for index in range(min(len(images), 4 * count)):
        try:
            canvases.append(
                load_canvas(images, index, canvas_px=config.loading.canvas_px, planes=config.planes())
            )
        except UnreadableImage as error:
            reason = f"{images.names[index]}: {error}"
        if len(canvases) == count:
            break
    if not canvases:
        raise DataError(f"none of the first images in {images.origin} can be read; {reason}")
    return canvases


def _batch_of(canvases: list[Canvas], batch_size: int) -> Batch:
    chosen = [canvases[row % len(canvases)] for row in range(batch_size)]
    return Batch(
        torch.stack([canvas.pixels_CHW for canvas in chosen]).contiguous(),
        torch.tensor([canvas.size_px for canvas in chosen], dtype=torch.int64),
        torch.arange(batch_size),
    )


def _timed_step(state: TrainState, batch: Batch, config: RunConfig, device: torch.device) -> float:
    _wait_for(device)
    started_s = time.perf_counter()
    train_step(state, views_of(batch, 0, config=config, device=device), config=config)
    _wait_for(device)
    return time.perf_counter() - started_s


def _evaluation_s(state: TrainState, config: RunConfig, device: torch.device) -> float:
    """Seconds to embed one image as the k-NN during the run does."""
    side = config.evaluation.crop_px
    count = 32 if device.type == "cuda" else 4
    pixels_BCHW = torch.zeros(
        count, config.backbone.in_channels, side, side, dtype=torch.uint8, device=device
    )
    model = teacher_model(state, config)
    _wait_for(device)
    started_s = time.perf_counter()
    with torch.no_grad():
        model(pixels_BCHW)
    _wait_for(device)
    return (time.perf_counter() - started_s) / count


def _canvas_bytes(config: RunConfig) -> int:
    return config.backbone.in_channels * config.loading.canvas_px**2


def _rounded(count: int) -> int:
    return count // 8 * 8 if count > 8 else count


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak_memory()


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes()
