"""The teacher: a copy of the student that follows it as an exponential moving average.

Reference: Caron et al. 2021, section 3.1, https://arxiv.org/abs/2104.14294
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

M = TypeVar("M", bound=nn.Module)


def make_teacher(student: M) -> M:
    """Copies the student, head and buffers included, as a network that is only looked at.

    A teacher whose head is initialised apart starts as a foreign target (two published trainers do that), and
    one in training mode drops units at random and normalises by the batch: its targets are noise.

    Args:
        student: The network that will be trained.

    Returns:
        A deep copy in evaluation mode whose parameters take no gradient.
    """
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(requires_grad=False)
    return teacher.eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """Moves the teacher towards the student, in place.

        teacher = momentum * teacher + (1 - momentum) * student      for parameters
        teacher = student                                            for buffers

    Buffers are copied, not averaged: a BatchNorm counter has no meaningful mean, and its running statistics
    are averages already.

    Args:
        teacher: Changed in place, with a handful of kernels for the whole network; its storage stays where it
            is.
        student: The network that the optimiser has just moved.
        momentum: From 0 (copy) to 1 (stay); DINO goes from 0.996 to 1 along a cosine.

    Raises:
        ValueError: The momentum is outside [0, 1], or names or shapes differ: then nothing was changed.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"the teacher's momentum is {momentum}, and must be from 0 to 1")
    teacher_parameters, student_parameters = _matched(
        teacher.named_parameters(), student.named_parameters(), kind="parameter"
    )
    teacher_buffers, student_buffers = _matched(
        teacher.named_buffers(), student.named_buffers(), kind="buffer"
    )
    if teacher_parameters:
        torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - momentum)
    if teacher_buffers:
        torch._foreach_copy_(teacher_buffers, student_buffers)


def keep_statistics(network: nn.Module) -> None:
    """Lets BatchNorm layers go by their running statistics, and keep them, while the network trains.

    For a network that goes on from weights that were trained with those statistics: small batches of crops
    would move them faster than the weights that they belong to. Scales and shifts learn as ever. A later
    `network.train()` undoes it.

    Args:
        network: In training mode; only its BatchNorm layers are changed.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@contextmanager
def batch_statistics(teacher: nn.Module) -> Iterator[None]:
    """Lets the teacher's BatchNorm layers, and nothing else, normalise by the batch while it makes targets.

    Its running statistics are the student's, which moves ahead of it: in small convolutional networks,
    targets normalised by them told images apart ever less, until all were uniform (docs/lab-notes.md,
    2026-11-24). The official code, whose teacher is in training mode, normalises by the batch too. Dropout
    and stochastic depth stay off, and running statistics and counters stay as they are. A network without
    BatchNorm is not touched.

    Args:
        teacher: In evaluation mode before and after.

    Yields:
        Nothing; the batch must have more than one value for each channel meanwhile.
    """
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    before = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, before, strict=True):
            norm.training, norm.track_running_stats = training, tracks


def _matched(
    teachers: Iterable[tuple[str, Tensor]], students: Iterable[tuple[str, Tensor]], *, kind: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Pairs tensors by name and refuses any that has no partner: a plain `zip` would drop the rest."""
    teacher_by_name, student_by_name = dict(teachers), dict(students)
    if teacher_by_name.keys() != student_by_name.keys():
        only_in_teacher = sorted(teacher_by_name.keys() - student_by_name.keys())
        only_in_student = sorted(student_by_name.keys() - teacher_by_name.keys())
        raise ValueError(
            f"teacher and student are not the same network: {kind}s {only_in_teacher[:3]} are only in the "
            f"teacher, {only_in_student[:3]} only in the student; make it with make_teacher(student), and "
            "give the network itself rather than a wrapper of it"
        )
    for name, tensor in teacher_by_name.items():
        if tensor.shape != student_by_name[name].shape:
            raise ValueError(
                f"{kind} {name} has shape {tuple(tensor.shape)} in the teacher and "
                f"{tuple(student_by_name[name].shape)} in the student"
            )
    return list(teacher_by_name.values()), [student_by_name[name] for name in teacher_by_name]
