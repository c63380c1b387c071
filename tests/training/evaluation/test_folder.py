"""A folder measured by a model: splits, classes by name, and no number that the order of files moves."""

import pytest
import torch

from dino_core.backbones import make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing
from tests.training.conftest import MakeFolder
from training.data.folder import ImageList, find_images
from training.errors import DataError
from training.evaluation.drawing import by_hash
from training.evaluation.folder import embed_folder, evaluate_folder, labels_in


@pytest.fixture
def model() -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone("test_resnet", image_size_px=16)
    return EmbeddingModel(backbone, preprocessing=Preprocessing(resize_px=18, crop_px=16), pooling="mean")


def test_a_split_folder_is_measured_by_its_split(model: EmbeddingModel, make_folder: MakeFolder) -> None:
    train, val = (
        find_images(make_folder("a", per_class=8)),
        find_images(make_folder("b", per_class=4, seed=1)),
    )
    folder = embed_folder(model, train, val)
    report = evaluate_folder(folder)
    assert report.kind == "8 images of val/ by 16 of train/"
    assert set(report.means) == {"top1_k10", "linear", "p_at_1", "map"}
    assert set(report.spread) == {"feature_std", "rank_me"}
    for estimate in report.means.values():
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 100
        assert estimate.queries == 8
    assert report.means["top1_k10"].value > 50, "stripes across and down differ for any network"
    assert set(report.by_class) == {"across", "down"}
    assert folder.names[0] == "train/across/across-0.png"
    assert folder.names[-1] == "val/down/down-3.png"
    assert folder.features_ND.shape == (24, model.dimensions)
    assert "linear" not in evaluate_folder(folder, probe=False).means


def test_a_folder_without_a_split_is_measured_by_tenths(
    model: EmbeddingModel, make_folder: MakeFolder
) -> None:
    report = evaluate_folder(embed_folder(model, find_images(make_folder(per_class=30)), None))
    assert report.kind == "each tenth by the other nine"
    assert report.means["top1_k20"].queries == 60
    assert 0 < report.means["linear"].queries < 20


def test_a_flat_folder_is_measured_without_labels(model: EmbeddingModel, make_folder: MakeFolder) -> None:
    report = evaluate_folder(embed_folder(model, find_images(make_folder(flat=True)), None))
    assert report.means == report.by_class == {}
    assert set(report.spread) == {"feature_std", "rank_me"}
    assert "no classes" in report.kind


@pytest.mark.parametrize("split", [True, False])
def test_the_order_of_a_list_changes_no_number(
    model: EmbeddingModel, make_folder: MakeFolder, split: bool
) -> None:
    images, val = find_images(make_folder("a", per_class=30)), find_images(make_folder("b", seed=1))

    def shuffled(one: ImageList, seed: int) -> ImageList:
        order = torch.randperm(len(one), generator=torch.Generator().manual_seed(seed))
        assert one.labels_N is not None
        return ImageList(
            one.root, tuple(one.names[place] for place in order), one.labels_N[order], one.class_names
        )

    straight = evaluate_folder(embed_folder(model, images, val if split else None))
    other = evaluate_folder(embed_folder(model, shuffled(images, 0), shuffled(val, 1) if split else None))
    for one, two in ((straight.means, other.means), (straight.by_class, other.by_class)):
        assert {name: found.to_json() for name, found in one.items()} == {
            name: found.to_json() for name, found in two.items()
        }
    assert straight.spread == other.spread


def test_queries_to_change_are_drawn_by_their_names(model: EmbeddingModel, make_folder: MakeFolder) -> None:
    train = find_images(make_folder("a", per_class=8, corrupt=1))
    val = find_images(make_folder("b", per_class=4, seed=1))
    queries, gallery, labels = embed_folder(model, train, val).queries(3)
    assert (len(queries.places), len(gallery)) == (3, 16)
    assert queries.labels_M is not None
    assert labels is not None
    assert queries.places == by_hash(val)[:3]
    assert [val.names[place].split("/")[0] for place in queries.places] == [
        train.class_names[label] for label in queries.labels_M
    ]
    alone, rest, _ = embed_folder(model, train, None).queries(1000)
    assert (len(alone.places), len(rest)) == (8, 8), "half asks, and the other half is the gallery"
    assert embed_folder(model, train, None).skipped.keys() == {"across/broken-0.jpg"}


def test_classes_are_matched_by_name(make_folder: MakeFolder) -> None:
    images = find_images(make_folder())
    labels = labels_in(images, ("other", "down", "across"))
    assert labels is not None
    assert labels.tolist() == [2] * 6 + [1] * 6
    with pytest.raises(DataError, match="'across', which the training folder lacks"):
        labels_in(images, ("down", "other"))
    assert labels_in(images, ()) is None
