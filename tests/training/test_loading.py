"""The cache in memory: what it gives, and that nothing of it stays."""

from pathlib import Path

import pytest
import torch

from tests.training.conftest import MakeConfig, MakeFolder
from training.data import cache
from training.data.folder import find_images
from training.distributed import World
from training.errors import DataError
from training.loading import open_loader

ALONE, CPU = World(), torch.device("cpu")


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the system's shared memory."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(cache, "SHARED_MEMORY", tmp_path / "shm")
    return tmp_path / "shm"


def test_a_cache_in_memory_gives_what_the_files_give_and_leaves_no_name(
    make_folder: MakeFolder, make_config: MakeConfig, tmp_path: Path, memory: Path
) -> None:
    images = find_images(make_folder(corrupt=1))
    batches = {}
    for kind in ("memory", "disk", "off"):
        config = make_config(loading={"cache": kind})
        with open_loader(images, config, tmp_path / kind, world=ALONE, device=CPU) as loader:
            batches[kind] = list(loader.batches(0))
        assert not list(memory.glob("*/canvases-*"))
    for kind in ("memory", "disk"):
        for ours, theirs in zip(batches[kind], batches["off"], strict=True):
            assert all(torch.equal(part, other) for part, other in zip(ours, theirs, strict=True))
    assert list((tmp_path / "disk" / "cache").glob("canvases-*"))


def test_a_system_without_shared_memory_is_told_what_to_take(
    make_folder: MakeFolder, make_config: MakeConfig, tmp_path: Path, memory: Path
) -> None:
    memory.rmdir()
    config = make_config(loading={"cache": "memory"})
    with pytest.raises(DataError, match="loading.cache memory needs .*shm, .* lacks: take disk or off"):
        open_loader(find_images(make_folder()), config, tmp_path, world=ALONE, device=CPU)
