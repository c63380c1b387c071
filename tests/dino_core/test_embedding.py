"""uint8 pixels in, embedding out: the formula, alone and in company, traced and exported."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_core.backbones import Pooling, make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BackboneError
from dino_core.preprocess import Preprocessing, normalise

PREPROCESSING = Preprocessing(resize_px=40, crop_px=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TINY_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def vit(pooling: Pooling = "cls", *, normalise: bool = True) -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone("vit_tiny_patch16_224", image_size_px=32, model_kwargs=TINY_VIT)
    return EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling=pooling, normalise=normalise)


def resnet() -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone("resnet18", image_size_px=32)
    for module in backbone.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # as after some training: statistics that are not those of any batch
            nn.init.uniform_(module.get_buffer("running_mean"), -0.1, 0.1)
    return EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling="mean")


def pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(("pooling", "dimensions"), [("cls", 48), ("mean", 48), ("cls+mean", 96)])
def test_an_embedding_is_normalise_network_pool_and_length_one(pooling: Pooling, dimensions: int) -> None:
    model = vit(pooling)
    images = normalise(pixels(3), mean=PREPROCESSING.mean, std=PREPROCESSING.std)
    expected = functional.normalize(model.backbone.features(images).pooled(pooling), dim=1)
    embeddings = model(pixels(3))
    assert embeddings.shape == (3, model.dimensions) == (3, dimensions)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_length_is_kept_where_it_is_not_to_be_one() -> None:
    raw, unit = vit(normalise=False)(pixels(2)), vit()(pixels(2))
    torch.testing.assert_close(functional.normalize(raw, dim=1), unit)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("make", [vit, resnet])
def test_an_image_has_the_same_embedding_alone_and_in_a_batch_of_64(make: type) -> None:
    model = make()
    batch = pixels(64)
    together = model(batch)
    alone = torch.cat([model(image[None]) for image in batch])
    assert functional.cosine_similarity(together, alone).min() >= 0.9999


@torch.no_grad()
def test_training_mode_cannot_be_switched_on() -> None:
    model = resnet()
    before = model(pixels(4))
    model.train()
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(pixels(4)), before)


@torch.no_grad()
def test_memory_order_does_not_matter() -> None:
    model = resnet()
    torch.testing.assert_close(
        model(pixels(4).to(memory_format=torch.channels_last)), model(pixels(4)), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_features_and_attention_take_pixels_too() -> None:
    model = vit()
    features = model.features(pixels(2))
    assert features.grid_hw == (4, 4)
    torch.testing.assert_close(functional.normalize(features.pooled("cls"), dim=1), model(pixels(2)))
    assert model.attention(pixels(2)).shape == (2, 3, 17, 17)


@torch.no_grad()
def test_a_backbone_in_half_precision_keeps_normalisation_and_length_in_float32() -> None:
    model, exact = vit(), vit()
    model.backbone.to(torch.bfloat16)
    embeddings = model(pixels(4))
    assert embeddings.dtype == torch.float32
    assert model.get_buffer("mean_C").dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    assert functional.cosine_similarity(embeddings, exact(pixels(4))).min() > 0.999


def test_the_weights_are_the_backbones_alone() -> None:
    assert all(name.startswith("backbone.network.") for name in vit().state_dict())


@torch.no_grad()
@pytest.mark.parametrize("make", [vit, resnet])
def test_it_can_be_traced_for_any_batch_size(make: type) -> None:
    """As compilers and exporters need it: no value decides the way through."""
    model = make()
    exported = torch.export.export(
        model, (pixels(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    for count in (1, 5):
        torch.testing.assert_close(
            exported.module()(pixels(count)), model(pixels(count)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.gpu
@torch.no_grad()
def test_it_can_be_captured_in_a_cuda_graph() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = vit().cuda()
    batch = pixels(8).cuda()
    expected = model(batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(batch)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=1e-4, atol=1e-5)


def test_floats_are_refused_as_they_would_be_normalised_twice() -> None:
    with pytest.raises(TypeError, match=r"pixels are torch.float32, expected torch.uint8"):
        vit()(torch.zeros(1, 3, 32, 32))


def test_a_pooling_that_the_backbone_lacks_is_refused() -> None:
    with pytest.raises(BackboneError, match="resnet18 cannot pool by 'cls', but by mean"):
        EmbeddingModel(make_backbone("resnet18"), preprocessing=PREPROCESSING, pooling="cls")


def test_a_backbone_for_other_channels_is_refused() -> None:
    backbone = make_backbone("resnet18", in_channels=4)
    with pytest.raises(BackboneError, match="takes 4 channels, pictures have 3"):
        EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling="mean")
