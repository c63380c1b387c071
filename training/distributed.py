"""Several processes that train as one, under `torchrun`; a single process needs no launcher.

Gradients are averaged after the backward pass of a whole step, by hand rather than by a wrapper: that is
correct with accumulated parts and leaves the network's parameter names as they are.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, kw_only=True)
class World:
    """Which of how many processes this is.

    Attributes:
        rank: From 0; the process of rank 0 writes files and talks to the user.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def join_world(device: torch.device) -> World:
    """Joins the processes that `torchrun` started, if it did."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return World()
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank=distributed.get_rank(), size=distributed.get_world_size())


def leave_world() -> None:
    """Leaves the other processes; does nothing in a single one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its mean over the processes, in one message."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    message = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(message)
    message /= distributed.get_world_size()
    _unpack(message, gradients)


@torch.no_grad()
def share_buffers(network: nn.Module) -> None:
    """Gives every process the buffers of the first, so that BatchNorm statistics stay one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if buffers:
        message = torch.cat([buffer.flatten() for buffer in buffers])
        distributed.broadcast(message, src=0)
        _unpack(message, buffers)


def _unpack(message: Tensor, tensors: list[Tensor]) -> None:
    parts = torch.split(message, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))


def any_of(asked: bool, *, world: World, device: torch.device) -> bool:
    """Whether any process was asked; all get the same answer, so that all stop at the same step."""
    if world.size == 1:
        return asked
    answer = torch.tensor(float(asked), device=device)
    distributed.all_reduce(answer, distributed.ReduceOp.MAX)
    return bool(answer)
