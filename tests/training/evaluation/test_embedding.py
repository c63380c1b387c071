"""Embedding: the service's pixels, every file named, and draws by names alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dino_core.backbones import make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing, load_pixels
from tests.training.conftest import MakeFolder
from training.data.folder import find_images
from training.errors import DataError
from training.evaluation.drawing import by_hash, folds_of, held_out
from training.evaluation.embedding import embed_images, save_embeddings


@pytest.fixture
def model() -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone("test_resnet", image_size_px=16)
    return EmbeddingModel(backbone, preprocessing=Preprocessing(resize_px=18, crop_px=16), pooling="mean")


def test_embeddings_are_those_of_single_images(model: EmbeddingModel, make_folder: MakeFolder) -> None:
    images = find_images(make_folder(per_class=5))
    embedded = embed_images(model, images, batch_size=3, workers=2)
    assert embedded.indices_N.tolist() == list(range(10))
    with torch.no_grad():
        for index in range(10):
            alone = model(load_pixels(images.path(index).read_bytes(), model.preprocessing)[None])[0]
            assert float(alone @ embedded.features_ND[index]) > 0.9999


def test_unreadable_files_are_named_and_left_out(model: EmbeddingModel, make_folder: MakeFolder) -> None:
    images = find_images(make_folder(per_class=3, corrupt=2))
    embedded = embed_images(model, images, batch_size=2)
    assert sorted(embedded.skipped) == ["across/broken-0.jpg", "across/broken-1.jpg"]
    assert all(embedded.skipped.values())
    assert len(embedded.features_ND) == 6


def test_a_folder_without_one_readable_image_is_refused(model: EmbeddingModel, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the 1 images"):
        embed_images(model, find_images(tmp_path))


def test_the_hash_order_depends_on_names_alone(make_folder: MakeFolder) -> None:
    one, two = find_images(make_folder("a")), find_images(make_folder("b", seed=3))
    assert by_hash(one) == by_hash(two) != list(range(12))


def test_parts_are_drawn_by_names_alone() -> None:
    names = [f"class/{place}.jpg" for place in range(1000)]
    folds, fifth = folds_of(names), held_out(names)
    assert folds_of(list(reversed(names))).flip(0).tolist() == folds.tolist()
    assert folds.bincount(minlength=10).tolist() == pytest.approx([100] * 10, abs=35)
    # The fifth takes as much of each tenth: a tenth that is left out takes no more of it along.
    assert folds[fifth].bincount(minlength=10).tolist() == pytest.approx([20] * 10, abs=15)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_written_embeddings_come_back_with_their_paths(tmp_path: Path, suffix: str) -> None:
    path, names, features = tmp_path / f"e{suffix}", ["a/b.png", "é.png"], torch.arange(6.0).view(2, 3)
    save_embeddings(path, names, features)
    if suffix == ".npz":
        with np.load(path) as file:
            assert file["paths"].tolist() == names
            assert np.array_equal(file["embeddings"], features.numpy())
    else:
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"paths": '["a/b.png", "\\u00e9.png"]'}
            assert np.array_equal(file.get_tensor("embeddings"), features.numpy())


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not as '\.csv'"):
        save_embeddings(tmp_path / "e.csv", [], torch.zeros(0, 3))
