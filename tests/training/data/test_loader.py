"""Folders, the order of an epoch, corrupt files, resuming, processes; images are made here."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_core.randomness import shuffled
from training.data.canvases import Canvas, load_canvas
from training.data.folder import find_images
from training.data.images import UnreadableImage
from training.data.loader import Batch, CanvasLoader
from training.errors import DataError, NoImagesCome

SIDE = 16


def write_image(path: Path, *, level: int = 100, size: tuple[int, int] = (20, 24)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    Image.new("RGB", (width, height), (level, 255 - level, 7)).save(path)


def folder_of(root: Path, count: int, *, corrupt: tuple[int, ...] = ()) -> Path:
    """Even pictures, each of its own grey level, some of them cut off."""
    for number in range(count):
        path = root / f"{number:03d}.png"
        write_image(path, level=number * 5, size=(20 + number, 24))
        if number in corrupt:
            path.write_bytes(path.read_bytes()[:40])
    return root


def loader_of(root: Path, *, batch_size: int = 4, seed: int = 0, workers: int | None = 2) -> CanvasLoader:
    return CanvasLoader(find_images(root), canvas_px=SIDE, batch_size=batch_size, seed=seed, workers=workers)


def indices(batches: list[Batch]) -> list[int]:
    return [int(index) for batch in batches for index in batch.indices_B]


def test_a_nested_folder_has_classes_and_a_deterministic_order(tmp_path: Path) -> None:
    for name in ("dog/b.JPG", "cat/z.png", "cat/deep/a.webp", "dog/a.jpeg", "cat/.hidden.png", ".git/x.png"):
        write_image(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    images = find_images(tmp_path)
    assert tuple(images.names) == ("cat/deep/a.webp", "cat/z.png", "dog/a.jpeg", "dog/b.JPG")
    assert tuple(images.class_names) == ("cat", "dog")
    assert images.labels_N is not None
    assert images.labels_N.tolist() == [0, 0, 1, 1]
    assert images.paths == tuple(images.path(index) for index in range(4))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("a.png", "b.png"), id="flat"),
        pytest.param(("cat/a.png", "dog/b.png", "stray.png"), id="an image outside of the classes"),
        pytest.param(("all/a.png", "all/b.png"), id="one folder is no class"),
        pytest.param(("train/a.png", "val/b.png"), id="splits are no classes"),
    ],
)
def test_folders_that_are_no_classes_give_no_labels(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_image(tmp_path / name)
    images = find_images(tmp_path)
    assert len(images) == len(names)
    assert images.labels_N is None
    assert tuple(images.class_names) == ()


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_image(tmp_path / "data" / "one" / "a.png")
    write_image(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data" / "two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "one" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "one" / "self").symlink_to(tmp_path / "data" / "one")
    assert tuple(find_images(tmp_path / "data").names) == ("one/a.png", "two/b.png")


def test_a_folder_without_images_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    (tmp_path / "b.heic").touch()
    with pytest.raises(
        DataError, match=r"looked for names that end in \.avif, .*\.webp, \.npy, .* and found 2 with \.heic"
    ):
        find_images(tmp_path)
    with pytest.raises(DataError, match="is not there: give a folder"):
        find_images(tmp_path / "absent")
    with pytest.raises(DataError, match="is a file: give a folder"):
        find_images(tmp_path / "a.heic")


def test_a_canvas_is_square_and_remembers_the_original(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", level=40, size=(30, 90))
    canvas = load_canvas(find_images(tmp_path), 0, canvas_px=SIDE)
    assert canvas.size_px == (30, 90)
    assert canvas.pixels_CHW.dtype == torch.uint8
    assert canvas.pixels_CHW.shape == (3, SIDE, SIDE)
    assert (canvas.pixels_CHW == torch.tensor([40, 215, 7])[:, None, None]).all()


def test_a_canvas_keeps_left_and_top_in_place(tmp_path: Path) -> None:
    picture = np.zeros((60, 120, 3), dtype=np.uint8)
    picture[:30, :60, 0] = 255  # red at the top left
    picture[30:, 60:, 2] = 255  # blue at the bottom right
    Image.fromarray(picture).save(tmp_path / "a.png")
    pixels = load_canvas(find_images(tmp_path), 0, canvas_px=SIDE).pixels_CHW
    assert pixels[:, 2, 2].tolist() == [255, 0, 0]
    assert pixels[:, 13, 13].tolist() == [0, 0, 255]
    assert pixels[:, 2, 13].tolist() == [0, 0, 0]


def test_a_large_jpeg_keeps_its_proportions(tmp_path: Path) -> None:
    Image.new("RGB", (800, 400), (90, 90, 90)).save(tmp_path / "a.jpg")
    height_px, width_px = load_canvas(find_images(tmp_path), 0, canvas_px=SIDE).size_px
    assert (height_px, width_px) != (400, 800)  # decoded small: that is the point
    assert width_px == 2 * height_px
    assert height_px >= SIDE


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("words"), lambda path: path.unlink()])
def test_a_file_that_cannot_be_read_gives_a_reason(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    write_image(tmp_path / "a.png")
    images = find_images(tmp_path)
    spoil(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=r"\w+"):
        load_canvas(images, 0, canvas_px=SIDE)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_epoch_is_the_shuffled_order_whatever_the_number_of_workers(tmp_path: Path, workers: int) -> None:
    folder_of(tmp_path, 11)
    with loader_of(tmp_path, workers=workers) as loader:
        batches = list(loader.batches(3))
        assert len(batches) == loader.batches_per_epoch == 2
    assert indices(batches) == shuffled(11, seed=0, epoch=3)[:8].tolist()
    for batch in batches:
        for pixels, size, index in zip(*batch, strict=True):
            assert int(pixels[0, 0, 0]) == 5 * int(index)
            assert size.tolist() == [20 + int(index), 24]


def test_seeds_and_epochs_have_other_orders(tmp_path: Path) -> None:
    folder_of(tmp_path, 24)
    with loader_of(tmp_path) as loader, loader_of(tmp_path, seed=1) as other:
        orders = {tuple(indices(list(each.batches(epoch)))) for each in (loader, other) for epoch in range(3)}
    assert len(orders) == 6


def test_an_epoch_entered_later_gives_the_rest_of_it(tmp_path: Path) -> None:
    folder_of(tmp_path, 20, corrupt=(3, 4, 11))
    with loader_of(tmp_path) as loader:
        whole = list(loader.batches(1))
    for start_batch in range(6):
        with loader_of(tmp_path) as loader:  # a new one, which hasn't met the corrupt files yet
            rest = list(loader.batches(1, start_batch=start_batch))
        assert indices(rest) == indices(whole[start_batch:])
        for one, other in zip(rest, whole[start_batch:], strict=True):
            assert torch.equal(one.pixels_BCHW, other.pixels_BCHW)


def test_corrupt_files_are_skipped_named_and_replaced(tmp_path: Path) -> None:
    folder_of(tmp_path, 12, corrupt=(0, 5, 6))
    with loader_of(tmp_path) as loader:
        batches = list(loader.batches(0))
        assert sorted(loader.skipped) == ["000.png", "005.png", "006.png"]
        assert all(loader.skipped.values())
    assert [len(batch.indices_B) for batch in batches] == [4, 4, 4]
    seen = indices(batches)
    assert not {0, 5, 6} & set(seen)
    for place, planned in enumerate(shuffled(12, seed=0, epoch=0)):
        assert seen[place] == planned or planned in {0, 5, 6}
    with loader_of(tmp_path, workers=0) as loader:
        assert indices(list(loader.batches(0))) == seen


def test_stand_ins_differ_from_place_to_place(tmp_path: Path) -> None:
    folder_of(tmp_path, 40, corrupt=tuple(range(20)))
    with loader_of(tmp_path) as loader:
        seen = indices(list(loader.batches(0)))
    stand_ins = [
        index for index, planned in zip(seen, shuffled(40, seed=0, epoch=0), strict=True) if planned < 20
    ]
    assert len(set(stand_ins)) > 8  # of 20 good images


def test_a_folder_of_corrupt_files_only_is_an_error_that_names_one(tmp_path: Path) -> None:
    folder_of(tmp_path, 5, corrupt=tuple(range(5)))
    with (
        loader_of(tmp_path) as loader,
        pytest.raises(DataError, match=r"none of the 5 images .* 00\d.png: \w+"),
    ):
        list(loader.batches(0))


@pytest.mark.parametrize("batch_size", [0, 4])
def test_a_batch_larger_than_the_data_is_refused_with_advice(tmp_path: Path, batch_size: int) -> None:
    folder_of(tmp_path, 3)
    with pytest.raises(DataError, match=rf"batch size is {batch_size} .* has 3 images: .* from 1 to 3"):
        loader_of(tmp_path, batch_size=batch_size)


def test_processes_share_a_batch_without_overlap(tmp_path: Path) -> None:
    folder_of(tmp_path, 12)
    with loader_of(tmp_path) as loader:
        whole = list(loader.batches(0))
        halves = [list(loader.batches(0, rank=rank, world_size=2)) for rank in range(2)]
        for batch, even, odd in zip(whole, *halves, strict=True):
            assert even.indices_B.tolist() == batch.indices_B[0::2].tolist()
            assert odd.indices_B.tolist() == batch.indices_B[1::2].tolist()
        with pytest.raises(DataError, match="3 processes cannot share a batch of 4"):
            loader.batches(0, world_size=3)


def test_leaving_an_epoch_early_leaves_nothing_behind(tmp_path: Path) -> None:
    folder_of(tmp_path, 40)
    with loader_of(tmp_path) as loader:
        first = next(iter(loader.batches(0)))
        assert indices([first]) == indices(list(loader.batches(0))[:1])


def test_a_file_that_hangs_is_said_and_named_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    images = find_images(folder_of(tmp_path, 8))
    (tmp_path / "003.png").unlink()
    os.mkfifo(tmp_path / "003.png")  # opening it waits until someone writes, as a dead network share does
    said: list[str] = []
    began_s = time.monotonic()
    with (
        pytest.raises(NoImagesCome, match=r"no images have come .* 1 threads read, one of them 003.png.*"),
        CanvasLoader(
            images, canvas_px=SIDE, batch_size=8, seed=0, workers=2, max_wait_s=1.0, say=said.append
        ) as loader,
    ):
        list(loader.batches(0))
    assert time.monotonic() - began_s >= 1.0
    assert len(said) == 1
    assert "no images have come" in said[0]


def test_an_error_of_a_reader_is_the_callers(tmp_path: Path) -> None:
    class Broken:
        channels = 3

        def read(self, index: int) -> Canvas:
            raise TimeoutError(f"of the reader's own, {index}")

    images = find_images(folder_of(tmp_path, 4))
    with (
        pytest.raises(TimeoutError, match="of the reader's own"),
        CanvasLoader(
            images, canvas_px=SIDE, batch_size=4, seed=0, workers=2, source=Broken(), max_wait_s=60
        ) as loader,
    ):
        list(loader.batches(0))


def test_a_real_data_set_is_found_and_read() -> None:
    shared = Path(os.environ.get("DINO_SHARED", Path(__file__).parents[2] / ".." / "shared"))
    root = shared / "data" / "imagenette" / "val"
    if not root.is_dir():
        pytest.skip("needs shared/data/imagenette")
    images = find_images(root)
    assert len(images) == 3925
    assert len(images.class_names) == 10
    with CanvasLoader(images, canvas_px=64, batch_size=32, seed=0) as loader:
        batch = next(iter(loader.batches(0)))
    assert batch.pixels_BCHW.shape == (32, 3, 64, 64)
    assert int(batch.sizes_px_B2.min()) >= 64
    assert loader.skipped == {}
