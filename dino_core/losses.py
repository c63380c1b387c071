"""The objective of DINO: sharpening, centring, and the cross-entropy between crops.

Pure functions: the centre goes in and comes out, so an evaluation moves nothing and a loss can be computed
twice.

Dimension key: T teacher views · S student views · B images · K prototypes

Reference: Caron et al. 2021, https://arxiv.org/abs/2104.14294 (equations 1-4, algorithm 1, section 5.3)
"""

from typing import cast

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def sharpen(teacher_logits_TBK: Tensor, center_K: Tensor, *, temperature: float) -> Tensor:
    """Turns the teacher's outputs into targets: centred, then sharpened by a low temperature.

        softmax((logits - center) / temperature) over K

    Centring keeps one prototype from winning always; sharpening keeps all from winning equally.

    Args:
        teacher_logits_TBK: Head outputs of the teacher, any leading axes.
        center_K: Running mean of the teacher's outputs.
        temperature: Above 0, and below the student's; DINO warms it up from 0.04 to 0.07.

    Returns:
        Probabilities of the same shape, without gradient, in float32 (float64 for float64 inputs) even under
        autocast; each row sums to 1.

    Raises:
        ValueError: The temperature is not positive, or the centre has another number of prototypes.
    """
    if not temperature > 0:
        raise ValueError(f"the teacher's temperature is {temperature}, and must be above 0")
    if center_K.shape != teacher_logits_TBK.shape[-1:]:
        raise ValueError(
            f"the centre has shape {tuple(center_K.shape)} and the logits have "
            f"{teacher_logits_TBK.shape[-1]} prototypes: both must come from one head"
        )
    logits_TBK = _full_precision(teacher_logits_TBK.detach())
    return torch.softmax((logits_TBK - center_K) / temperature, dim=-1)


def dino_loss(student_logits_SBK: Tensor, teacher_probs_TBK: Tensor, *, student_temperature: float) -> Tensor:
    """Cross-entropy of each teacher view against every student view of another crop.

        for t in teacher views:
            for s in student views, s != t:
                total += mean over B of -(p[t] * log_softmax(z[s] / temperature)).sum(K)
        return total / number of (t, s) pairs

    What is computed is the same and cheaper: cross-entropy is linear in its target, so each student view
    meets the sum of its targets once, and `-q . log_softmax(x) = logsumexp(x) * sum(q) - q . x` needs no
    tensor of log probabilities. One view is worked on at a time, and only the logits are kept for the
    gradient.

    Args:
        student_logits_SBK: Head outputs of all crops; the first T are the teacher's crops, in the same order.
        teacher_probs_TBK: Sharpened, centred teacher outputs; each row sums to 1. Taken as constants: no
            gradient flows to them.
        student_temperature: Above 0; DINO uses 0.1.

    Returns:
        A scalar, in nats, at least the teacher's mean entropy. Computed in float32 (float64 for float64
        logits) even under autocast; the gradient has the logits' dtype.

    Raises:
        ValueError: The shapes don't fit, or there is no pair of different crops to compare.

    Reference: Caron et al. 2021, eq. 3, https://arxiv.org/abs/2104.14294
    """
    if not student_temperature > 0:
        raise ValueError(f"the student's temperature is {student_temperature}, and must be above 0")
    if student_logits_SBK.ndim != 3 or student_logits_SBK.shape[1:] != teacher_probs_TBK.shape[1:]:
        raise ValueError(
            f"student logits of shape {tuple(student_logits_SBK.shape)} and teacher probabilities of shape "
            f"{tuple(teacher_probs_TBK.shape)} must be [views, images, prototypes], the last two alike"
        )
    if student_logits_SBK.shape[0] < max(teacher_probs_TBK.shape[0], 2):
        raise ValueError(
            f"{len(student_logits_SBK)} student views and {len(teacher_probs_TBK)} teacher views leave no "
            "pairs of different crops: the student must see all of the teacher's views, and at least two"
        )
    loss = _PairwiseCrossEntropy.apply(student_logits_SBK, teacher_probs_TBK.detach(), student_temperature)
    return cast(Tensor, loss)


class _Kept(FunctionCtx):
    """What the backward pass is given, in names that a type checker can see; torch makes the object."""

    saved_tensors: tuple[Tensor, Tensor]
    temperature: float
    weight: float


