"""How many threads this process may use, and for what."""

import contextlib
import os
import sys
import threading
from pathlib import Path

import torch

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_NICER = 5  # about a third of the weight that the scheduler gives to others
_native_threads_lock = threading.Lock()


def cpu_budget(cgroup_root: Path = _CGROUP_ROOT) -> int:
    """Cores that this process may keep busy: its affinity, and a container's quota where that is smaller.

    `os.cpu_count` knows neither: in a container limited to two cores of 64 it says 64, and 64 decoders on two
    cores starve the model.

    Args:
        cgroup_root: Where the control groups are mounted; version 2 (`cpu.max`) and 1 (`cpu/cpu.cfs_*`) are
            read.

    Returns:
        At least 1.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota_cores(cgroup_root)
    return max(1, affinity if quota is None else min(affinity, round(quota)))


def _cgroup_quota_cores(root: Path) -> float | None:
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    if quota in {"max", "-1"}:
        return None
    return int(quota) / int(period)


def use_native_threads(count: int) -> None:
    """Lets torch use `count` native threads for what the calling thread starts; others keep theirs.

    OpenMP's number of threads belongs to the thread that asks for work, yet torch gives every new thread the
    number that was set last, whoever set it. Reading the number makes the calling thread take it now, before
    another thread sets a different one. A decoder that skipped this would start its own pool of as many
    threads as there are cores: eight decoders on eight cores would be 64 threads.
    """
    with _native_threads_lock:
        torch.set_num_threads(count)
        torch.get_num_threads()


def yield_to_the_loop() -> None:
    """Lets the system prefer the process's other threads to the calling one, and to those that it starts.

    Decoders and the model take all cores that there are. The event loop needs little, but at once: every
    caller waits for it, also those who are only to be told that there is no room.
    """
    if sys.platform != "linux":
        return  # elsewhere niceness is the process's, not the thread's
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):  # a sandbox may forbid it, and then it is as it was
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)
