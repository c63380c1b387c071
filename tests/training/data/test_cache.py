"""The cache of canvases: same as the files, built once, never half, never of other files."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from training.data.cache import CachedCanvases, open_cache
from training.data.folder import find_images
from training.data.loader import CanvasLoader
from training.errors import DataError

SIDE = 16


def write_image(path: Path, *, level: int) -> None:
    Image.new("RGB", (24, 20), (level, 255 - level, 7)).save(path)


def folder_of(root: Path, count: int, *, corrupt: tuple[int, ...] = ()) -> Path:
    """Even pictures, each of its own grey level, some of them cut off."""
    root.mkdir()
    for number in range(count):
        path = root / f"{number:03d}.png"
        write_image(path, level=number * 5)
        if number in corrupt:
            path.write_bytes(path.read_bytes()[:40])
    return root


def test_a_cache_gives_what_the_files_give_and_is_built_once(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 20, corrupt=(3, 9))
    images = find_images(tmp_path / "images")
    progress: list[int] = []
    cache = open_cache(
        images, canvas_px=SIDE, cache_dir=tmp_path / "cache", workers=2, on_progress=progress.append
    )
    assert progress == [20]
    assert sorted(cache.skipped) == ["003.png", "009.png"]
    with (
        CanvasLoader(images, canvas_px=SIDE, batch_size=4, seed=0, source=cache) as cached,
        CanvasLoader(images, canvas_px=SIDE, batch_size=4, seed=0) as direct,
    ):
        for ours, theirs in zip(cached.batches(0), direct.batches(0), strict=True):
            for part, other in zip(ours, theirs, strict=True):
                assert torch.equal(part, other)
        assert cached.skipped == direct.skipped

    open_cache(images, canvas_px=SIDE, cache_dir=tmp_path / "cache", on_progress=progress.append)
    assert progress == [20]


def test_a_changed_file_or_another_canvas_makes_another_cache(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 4)
    images = find_images(tmp_path / "images")

    def build(canvas_px: int = SIDE) -> CachedCanvases:
        return open_cache(images, canvas_px=canvas_px, cache_dir=tmp_path / "cache")

    before = build().read(0).pixels_CHW
    write_image(images.path(0), level=250)
    os.utime(images.path(0), ns=(1, 1))
    after = build().read(0).pixels_CHW
    assert int(before[0, 0, 0]) == 0
    assert int(after[0, 0, 0]) == 250
    assert build(canvas_px=8).read(0).pixels_CHW.shape == (3, 8, 8)
    assert len(list((tmp_path / "cache").glob("canvases-*"))) == 3


def test_a_build_that_was_killed_is_cleared_away(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 4)
    images = find_images(tmp_path / "images")
    expected = open_cache(images, canvas_px=SIDE, cache_dir=tmp_path / "cache").read(2).pixels_CHW
    (folder,) = (tmp_path / "cache").glob("canvases-*")
    unfinished = folder.with_name(folder.name.replace("canvases-", ".building-"))
    folder.rename(unfinished)
    (unfinished / "canvases.u8").write_bytes(b"half")
    again = open_cache(images, canvas_px=SIDE, cache_dir=tmp_path / "cache")
    assert torch.equal(again.read(2).pixels_CHW, expected)
    assert not unfinished.exists()


def test_a_damaged_cache_is_refused_with_what_to_delete(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 4)
    images = find_images(tmp_path / "images")
    open_cache(images, canvas_px=SIDE, cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("canvases-*")
    (folder / "canvases.u8").write_bytes(b"half")
    with pytest.raises(DataError, match=f"delete {folder}"):
        open_cache(images, canvas_px=SIDE, cache_dir=tmp_path / "cache")


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path: Path) -> None:
    folder_of(tmp_path / "images", 4)
    images = find_images(tmp_path / "images")
    with pytest.raises(DataError, match=r"takes \d+\.\d GB .* GB free: use another folder"):
        open_cache(images, canvas_px=10_000_000, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*canvases*"))
