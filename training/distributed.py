"""Several processes that train as one, under `torchrun`; a single process needs no launcher.

Gradients are averaged after the backward pass of a whole step, by hand rather than by a wrapper: that is
correct with accumulated parts and leaves the network's parameter names as they are.
"""

import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from training.errors import RunDirectoryError

_PATIENCE = timedelta(minutes=30)  # as long as torch waits for a message
_POLL_S = 0.02


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
        if device.type == "cuda":
            torch.cuda.set_device(device)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=_store(rank, size), rank=rank, world_size=size
        )
    return World(rank=distributed.get_rank(), size=distributed.get_world_size())


def _store(rank: int, size: int) -> Store:
    """Where the processes find each other's addresses."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return TCPStore(address, port, size, is_master=rank == 0)
    store = TCPStore(address, port, is_master=False, timeout=_PATIENCE)
    return PrefixStore(meet(store, rank=rank, size=size, patience=_PATIENCE), store)


def meet(store: Store, *, rank: int, size: int, patience: timedelta) -> str:
    """Agrees with the other processes of this attempt on a name that no earlier attempt had.

    `torchrun` keeps one store over all restarts, so workers that are started anew find the addresses of dead
    ones there (https://github.com/pytorch/pytorch/issues/135712), and its count of restarts is not the same
    on all machines. So each process says a word of its own, and believes only an answer to that word.

    Raises:
        RunDirectoryError: Some processes did not come in time.
    """
    own_word, deadline_s = secrets.token_hex(8), time.monotonic() + patience.total_seconds()
    if rank:
        store.set(f"word/{rank}", own_word)
        name: str = store.get(f"answer/{own_word}").decode()
        store.set(f"here/{name}/{rank}", "")
        return name
    missing = set(range(1, size))
    while missing:
        for other in sorted(missing):
            if store.check([f"here/{own_word}/{other}"]):
                missing.remove(other)
            elif store.check([f"word/{other}"]):  # it may be that of a dead one: then nobody reads the answer
                store.set(f"answer/{store.get(f'word/{other}').decode()}", own_word)
        if time.monotonic() > deadline_s:
            raise RunDirectoryError(
                f"{len(missing)} of {size} processes did not start, first that of rank {min(missing)}: see "
                "what it said"
            )
        time.sleep(_POLL_S)
    return own_word


def is_first_process() -> bool:
    """Whether this process talks to the user, asked before it joins the others."""
    return os.environ.get("RANK", "0") == "0"


def launch_name() -> str | None:
    """Names the launch by `torchrun` that this process belongs to; it stays the same after a restart.

    Not by the number of restarts: workers that are started anew because a machine came or went are not
    counted there.

    Returns:
        The id that the user gave (`--rdzv-id`, needed on many machines), else which `torchrun` process it is;
        none without `torchrun`.
    """
    given = os.environ.get("TORCHELASTIC_RUN_ID")
    if given is None:
        return None
    if given != "none":
        return given
    launcher = os.getppid()
    return f"{socket.gethostname()} {launcher} {_began_at(launcher)}"


def _began_at(process: int) -> str:
    """When a process began: its number alone comes again, always so in a container that is started anew."""
    try:
        behind_the_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    except OSError:
        return ""
    return behind_the_name.split()[19]


def agree_on_step(step: int, *, world: World, device: torch.device) -> None:
    """Makes sure that all processes go on from the same step.

    Raises:
        RunDirectoryError: They don't, as with a folder that is another one on each machine.
    """
    if world.size == 1:
        return
    least, most = torch.tensor(step, device=device), torch.tensor(step, device=device)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    if least != most:
        raise RunDirectoryError(
            f"processes would go on from different checkpoints (steps {int(least)} to {int(most)}): give "
            "--run-dir a folder that all machines see"
        )


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
    parts = torch.split(message, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def any_of(asked: bool, *, world: World, device: torch.device) -> bool:
    """Whether any process was asked; all get the same answer, so that all stop at the same step."""
    if world.size == 1:
        return asked
    answer = torch.tensor(float(asked), device=device)
    distributed.all_reduce(answer, distributed.ReduceOp.MAX)
    return bool(answer)