class _PairwiseCrossEntropy(torch.autograd.Function):
    """`dino_loss` with its gradient by hand: (softmax(z / temperature) * sum(q) - q) / temperature, per view.

    Autograd would keep three more tensors of the logits' size until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: _Kept, student_logits_SBK: Tensor, teacher_probs_TBK: Tensor, temperature: float
    ) -> Tensor:
        num_views, num_images = student_logits_SBK.shape[:2]
        all_targets_BK = teacher_probs_TBK.sum(dim=0)
        totals_S = []
        for view in range(num_views):
            scaled_BK = _full_precision(student_logits_SBK[view]) / temperature
            target_BK = _targets_of(view, teacher_probs_TBK, all_targets_BK)
            log_normaliser_B = torch.logsumexp(scaled_BK, dim=-1)
            cross_entropy_B = log_normaliser_B * target_BK.sum(dim=-1) - scaled_BK.mul_(target_BK).sum(dim=-1)
            totals_S.append(cross_entropy_B.sum())
        ctx.save_for_backward(student_logits_SBK, teacher_probs_TBK)
        ctx.temperature = temperature
        ctx.weight = 1 / (_number_of_pairs(num_views, len(teacher_probs_TBK)) * num_images)
        return torch.stack(totals_S).sum() * ctx.weight

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, loss_gradient: Tensor) -> tuple[Tensor, None, None]:
        student_logits_SBK, teacher_probs_TBK = ctx.saved_tensors
        gradient_SBK = torch.empty_like(student_logits_SBK)
        all_targets_BK = teacher_probs_TBK.sum(dim=0)
        scale = loss_gradient * (ctx.weight / ctx.temperature)
        for view in range(len(student_logits_SBK)):
            scaled_BK = _full_precision(student_logits_SBK[view]) / ctx.temperature
            target_BK = _targets_of(view, teacher_probs_TBK, all_targets_BK)
            # Not exp(scaled - log normaliser): at logits of 35 nats that would cost three of float32's seven
            # digits.
            probs_BK = torch.softmax(scaled_BK, dim=-1)
            gradient_BK = probs_BK.mul_(target_BK.sum(dim=-1, keepdim=True)).sub_(target_BK)
            gradient_SBK[view] = gradient_BK.mul_(scale)
        return gradient_SBK, None, None


def teacher_logits_sum(teacher_logits_TBK: Tensor) -> tuple[Tensor, Tensor]:
    """What the centre needs to know of a batch: the sum of the teacher's outputs, and how many there were.

    Sums and counts of several micro-batches add, and those of several processes are added by `all_reduced`; a
    mean would forget how much each weighs.

    Args:
        teacher_logits_TBK: Head outputs of the teacher, any leading axes.

    Returns:
        The sum over all but the last axis [K] and the number of rows (a scalar on the same device), both in
        float32 (float64 for float64 logits), without gradient.
    """
    logits_NK = _full_precision(teacher_logits_TBK.detach()).flatten(0, -2)
    return logits_NK.sum(dim=0), torch.tensor(len(logits_NK), dtype=logits_NK.dtype, device=logits_NK.device)


def all_reduced(logits_sum_K: Tensor, logits_count: Tensor) -> tuple[Tensor, Tensor]:
    """Adds sums and counts over all processes, in one message; a single process gets its own back.

    Args:
        logits_sum_K: Sum of this process's teacher outputs.
        logits_count: How many; below 2**24, where float32 counts exactly. It may differ between processes.

    Returns:
        Sum and count over all processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return logits_sum_K, logits_count
    message = torch.cat([logits_sum_K, logits_count.reshape(1)])
    torch.distributed.all_reduce(message)
    return message[:-1], message[-1]


def updated_center(
    center_K: Tensor, logits_sum_K: Tensor, logits_count: Tensor | float, *, momentum: float
) -> Tensor:
    """Moves the centre towards the mean of the teacher's outputs.

        momentum * center + (1 - momentum) * logits_sum / logits_count

    Args:
        center_K: The centre so far; starts as zeros, and is part of what a checkpoint keeps.
        logits_sum_K: Sum over everything that the teacher saw since the last update, on all processes.
        logits_count: How many outputs the sum has; above 0.
        momentum: From 0 (only the last batch counts) to 1 (never moves); DINO uses 0.9, and 0.999 collapses.

    Returns:
        The new centre, a new tensor.

    Reference: Caron et al. 2021, eq. 4, https://arxiv.org/abs/2104.14294
    """
    return center_K * momentum + (logits_sum_K / logits_count) * (1 - momentum)


def teacher_entropy(teacher_probs_TBK: Tensor) -> Tensor:
    """Mean entropy of the targets, the part of the loss that the student cannot remove.

    Args:
        teacher_probs_TBK: Rows that sum to 1, any leading axes.

    Returns:
        A scalar in nats: 0 when each row is one prototype, log K when all rows are uniform. A run whose
        entropy goes to either end has collapsed (Caron et al. 2021, section 5.3).
    """
    entropies_TB: Tensor = torch.special.entr(teacher_probs_TBK).sum(dim=-1)
    return entropies_TB.mean()


def kl(loss_nats: Tensor, teacher_entropy_nats: Tensor) -> Tensor:
    """Divergence of student from teacher, the part of the loss that training removes.

    Every teacher view is in equally many pairs, so `dino_loss` = `teacher_entropy` + this, exactly.

    Args:
        loss_nats: Result of `dino_loss`.
        teacher_entropy_nats: Result of `teacher_entropy` for the same targets.

    Returns:
        A scalar in nats, at least 0 but for rounding. At 0 from early on, the teacher says the same of every
        image.
    """
    return loss_nats - teacher_entropy_nats


def _full_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _number_of_pairs(num_student_views: int, num_teacher_views: int) -> int:
    return num_teacher_views * (num_student_views - 1)


def _targets_of(view: int, teacher_probs_TBK: Tensor, all_targets_BK: Tensor) -> Tensor:
    """Sum of the targets that a student view is compared with: all, but for its own crop's."""
    if view >= len(teacher_probs_TBK):
        return all_targets_BK
    # Added up, not `all - own`: the difference would leave a rounding error in place of a tiny probability.
    others = [probs_BK for teacher_view, probs_BK in enumerate(teacher_probs_TBK) if teacher_view != view]
    return torch.stack(others).sum(dim=0) if others else torch.zeros_like(all_targets_BK)
