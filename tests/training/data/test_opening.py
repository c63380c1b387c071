"""What a user names as data."""

from pathlib import Path

from PIL import Image

from training.data.opening import open_split


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_a_split_folder_trains_on_train_and_measures_on_val(tmp_path: Path) -> None:
    picture(tmp_path / "birds/train/a.png")
    picture(tmp_path / "birds/val/b.png")
    train, val = open_split(tmp_path / "birds")
    assert list(train.names) == ["a.png"]
    assert val is not None
    assert list(val.names) == ["b.png"]
    assert open_split(tmp_path / "birds/val")[1] is None
