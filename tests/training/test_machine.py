"""What a process may use of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.machine import free_memory_bytes, usable_cores

ROOT = Path(__file__).parents[2]

FAULTS = """
import resource, sys
import torch
from training.machine import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 1024 * 1024)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(20):  # until the heap has gaps that the next one fits into
    page_faults()
print(sum(page_faults() for _ in range(10)))
"""


PEAKS = """
from training.machine import forget_peak_memory, peak_memory_bytes

held = bytearray(200_000_000)
first = peak_memory_bytes()
del held
forget_peak_memory()
later = peak_memory_bytes()
held = bytearray(100_000_000)
print(first, later, peak_memory_bytes())
"""


def faults_of_later_tensors(choice: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, choice], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip("this libc has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_that_is_freed_is_used_again_without_page_faults() -> None:
    assert faults_of_later_tensors("keep") < 0.5 * faults_of_later_tensors("as it is")


def test_the_cores_are_those_that_the_process_may_use() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_the_peak_of_memory_is_that_since_it_was_forgotten() -> None:
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, check=True)
    first, later, last = (int(number) for number in done.stdout.split())
    assert first > 200_000_000
    if sys.platform == "linux" and later < first:  # else the system counts from the start only
        assert later < 150_000_000
        assert 100_000_000 < last < 200_000_000


def test_there_is_free_memory_and_no_more_than_the_machine_has() -> None:
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10**7 < free_memory_bytes() <= whole
