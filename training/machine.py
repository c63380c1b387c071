"""What this process may use of the machine, and how it uses its memory."""

import ctypes
import os
import resource
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # the numbers that glibc's malloc.h gives these options


def usable_cores() -> int:
    """Cores that this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hold_native_threads() -> None:
    """Fixes how many native threads compute in this thread, as it is now.

    Until somebody says a number, Intel's MKL is free to take another one for each product, and sums come out
    in another order: a run would not go on bit for bit.
    """
    import torch  # noqa: PLC0415 - 300 MB that the rest of this module can do without

    torch.set_num_threads(torch.get_num_threads())


def free_memory_bytes() -> int:
    """Memory that this process may still take: what the system has left, within its control group's limit."""
    left = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _lines_of("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024)
    for group, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, used = _lines_of(f"{group}/{limit_name}"), _lines_of(f"{group}/{used_name}")
        if limit and used and limit[0].isdigit():  # else "max": there is no limit
            # What files were read from counts as used, and is given back when somebody needs it.
            left.append(max(0, int(limit[0]) - int(used[0]) + _cached_bytes(group)))
    return min(left)


def peak_memory_bytes() -> int:
    """The most memory that this process has had since it began, or since `forget_peak_memory`."""
    for line in _lines_of("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak_memory() -> None:
    """Begins to count the peak anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or forbidden: the peak since the start is an upper bound
        return


def _cached_bytes(group: str) -> int:
    for line in _lines_of(f"{group}/memory.stat"):
        name, count = line.split()
        if name in {"inactive_file", "total_inactive_file"}:
            return int(count)
    return 0


def _lines_of(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def keep_freed_memory() -> bool:
    """Lets the process keep memory that it frees, where glibc's allocator allows it.

    By default each tensor above 32 MB is mapped when it is made and unmapped when it is freed, so that each
    step on a CPU has all its pages handed out, and zeroed, anew: a sixth of the time of a step of ViT-Ti/16
    (docs/lab-notes.md, 2026-11-25).

    Returns:
        Whether it took effect.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another libc
        return False
    # -1 is the largest size: never give memory back; and never map a block of its own.
    return bool(set_option(_TRIM_THRESHOLD, -1)) and bool(set_option(_MMAP_MAX, 0))
