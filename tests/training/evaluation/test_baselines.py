"""Raw pixels, a perceptual hash against a literal one, and the networks that a model began as."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_core.backbones import make_backbone
from dino_core.bundle import load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing
from training.evaluation.baselines import PerceptualHash, RawPixels, starting_weights, untrained
from training.evaluation.models import NamedModel

CPU = torch.device("cpu")


def pictures(count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return (255 * torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)).byte()


def model(*, seed: int) -> EmbeddingModel:
    torch.manual_seed(seed)
    return EmbeddingModel(
        make_backbone("test_resnet", image_size_px=32),
        preprocessing=Preprocessing(resize_px=36, crop_px=32),
        pooling="mean",
    )


def literal_hash(pixels: Tensor) -> list[bool]:
    """One frequency at a time, from the definition of the DCT-II."""
    red, green, blue = (channel.double() for channel in pixels)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    angles = math.pi / 32 * (torch.arange(32, dtype=torch.float64) + 0.5)
    found = [
        float((grey * (down * angles).cos()[:, None] * (across * angles).cos()).sum())
        * (0.5**0.5 if down == 0 else 1)
        * (0.5**0.5 if across == 0 else 1)
        for down in range(8)
        for across in range(8)
    ]
    median = sorted(found[1:])[31]
    return [value > median for value in found]


def test_the_hash_is_the_literal_one() -> None:
    embedded = PerceptualHash()(pictures(5))
    for vector, pixels in zip(embedded, pictures(5), strict=True):
        assert (vector > 0).tolist() == literal_hash(pixels)
    assert embedded.shape == (5, 64)


def test_a_cosine_of_hashes_counts_the_bits_that_differ() -> None:
    embedded = PerceptualHash()(pictures(2))
    differ = int(((embedded[0] > 0) != (embedded[1] > 0)).sum())
    assert float(embedded[0] @ embedded[1]) == pytest.approx(1 - 2 * differ / 64, abs=1e-6)
    assert differ > 10


def test_the_hash_stays_under_light_and_contrast_and_not_under_a_mirror() -> None:
    pixels = pictures(20)
    brighter = (pixels.float() * 0.6 + 60).round().byte()
    hashes = PerceptualHash()
    same = (hashes(pixels) * hashes(brighter)).sum(dim=1)
    mirrored = (hashes(pixels) * hashes(pixels.flip(3))).sum(dim=1)
    assert float(same.min()) > 0.85
    assert float(mirrored.max()) < 0.6


@pytest.mark.parametrize("simple", [RawPixels(), PerceptualHash()])
def test_vectors_have_length_one_and_a_blank_page_gives_finite_ones(
    simple: RawPixels | PerceptualHash,
) -> None:
    embedded = simple(pictures(3))
    assert embedded.shape == (3, simple.dimensions)
    assert embedded.norm(dim=1).tolist() == pytest.approx([1] * 3)
    blank = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    assert bool(torch.isfinite(simple(blank)).all())
    assert torch.equal(PerceptualHash()(blank), PerceptualHash()(blank // 2)), "rounding is no picture"


def test_raw_pixels_forget_how_bright_a_picture_is() -> None:
    pixels = pictures(3) // 2
    assert (RawPixels()(pixels) * RawPixels()(pixels + 100)).sum(dim=1).tolist() == pytest.approx([1] * 3)


def test_the_untrained_network_is_another_draw_of_the_same() -> None:
    trained = NamedModel(name="mine", model=model(seed=5))
    state = torch.get_rng_state()
    first, again = untrained(trained), untrained(trained)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.name == "mine untrained"
    assert first.model.preprocessing == trained.model.preprocessing
    pixels = pictures(2)
    assert torch.equal(first.model(pixels), again.model(pixels))
    assert not torch.allclose(first.model(pixels), trained.model(pixels))


@pytest.fixture
def adapted(tmp_path: Path) -> Path:
    """Two bundles, of which one was adapted from the other."""
    start = write_bundle(tmp_path / "start", model(seed=1), provenance={}, card="")
    origin = {"adapted_from": {"name": "start", "fingerprint": start.fingerprint}}
    write_bundle(tmp_path / "adapted", model(seed=2), provenance=origin, card="")
    return tmp_path / "adapted"


def test_the_start_is_found_beside_the_bundle(adapted: Path) -> None:
    manifest = load_bundle(adapted).manifest
    found = starting_weights(manifest.provenance, adapted, device=CPU)
    assert isinstance(found, NamedModel)
    assert found.name == "adapted at its start"
    pixels = pictures(2)
    assert torch.equal(found.model(pixels), model(seed=1)(pixels))


def test_a_start_that_is_another_or_gone_is_said(adapted: Path) -> None:
    origin = {"name": "start", "fingerprint": "sha256:0"}
    found = starting_weights({"adapted_from": origin}, adapted, device=CPU)
    assert isinstance(found, str)
    assert "start is not what adapted was adapted from: its fingerprint differs" in found
    found = starting_weights({"adapted_from": {"name": "elsewhere"}}, adapted, device=CPU)
    assert found == "adapted was adapted from elsewhere, which is not here: give it as another model"
    assert starting_weights({"adapted_from": None}, adapted, device=CPU) is None
    assert starting_weights({}, adapted, device=CPU) is None
