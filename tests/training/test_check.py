"""`dino-train check`: what it finds in broken, doubled, tiny and mixed images, and with which status."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.conftest import MakeFolder
from tests.training.test_cli import run_words
from training.cli import main
from training.data.checking import check_images
from training.data.folder import find_images


def check(data: Path, *words: str) -> int:
    return main(["check", "--data", str(data), "--crop-px", "20", *words])


def test_clean_images_end_with_status_zero(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(make_folder()) == 0
    said = capsys.readouterr().out
    assert "looked at 12 of 12 images\n" in said
    assert "have 3 channels" in said


def test_every_fault_is_named_on_the_screen_and_in_the_json(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(corrupt=1)
    shutil.copy(data / "down/down-0.png", data / "down/copy[1].png")
    Image.new("RGB", (40, 15)).save(data / "across/tiny.png")
    Image.new("L", (40, 40)).save(data / "across/grey.png")
    cut = (data / "down/down-5.png").read_bytes()
    (data / "down/down-5.png").write_bytes(cut[: len(cut) - 300])
    assert check(data, "--json-file", str(tmp_path / "found.json")) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(found["unreadable"]) == ["across/broken-0.jpg", "down/down-5.png"]
    assert found["duplicates"] == [["down/copy[1].png", "down/down-0.png"]]
    assert found["small"] == {"across/tiny.png": [40, 15]}
    assert found["channels"] == {"1": 1, "3": 13}
    assert found["odd_channels"] == {}, "grey among colour is no fault"
    said = capsys.readouterr().out
    assert "down/copy[1].png = down/down-0.png" in "".join(said.split("\n")).replace("  ", " ")


def test_copies_in_val_of_training_images_are_found(make_folder: MakeFolder, tmp_path: Path) -> None:
    make_folder("split/train")
    val = make_folder("split/val", per_class=2, seed=1)
    shutil.copy(tmp_path / "split/train/down/down-3.png", val / "down/again.png")
    assert check(tmp_path / "split", "--json-file", str(tmp_path / "found.json")) == 1
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["duplicates"] == [["train/down/down-3.png", "val/down/again.png"]]


def test_arrays_of_mixed_channels_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for number, channels in enumerate((5, 5, 4, 5)):
        np.save(tmp_path / f"{number}.npy", noise.integers(0, 9, (24, 24, channels)))
    assert check(tmp_path, "--json-file", str(tmp_path / "found.json")) == 1
    assert json.loads((tmp_path / "found.json").read_text())["odd_channels"] == {"2.npy": 4}


def test_a_sample_is_the_same_each_time_and_says_that_there_is_more(
    make_folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder()
    assert check(data, "--sample", "5") == 0
    assert "looked at 5 of 12 images: --whole looks at all of them" in capsys.readouterr().out
    assert check(data, "--sample", "5", "--whole") == 0
    assert "looked at 12 of 12 images" in capsys.readouterr().out
    images = find_images(data)
    progress: list[int] = []
    first, second = (
        check_images([("", images)], crop_px=25, sample=5, on_progress=progress.append) for _ in range(2)
    )
    assert first == second
    assert len(first.small) == 5
    assert progress == [5, 5]


def test_a_run_says_before_its_first_step_what_is_wrong(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(corrupt=2)
    assert main(run_words(data, tmp_path)) == 0
    said = capsys.readouterr().err
    assert "of 14 images that were looked at 2 cannot be read, 12 have a side below the crop's 32 px" in said
    found = json.loads((tmp_path / "runs/one/check.json").read_text())
    assert sorted(found["unreadable"]) == ["across/broken-0.jpg", "across/broken-1.jpg"]
    assert main([*run_words(data, tmp_path, "two"), "--loading.check", "off"]) == 0
    assert "looked at" not in capsys.readouterr().err
