"""Lists of images."""

from pathlib import Path

import pytest
from PIL import Image

from training.data.listing import listed_images
from training.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b", "a"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    return tmp_path


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_a_list_keeps_its_order_and_finds_files_below_itself_or_anywhere(folder: Path) -> None:
    path = written(folder, "some.txt", f"b.png\n\n{folder}/a.png\r\n")
    images = listed_images(path)
    assert tuple(images.names) == ("b.png", f"{folder}/a.png")
    assert images.labels_N is None
    assert images.origin == str(path)
    assert images.read(0) == (folder / "b.png").read_bytes()
    assert images.read(1) == (folder / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("some.txt", "b.png\tdog\na.png\tcat\n"),
        ("some.csv", "label,path\ndog,b.png\ncat,a.png\n"),
        ("some.tsv", "path\tlabel\nb.png\tdog\na.png\tcat\n"),
    ],
)
def test_labels_come_from_the_second_column(folder: Path, name: str, text: str) -> None:
    images = listed_images(written(folder, name, text))
    assert tuple(images.class_names) == ("cat", "dog")
    assert images.labels_N is not None
    assert images.labels_N.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("some.txt", "\n", "names no image"),
        ("some.txt", "a.png\na.png\n", "names a.png twice"),
        ("some.txt", "a.png\tcat\nb.png\n", "has no label for b.png and labels for others"),
        ("some.csv", "file\na.png\n", "one must be called path"),
    ],
)
def test_a_list_that_does_not_hold_is_refused(folder: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        listed_images(written(folder, name, text))


def test_a_list_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.txt cannot be read"):
        listed_images(tmp_path / "nowhere.txt")
