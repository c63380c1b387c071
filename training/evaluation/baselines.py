"""What stands beside a model: simple vectors that every model should beat, and the networks that it began as.

raw pixels      the picture at 32 x 32 px, less its mean (tiny images, Torralba et al. 2008)
pHash           64 bits of its cosine transform; the score is 1 - 2 * (bits that differ) / 64
untrained       the same network with random weights, pooled and fed alike
start           the weights that an adapted model began with, where they are at hand

The first two see the middle square of a picture, as networks do.

Dimension key: B images · C channels · H W pixels · D embedding
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dino_core.backbones import make_backbone
from dino_core.embedding import EmbeddingModel
from dino_core.errors import DinoError
from dino_core.preprocess import Preprocessing
from training.errors import TrainingError
from training.evaluation.models import NamedModel, model_named

_SIDE_PX = 32
_HASH_SIDE = 8  # lowest frequencies each way: 64 bits
_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601


class RawPixels:
    """Pictures as vectors of 32 x 32 colours, less their mean, of length 1; one colour alone gives zeros."""

    preprocessing = Preprocessing(resize_px=_SIDE_PX, crop_px=_SIDE_PX)
    dimensions = 3 * _SIDE_PX**2

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, 32, 32] -> float32 [B, D]."""
        flat_BD = pixels_BCHW.flatten(1).float()
        return functional.normalize(flat_BD - flat_BD.mean(dim=1, keepdim=True), dim=1)


class PerceptualHash:
    """Pictures as 64 bits: which of the lowest frequencies lie above their median.

    The bits are given as a vector of +-1/8, so that a cosine is 1 - 2 * (Hamming distance) / 64.

    References:
        Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1.
    """

    preprocessing = Preprocessing(resize_px=_SIDE_PX, crop_px=_SIDE_PX)
    dimensions = _HASH_SIDE**2

    def __call__(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8 [B, 3, 32, 32] -> float32 [B, 64]."""
        grey_BHW = torch.einsum("bchw,c->bhw", pixels_BCHW.double(), torch.tensor(_LUMA, dtype=torch.float64))
        waves_FH = _cosine_transform(_SIDE_PX)[:_HASH_SIDE]
        low_BFF = waves_FH @ grey_BHW @ waves_FH.T
        # On a grid: in a picture of one colour all but the first are 0 and rounding is no picture.
        bits_BD = low_BFF.flatten(1).mul(2**20).round()
        # The first is the brightness, which says nothing of the shape: it has no part in the median.
        median_B1 = bits_BD[:, 1:].median(dim=1, keepdim=True).values
        return torch.where(bits_BD > median_B1, 1.0, -1.0) / math.sqrt(self.dimensions)


def untrained(named: NamedModel, *, seed: int = 0) -> NamedModel:
    """The same network with random weights, with the same pixels and pooling, on the same device."""
    model = named.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = make_backbone(
            model.backbone.architecture,
            image_size_px=model.backbone.image_size_px,
            position_interpolation=model.backbone.position_interpolation,
            model_kwargs=model.backbone.model_args,
        )
    fresh = EmbeddingModel(backbone, preprocessing=model.preprocessing, pooling=model.pooling)
    return NamedModel(name=f"{named.name} untrained", model=fresh.to(next(model.parameters()).device))


def starting_weights(
    provenance: Mapping[str, object], bundle: Path, *, device: torch.device
) -> NamedModel | str | None:
    """What an adapted model began with.

    Args:
        provenance: Of its manifest.
        bundle: Where it lies; a bundle that it began with may lie beside it.
        device: Where the network goes.

    Returns:
        The model as it was, a sentence if it cannot be had, or none if the model began with nothing.
    """
    origin = provenance.get("adapted_from")
    if not isinstance(origin, Mapping) or not isinstance(origin.get("name"), str):
        return None
    name, fingerprint = str(origin["name"]), origin.get("fingerprint")
    missing = f"{bundle.name} was adapted from {name}, which is not here: give it as another model"
    for where in (name, str(bundle.resolve().parent / name)):
        if not where.startswith("timm:") and not Path(where).exists():
            continue
        try:
            found = model_named(where, device=device)
        except (TrainingError, DinoError):
            continue
        if found.fingerprint is not None and found.fingerprint != fingerprint:
            missing = f"{where} is not what {bundle.name} was adapted from: its fingerprint differs"
            continue
        return NamedModel(
            name=f"{bundle.name} at its start", model=found.model, fingerprint=found.fingerprint
        )
    return missing


def _cosine_transform(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix, float64 [frequency, place]."""
    places = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (places + 0.5) * places[:, None]) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves
