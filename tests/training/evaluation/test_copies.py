"""Copy detection on folders made here, and its measure by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from dino_core.backbones import make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing
from training.data.folder import ImageList
from training.errors import DataError
from training.evaluation.copies import Copies, embed_copies, find_copies, read_copies
from training.evaluation.intervals import wilson_interval


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
    report = find_copies(embed_copies(model, copies), copies)
    assert report.by_attack["same"]["p_at_1"].value == 100
    assert report.by_attack["same"]["map"].value == 100
    # All four have the same nearest, which one at most is from.
    assert report.by_attack["blank"]["p_at_1"].value <= 25
    assert 50 <= report.measures["copies_micro_ap"].value < 100
    for measure in report.measures.values():
        assert measure.low <= measure.value <= measure.high
        assert (measure.queries, measure.sources) == (8, 4)


def made(count: int, attacks: int, *, distractors: int) -> Copies:
    """Originals, their copies and others, without pictures."""
    names = [f"{place:04}" for place in range(count * (1 + attacks) + distractors)]
    return Copies(
        images=ImageList(Path("made"), tuple(names)),
        queries_M=torch.arange(count, count * (1 + attacks)),
        originals_M=torch.arange(count).repeat(attacks),
        attacks=tuple(f"attack {place // count}" for place in range(count * attacks)),
    )


def test_a_network_that_answers_all_alike_gets_what_chance_gets() -> None:
    """The first file won all ties: one original was found, and micro-AP was 1.0 or 0.1 by order."""
    copies = made(5, 3, distractors=5)
    report = find_copies(torch.full((25, 4), 0.5), copies)
    assert report.measures["copies_p_at_1"].value == pytest.approx(10)
    expected = 10 * sum(1 / rank for rank in range(1, 11))
    assert report.measures["copies_map"].value == pytest.approx(expected)
    # 15 right ones in 150 pairs, all with one score.
    by_rank = [15 / 150 * (1 + (rank - 1) * 14 / 149) / rank for rank in range(1, 151)]
    assert report.measures["copies_micro_ap"].value == pytest.approx(100 * sum(by_rank) / 15)
    assert [one["p_at_1"].value for one in report.by_attack.values()] == [pytest.approx(10)] * 3


def test_by_hand() -> None:
    """Two originals and one distractor on a circle; their copies a little and far too far turned."""
    angles = torch.tensor([0.0, 90.0, 10.0, 50.0, 45.0]).deg2rad()
    copies = Copies(
        images=ImageList(Path("made"), tuple("abcde")),
        queries_M=torch.tensor([2, 3]),
        originals_M=torch.tensor([0, 1]),
        attacks=("small", "large"),
    )
    report = find_copies(torch.stack([angles.cos(), angles.sin()], dim=1), copies)
    assert report.measures["copies_p_at_1"].value == 50
    assert report.measures["copies_map"].value == pytest.approx(100 * (1 + 1 / 2) / 2)
    # Ranked by angle: 5 (wrong), 10 (right), 35 (wrong), 40 (right), 50, 80.
    assert report.measures["copies_micro_ap"].value == pytest.approx(100 * (1 / 2 + 2 / 4) / 2)
    assert [report.by_attack[name]["map"].value for name in ("small", "large")] == [100, 50]


def test_copies_of_one_original_are_one_witness() -> None:
    """The interval took 20 copies of each of 30 originals for 600 pictures, and was far too narrow."""
    copies = made(30, 20, distractors=100)
    generator = torch.Generator().manual_seed(0)
    features = functional.normalize(torch.randn(730, 16, generator=generator), dim=1)
    easy = torch.arange(0, 30, 2)  # copies of these are near them, the others anywhere
    for attack in range(20):
        features[30 * (attack + 1) + easy] = features[easy]
    found = find_copies(features, copies).measures["copies_p_at_1"]
    assert found.value == pytest.approx(50, abs=4)
    low, high = wilson_interval(found.value / 100, 600)
    assert found.high - found.low > 4 * 100 * (high - low)


def test_the_order_of_files_and_rows_changes_nothing(model: EmbeddingModel, folder: Path) -> None:
    copies = read_copies(folder)
    table = folder / "groundtruth.csv"
    head, *rows = table.read_text().splitlines()
    table.write_text("\n".join([head, *reversed(rows)]))
    again = read_copies(folder)
    features = embed_copies(model, copies)
    one, other = find_copies(features, copies), find_copies(features, again)
    assert {name: found.to_json() for name, found in one.measures.items()} == {
        name: found.to_json() for name, found in other.measures.items()
    }


SHARED = Path(__file__).parents[4] / "shared/data/copies"


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the shared folder of copies, which is not in the project"
)
def test_real_copies_are_found_better_the_less_was_done_to_them() -> None:
    copies = read_copies(SHARED)
    torch.manual_seed(0)
    untrained = EmbeddingModel(
        make_backbone("test_resnet", image_size_px=64),
        preprocessing=Preprocessing(resize_px=64, crop_px=64),
        pooling="mean",
    )
    report = find_copies(embed_copies(untrained, copies), copies)
    assert len(report.by_attack) == 20
    assert report.by_attack["jpeg30"]["p_at_1"].value > report.by_attack["jpeg5"]["p_at_1"].value
    assert report.by_attack["crop10"]["map"].value > report.by_attack["crop70"]["map"].value
    total = report.measures["copies_p_at_1"]
    assert (total.queries, total.sources) == (600, 30)


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (None, "is not there: a folder of copies needs this table"),
        ("a,b\n1,2\n", "has the columns .'a', 'b'.: expected query,original,attack"),
        ("query,original,attack\n", "has no rows"),
        ("query,original,attack\nsame/1.png,same/1.png,x\n", "same/1.png as a query and as an original"),
        ("query,original,attack\nsame/1.png,original/1.png\nsame/1.png\n", "names , which is no image"),
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
        embed_copies(model, read_copies(folder))
