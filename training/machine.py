"""What this process may use of the machine, and how it uses its memory."""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # the numbers that glibc's malloc.h gives these options


def usable_cores() -> int:
    """Cores that this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
