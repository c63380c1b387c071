import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from app.inference.threads import cpu_budget, use_native_threads

AFFINITY = len(os.sched_getaffinity(0))


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        pytest.param("max 100000", AFFINITY, id="no quota"),
        pytest.param("100000 100000", 1, id="one core"),
        pytest.param("20000 100000", 1, id="a fifth of a core is still one thread"),
        pytest.param("6400000 100000", AFFINITY, id="a quota above the affinity"),
        pytest.param("nonsense", AFFINITY, id="unreadable"),
    ],
)
def test_the_budget_is_the_affinity_or_a_smaller_quota(tmp_path: Path, quota: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cpu_budget(tmp_path) == cores


@pytest.mark.parametrize(("quota_us", "cores"), [("-1", AFFINITY), ("100000", 1)])
def test_the_older_control_groups_are_read_too(tmp_path: Path, quota_us: str, cores: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota_us + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_budget(tmp_path) == cores


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert cpu_budget(tmp_path) == AFFINITY


@pytest.mark.usefixtures("torch_threads")
def test_a_threads_native_threads_are_its_own_whatever_others_take_later() -> None:
    seen: dict[str, int] = {}
    others_done = threading.Event()

    def decoder() -> None:
        use_native_threads(1)
        decoder_ready.set()
        assert others_done.wait(timeout=20)
        seen["decoder"] = torch.get_num_threads()

    def device() -> None:
        use_native_threads(3)
        seen["device"] = torch.get_num_threads()

    decoder_ready = threading.Event()
    first = threading.Thread(target=decoder)
    first.start()
    assert decoder_ready.wait(timeout=20)
    second = threading.Thread(target=device)
    second.start()
    second.join(timeout=20)
    others_done.set()
    first.join(timeout=20)
    assert seen == {"decoder": 1, "device": 3}
