"""Copy detection on folders made here, and its measure by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_core.backbones import make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing
from training.errors import DataError
from training.evaluation.copies import average_precision, find_copies, read_copies


@pytest.fixture
def model() -> EmbeddingModel:
    torch.manual_seed(0)
    return EmbeddingModel(
        make_backbone("test_resnet", image_size_px=32),
        preprocessing=Preprocessing(resize_px=32, crop_px=32),
        pooling="mean",
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four originals with an exact copy and a blank one each, and three distractors."""
    noise = np.random.default_rng(0)
    rows = ["query,original,attack"]
    for name in ("original", "same", "blank", "distractors"):
        (tmp_path / name).mkdir()
    for number in range(7):
        pixels = noise.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        picture = Image.fromarray(pixels)
        if number >= 4:
            picture.save(tmp_path / f"distractors/{number}.png")
            continue
        picture.save(tmp_path / f"original/{number}.png")
        picture.save(tmp_path / f"same/{number}.png")
        Image.new("RGB", (32, 32)).save(tmp_path / f"blank/{number}.png")
        rows += [f"{attack}/{number}.png,original/{number}.png,{attack}" for attack in ("same", "blank")]
    (tmp_path / "groundtruth.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_copy_is_found_and_a_blank_page_is_not(model: EmbeddingModel, folder: Path) -> None:
    copies = read_copies(folder)
    assert len(copies.images) == 15
    report = find_copies(model, copies)
    assert report.by_attack()["same"] == 100
    assert report.by_attack()["blank"] <= 25  # all four have the same nearest, which one at most is from
    assert 0.5 <= report.micro_ap < 1


def test_the_measure_is_the_mean_precision_at_each_right_one() -> None:
    scores = torch.tensor([0.9, 0.1, 0.8, 0.7])
    right = torch.tensor([True, True, False, True])
    assert average_precision(scores, right) == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (None, "is not there: a folder of copies needs this table"),
        ("a,b\n1,2\n", "has the columns .'a', 'b'.: expected query,original,attack"),
        ("query,original,attack\n", "has no rows"),
        ("query,original,attack\nsame/9.png,original/0.png,same\n", "names same/9.png, which is no image"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(folder: Path, table: str | None, sentence: str) -> None:
    (folder / "groundtruth.csv").unlink()
    if table is not None:
        (folder / "groundtruth.csv").write_text(table)
    with pytest.raises(DataError, match=sentence):
        read_copies(folder)


def test_an_unreadable_picture_is_named(model: EmbeddingModel, folder: Path) -> None:
    (folder / "same/0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="same/0.png of .* cannot be read"):
        find_copies(model, read_copies(folder))
