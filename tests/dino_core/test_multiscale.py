"""One embedding of several sizes: the official loop, sizes that fit the patches, and what is refused."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dino_core.backbones import make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BackboneError
from dino_core.multiscale import MultiScale
from dino_core.preprocess import Preprocessing

TINY_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}


def model(name: str = "resnet10t", **model_kwargs: object) -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone(name, image_size_px=32, model_kwargs=model_kwargs)
    shown = Preprocessing(resize_px=40, crop_px=32)
    return EmbeddingModel(backbone, preprocessing=shown, pooling=backbone.default_pooling)


def pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_it_is_the_direction_of_the_sum_over_sizes_picture_by_picture() -> None:
    single, pictures = model(), pixels(3)
    many = MultiScale(single, (0.75, 1.0, 1.5))
    assert (many.sides_px, many.dimensions) == ([24, 32, 48], single.dimensions)
    for row, embedding_D in enumerate(many(pictures)):
        picture = pictures[row : row + 1]
        total_D = torch.zeros(single.dimensions)
        for side in (24, 32, 48):
            size = (side, side)
            other = functional.interpolate(picture.float(), size=size, mode="bicubic", antialias=True)
            bytes_ = other.round().clamp(0, 255).to(torch.uint8)
            total_D += functional.normalize(single(bytes_)[0], dim=0)
        torch.testing.assert_close(embedding_D, total_D / total_D.norm(), rtol=0, atol=1e-5)


@torch.no_grad()
def test_its_own_size_alone_changes_nothing() -> None:
    single, pictures = model(), pixels(2)
    torch.testing.assert_close(MultiScale(single, (1.0,))(pictures), single(pictures), rtol=0, atol=1e-6)


@torch.no_grad()
def test_sizes_for_a_vit_are_whole_patches() -> None:
    many = MultiScale(model("vit_tiny_patch16_224", **TINY_VIT), (0.71, 1.0, 1.41))
    assert many.sides_px == [24, 32, 48]  # 22.7 and 45.1 px would cut a patch of 8
    assert many(pixels(2)).shape == (2, 48)


@pytest.mark.parametrize("scales", [(), (0.0, 1.0), (-1.0,), (1.0, 1.001)])
def test_scales_that_make_no_sizes_or_the_same_twice_are_refused(scales: tuple[float, ...]) -> None:
    with pytest.raises(BackboneError, match="make sides of .* such as 0.71 1 1.41"):
        MultiScale(model(), scales)
