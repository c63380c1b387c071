"""One update of student, teacher and centre: the whole method on one screen.

Everything that changes is in the `TrainState`; everything that follows from the step's number is in
`StepValues`.

Dimension key: T teacher views · S student views · B images · C channels · H W pixels · K prototypes

Reference: Caron et al. 2021, algorithm 1, https://arxiv.org/abs/2104.14294
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from dino_core.batchnorm import shared_batch_norm
from dino_core.collapse import prototype_usage
from dino_core.losses import (
    all_reduced,
    dino_loss,
    sharpen,
    teacher_entropy,
    teacher_logits_sum,
    updated_center,
)
from dino_core.optim import clip_gradients, drop_last_layer_gradients
from dino_core.products import FastProducts
from dino_core.schedules import cosine, linear_warmup, warmup_cosine
from dino_core.teacher import batch_statistics, update_teacher
from training.config import RunConfig
from training.distributed import average_gradients
from training.starting import backbone_parameters
from training.state import TrainState
from training.vitals import Vitals, distance, gradient_norms, vitals_of

TEACHER_VIEWS = 2


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What the schedules say at one step."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    last_layer_frozen: bool
    backbone_frozen: bool


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step measured.

    Attributes:
        loss_nats: Cross-entropy; entropy + KL.
        teacher_entropy_nats: Mean entropy of the targets.
        kl_nats: What training removes; 0 means that the teacher says the same of every image.
        prototype_usage: Share of the prototypes that the batch uses, from 1/K to 1.
        gradient_norm: Of all gradients, before clipping.
        is_finite: Whether the step was taken; otherwise nothing but the step's number changed.
        overflowed: Whether gradients were too large for float16 at the loss scale, which was halved then;
            that is no sickness.
        loss_scale: What the loss was multiplied by; 1 but for fp16.
        vitals: More, where it was asked for.
    """

    loss_nats: float
    teacher_entropy_nats: float
    kl_nats: float
    prototype_usage: float
    gradient_norm: float
    is_finite: bool
    overflowed: bool = False
    loss_scale: float = 1.0
    vitals: Vitals | None = None


def values_at(step: int, config: RunConfig) -> StepValues:
    """Evaluates every schedule; there is nothing else to restore when a run resumes."""
    optimizer, loss, total_steps = config.optimizer, config.loss, config.steps
    return StepValues(
        learning_rate=warmup_cosine(
            step,
            peak=optimizer.peak_lr,
            end=optimizer.end_lr,
            total_steps=total_steps,
            warmup_steps=optimizer.warmup_steps,
        ),
        weight_decay=cosine(
            step, start=optimizer.weight_decay_start, end=optimizer.weight_decay_end, total_steps=total_steps
        ),
        teacher_momentum=cosine(
            step,
            start=config.teacher.momentum_start,
            end=config.teacher.momentum_end,
            total_steps=total_steps,
        ),
        teacher_temperature=linear_warmup(
            step // loss.teacher_temperature_hold_steps,
            start=loss.teacher_temperature_start,
            end=loss.teacher_temperature,
            warmup_steps=loss.teacher_temperature_warmup_steps // loss.teacher_temperature_hold_steps,
        ),
        last_layer_frozen=step < optimizer.freeze_last_layer_steps,
        backbone_frozen=step < optimizer.head_warmup_steps,
    )


