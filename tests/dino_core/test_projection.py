"""What follows the pooling: fitted values against their definition, bounds, and the way through a bundle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from dino_core.backbones import make_backbone
from dino_core.bundle import fingerprint_of, load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BundleError, ProjectionError
from dino_core.preprocess import Preprocessing
from dino_core.projection import Projection, fit_projection

PREPROCESSING = Preprocessing(resize_px=40, crop_px=32)


def embeddings(count: int = 400, dimensions: int = 12) -> Tensor:
    """Correlated, off centre, of any length."""
    generator = torch.Generator().manual_seed(3)
    mixing_DD = torch.randn(dimensions, dimensions, generator=generator)
    return torch.randn(count, dimensions, generator=generator) @ mixing_DD + 2.0


def resnet(projection: Projection | None = None) -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone("test_resnet", image_size_px=32)
    return EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling="mean", projection=projection)


def pixels(count: int = 4) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_without_whitening_all_dimensions_keep_the_distances_between_embeddings() -> None:
    raw_ND = embeddings()
    unit_ND = functional.normalize(raw_ND, dim=1)
    projected_ND = fit_projection(raw_ND, dimensions=12)(raw_ND)
    torch.testing.assert_close(projected_ND.mean(dim=0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.cdist(projected_ND, projected_ND), torch.cdist(unit_ND, unit_ND), atol=2e-3, rtol=0
    )


def test_fewer_dimensions_are_the_strongest_in_order() -> None:
    raw_ND = embeddings()
    all_D, some_E = (
        fit_projection(raw_ND, dimensions=12)(raw_ND),
        fit_projection(raw_ND, dimensions=5)(raw_ND),
    )
    torch.testing.assert_close(all_D[:, :5], some_E)
    spread_D = all_D.var(dim=0)
    assert (spread_D.diff() <= 0).all()
    covariance_DD = torch.cov(all_D.T)
    torch.testing.assert_close(covariance_DD, torch.diag(covariance_DD.diag()), atol=1e-6, rtol=0)


def test_whitening_evens_the_variances_out_by_its_share() -> None:
    raw_ND = embeddings(4000)
    spreads = [
        fit_projection(raw_ND, dimensions=4, whitening=share)(raw_ND).var(dim=0) for share in (0.0, 0.5, 1.0)
    ]
    unevenness = [(spread.max() / spread.min()).item() for spread in spreads]
    assert unevenness[0] > unevenness[1] > unevenness[2]
    expected = spreads[0] / (spreads[0] + 0.01 * spreads[0][0])
    torch.testing.assert_close(spreads[2] / spreads[2][0], expected / expected[0], rtol=1e-3, atol=0)


def test_equal_embeddings_in_another_order_give_the_same_projection() -> None:
    raw_ND = embeddings()
    one, other = fit_projection(raw_ND, dimensions=6), fit_projection(raw_ND.flip(0), dimensions=6)
    torch.testing.assert_close(one.get_buffer("matrix_DE"), other.get_buffer("matrix_DE"), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 13}, "13 dimensions cannot be kept of 12: give 1 to 12"),
        ({"dimensions": 0}, "0 dimensions cannot be kept"),
        ({"dimensions": 4, "whitening": 1.5}, "whitening is 1.5, and must be from 0 to 1"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ProjectionError, match=message):
        fit_projection(embeddings(), **options)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ProjectionError, match="8 images span fewer than 8 directions"):
        fit_projection(embeddings(8), dimensions=8)


def test_a_model_projects_what_its_backbone_pooled_and_gives_length_one() -> None:
    plain = resnet()
    projection = fit_projection(embeddings(500, plain.dimensions), dimensions=10, whitening=0.5)
    model = resnet(projection)
    assert model.dimensions == 10
    with torch.no_grad():
        expected = functional.normalize(projection(plain(pixels())), dim=1)
        torch.testing.assert_close(model(pixels()), expected)


def test_a_projection_of_another_network_is_refused() -> None:
    with pytest.raises(ProjectionError, match="takes 12 dimensions, test_resnet gives"):
        resnet(fit_projection(embeddings(), dimensions=4))


def bundle_with_projection(path: Path) -> EmbeddingModel:
    model = resnet(fit_projection(embeddings(500, resnet().dimensions), dimensions=10))
    write_bundle(path, model, provenance={}, card="# A card\n")
    return model


def test_a_bundle_brings_its_projection_and_its_fingerprint_covers_it(tmp_path: Path) -> None:
    model = bundle_with_projection(tmp_path / "reduced")
    loaded = load_bundle(tmp_path / "reduced")
    assert loaded.manifest.embedding_dimension == loaded.model.dimensions == 10
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(pixels()), model(pixels()))
    assert loaded.manifest.fingerprint == fingerprint_of(model) != fingerprint_of(resnet())
    assert model.projection is not None
    model.projection.get_buffer("mean_D")[0] += 1e-3
    assert fingerprint_of(model) != loaded.manifest.fingerprint


def test_a_projection_that_was_changed_or_taken_away_is_noticed(tmp_path: Path) -> None:
    bundle_with_projection(tmp_path / "reduced")
    file = tmp_path / "reduced/projection.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "mean_D": tensors["mean_D"] + 1}, file)
    with pytest.raises(BundleError, match=r"projection\.safetensors has changed"):
        load_bundle(tmp_path / "reduced")
    file.unlink()
    with pytest.raises(BundleError, match=r"projection\.safetensors is missing"):
        load_bundle(tmp_path / "reduced")
