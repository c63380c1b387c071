"""Evaluation: the service's pixels, every file named, accuracies that a hand count gives."""

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
from training.evaluation.folder import (
    by_hash,
    embed_images,
    evaluate_folder,
    folds_of,
    knn_by_folds,
    knn_by_split,
    labels_in,
    save_embeddings,
)


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


def test_accuracy_counts_what_the_nearest_say() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2]).repeat_interleave(2)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0] * 6 + [1] * 6)
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # Ten of the twelve vote, but the near ones weigh exp(1 / 0.07) against exp(-1 / 0.07).
    assert knn_by_split(features, labels, queries, torch.tensor([0, 1])) == {"top1_k10": 100.0}
    assert knn_by_split(features, labels, queries, torch.tensor([0, 0])) == {"top1_k10": 50.0}


def test_folds_classify_every_image_by_the_others(make_folder: MakeFolder) -> None:
    images = find_images(make_folder(per_class=30))
    folds = folds_of(images, torch.arange(60))
    assert len(set(folds.tolist())) > 5
    labels = torch.arange(60) % 2
    features = torch.stack([labels.float(), 1 - labels.float()], dim=1)
    assert knn_by_folds(features, labels, folds)["top1_k10"] == 100.0


def test_a_split_folder_is_measured_by_its_split(model: EmbeddingModel, make_folder: MakeFolder) -> None:
    train, val = (
        find_images(make_folder("a", per_class=8)),
        find_images(make_folder("b", per_class=4, seed=1)),
    )
    report = evaluate_folder(model, train, val)
    assert report.knn_kind == "8 images of val/ by 16 of train/"
    assert set(report.half_widths) == {"top1_k10", "linear", "p_at_1", "map"}
    assert set(report.measures) == {*report.half_widths, "feature_std", "rank_me"}
    assert all(0 <= half_width < 30 for half_width in report.half_widths.values())
    assert report.measures["top1_k10"] > 50, "stripes across and down differ for any network"
    names, features = report.embedded
    assert names[0] == "train/across/across-0.png"
    assert names[-1] == "val/down/down-3.png"
    assert features.shape == (24, model.dimensions)


def test_a_flat_folder_is_measured_without_labels(model: EmbeddingModel, make_folder: MakeFolder) -> None:
    report = evaluate_folder(model, find_images(make_folder(flat=True)), None)
    assert set(report.measures) == {"feature_std", "rank_me"}
    assert "no classes" in report.knn_kind


def test_classes_are_matched_by_name(make_folder: MakeFolder) -> None:
    images = find_images(make_folder())
    labels = labels_in(images, ("other", "down", "across"))
    assert labels is not None
    assert labels.tolist() == [2] * 6 + [1] * 6
    with pytest.raises(DataError, match="'across', which the training folder lacks"):
        labels_in(images, ("down", "other"))
    assert labels_in(images, ()) is None


def test_the_hash_order_depends_on_names_alone(make_folder: MakeFolder) -> None:
    one, two = find_images(make_folder("a")), find_images(make_folder("b", seed=3))
    assert by_hash(one) == by_hash(two) != list(range(12))


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