def train_step(
    state: TrainState,
    parts: Iterable[Sequence[Tensor]],
    *,
    config: RunConfig,
    rank: int = 0,
    closely: bool = False,
) -> StepMetrics:
    """Trains the student on one batch, then moves teacher and centre towards it.

    A batch may come in parts that are computed one after the other: their gradients are averaged, and the
    centre moves once, to the mean of all of them. Where a gradient is not finite, the batch is left out:
    weights, buffers, teacher and centre stay as they were.

    Args:
        state: Changed in place.
        parts: For each part of equally many images its views [B,C,H,W], the teacher's two first, on the
            state's device.
        config: Of the run; the schedules are evaluated at the state's step.
        rank: Of this process, so that processes drop different paths.
        closely: Measure `vitals` too, which changes nothing of the step.

    Returns:
        What was measured, averaged over the parts, of this process.
    """
    now = values_at(state.step, config)
    buffers_before = state.buffers()
    state.optimizer.zero_grad(set_to_none=True)
    measured: list[Tensor] = []
    scale = state.loss_scale.value if state.loss_scale else 1.0
    logits_sum_K, logits_count = torch.zeros_like(state.center_K), torch.zeros((), device=state.device)

    frozen = config.backbone.norm_statistics == "frozen"
    by_batch = state.teacher.head if frozen else state.teacher
    gpus = [state.device] if state.device.type == "cuda" else []
    with FastProducts(), shared_batch_norm(), torch.random.fork_rng(devices=gpus):
        torch.manual_seed(_seed_of(config.seed, state.step, rank))  # drop path has no generator of its own
        for views in parts:
            with _autocast(state.device, config), torch.no_grad(), batch_statistics(by_batch):
                teacher_logits_TBK = state.teacher(views[:TEACHER_VIEWS])
            probs_TBK = sharpen(teacher_logits_TBK, state.center_K, temperature=now.teacher_temperature)
            with _autocast(state.device, config):
                student_logits_SBK = state.student(views)
            loss = dino_loss(
                student_logits_SBK, probs_TBK, student_temperature=config.loss.student_temperature
            )
            (loss * scale).backward()  # type: ignore[no-untyped-call]

            part_sum_K, part_count = teacher_logits_sum(teacher_logits_TBK)
            logits_sum_K, logits_count = logits_sum_K + part_sum_K, logits_count + part_count
            measured.append(
                torch.stack([loss.detach(), teacher_entropy(probs_TBK), prototype_usage(probs_TBK)])
            )

    _join_gradients(state, now, divisor=len(measured) * scale)
    norms_by_part = gradient_norms(state.student) if closely else None
    gradient_norm = _clip_gradients(state, config, now)
    is_finite = bool(torch.isfinite(gradient_norm))
    if is_finite:
        state.set_rates(learning_rate=now.learning_rate, weight_decay=now.weight_decay)
        state.optimizer.step()
        update_teacher(state.teacher, state.student, momentum=now.teacher_momentum)
        logits_sum_K, logits_count = all_reduced(logits_sum_K, logits_count)
        state.center_K = updated_center(
            state.center_K, logits_sum_K, logits_count, momentum=config.loss.center_momentum
        )
    else:
        state.restore_buffers(buffers_before)
    state.step += 1
    overflowed = not is_finite and state.loss_scale is not None and state.loss_scale.can_fall
    state.nonfinite_in_a_row = 0 if is_finite or overflowed else state.nonfinite_in_a_row + 1
    state.loss_scale = state.loss_scale and state.loss_scale.after(is_finite=is_finite)

    loss_nats, entropy_nats, usage = torch.stack(measured).mean(dim=0).tolist()
    return StepMetrics(
        loss_nats=loss_nats,
        teacher_entropy_nats=entropy_nats,
        kl_nats=loss_nats - entropy_nats,
        prototype_usage=usage,
        gradient_norm=float(gradient_norm),
        is_finite=is_finite,
        overflowed=overflowed,
        loss_scale=scale,
        vitals=vitals_of(distance(state.student, state.teacher), norms_by_part)
        if norms_by_part is not None
        else None,
    )


def _join_gradients(state: TrainState, now: StepValues, *, divisor: float) -> None:
    """Divides gradients by parts and loss scale, averages over processes, and drops a frozen backbone's."""
    if now.backbone_frozen:  # before the clipping: its gradients shall not shorten those of the head
        for parameter in backbone_parameters(state.student):
            parameter.grad = None
    parameters = _with_gradients(state)
    if divisor != 1:
        torch._foreach_div_(
            [parameter.grad for parameter in parameters if parameter.grad is not None], divisor
        )
    average_gradients(parameters)


def _clip_gradients(state: TrainState, config: RunConfig, now: StepValues) -> Tensor:
    """Clips gradients, and lets prototypes that are frozen rest; gives the norm of all before."""
    clip = config.optimizer.clip
    gradient_norm = clip_gradients(
        _with_gradients(state),
        max_norm=float("inf") if clip == "none" else config.optimizer.clip_norm,
        mode="global" if clip == "none" else clip,
    )
    if now.last_layer_frozen:
        drop_last_layer_gradients(state.student)
    return gradient_norm


def _with_gradients(state: TrainState) -> list[Parameter]:
    return [parameter for parameter in state.student.parameters() if parameter.grad is not None]


def _autocast(device: torch.device, config: RunConfig) -> torch.autocast:
    half = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=half, enabled=config.precision != "float32")


def _seed_of(seed: int, step: int, rank: int) -> int:
    """A number that no two steps or processes share; neighbouring seeds give unrelated ones."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:7], "big")
