"""Pictures that are compressed and shrunk: what is done to them, and what is counted."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dino_core.preprocess import Preprocessing
from training.data.folder import ImageList, find_images
from training.evaluation.baselines import RawPixels
from training.evaluation.embedding import embed_images
from training.evaluation.robustness import CHANGES, Queries, jpeg_again, robustness, shrunk


@pytest.fixture
def photos(tmp_path: Path) -> ImageList:
    """Thirty smooth pictures of 80 x 60 px, of three classes by their hue, and a large one."""
    noise = np.random.default_rng(0)
    for number in range(30):
        folder = tmp_path / f"class-{number % 3}"
        folder.mkdir(exist_ok=True)
        coarse = noise.integers(0, 120, (6, 8, 3), dtype=np.uint8)
        coarse[..., number % 3] += 120
        side = 20 if number == 0 else 10
        Image.fromarray(coarse).resize((8 * side, 6 * side), Image.Resampling.BICUBIC).save(
            folder / f"{number:02}.png"
        )
    return find_images(tmp_path)


def asked(images: ImageList, places: list[int], model: RawPixels) -> tuple[Queries, Tensor, Tensor]:
    features_ND = embed_images(model, images).features_ND
    assert images.labels_N is not None
    rest = [place for place in range(len(images)) if place not in places]
    queries = Queries(
        images=images, places=places, features_MD=features_ND[places], labels_M=images.labels_N[places]
    )
    return queries, features_ND[rest], images.labels_N[rest]


def test_less_is_left_the_more_is_taken_away(photos: ImageList) -> None:
    found = robustness(RawPixels(), *asked(photos, [0, 1, 10, 20], RawPixels()), batch_size=3)
    # 60 px and less are smaller than two of the sizes; one picture is 120 px high and 160 px wide.
    assert set(found) == {"unchanged", *CHANGES} - {"128 px"}
    assert found["64 px"]["cosine"].queries == 1
    assert found["32 px"]["cosine"].queries == 4
    assert found["jpeg 90"]["cosine"].value > found["jpeg 10"]["cosine"].value > 80
    assert found["jpeg 90"]["neighbours"].value > 80
    assert set(found["unchanged"]) == {"top1_k20"}
    for measures in found.values():
        for one in measures.values():
            assert 0 <= one.low <= one.value + 1e-4
            assert one.value <= one.high + 1e-4 <= 100 + 2e-4


def test_without_classes_neighbours_and_cosines_are_measured(photos: ImageList) -> None:
    queries, gallery, _ = asked(photos, [3, 4], RawPixels())
    found = robustness(RawPixels(), queries, gallery, None)
    assert "unchanged" not in found
    assert set(found["jpeg 50"]) == {"cosine", "neighbours"}


def test_a_network_that_answers_all_alike_keeps_chances_share_of_neighbours(photos: ImageList) -> None:
    class Same:
        preprocessing = Preprocessing(resize_px=8, crop_px=8)
        dimensions = 4

        def __call__(self, pixels_BCHW: Tensor) -> Tensor:
            return torch.full((len(pixels_BCHW), 4), 0.5)

    same = torch.full((30, 4), 0.5)
    assert photos.labels_N is not None
    queries = Queries(images=photos, places=[0, 1], features_MD=same[:2], labels_M=photos.labels_N[:2])
    found = robustness(Same(), queries, same[2:], photos.labels_N[2:])
    assert found["jpeg 50"]["neighbours"].value == pytest.approx(100 * 10 / 28)


def test_the_changes_are_what_they_are_called() -> None:
    noise = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    small, large = jpeg_again(noise, 10), jpeg_again(noise, 90)
    assert len(small) < len(large) / 2
    with Image.open(io.BytesIO(small)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (60, 40))
    assert shrunk(noise, 20).shape == (3, 20, 30)
