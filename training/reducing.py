"""A bundle and images without labels -> a bundle whose embeddings are centred, shorter, or whitened."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_core.bundle import Bundle, Manifest, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.manifest import CARD, CONFIG, PROJECTION, REFERENCE, WEIGHTS
from dino_core.projection import fit_projection, kept_variance
from training.data.images import Images
from training.errors import ConfigError
from training.evaluation.drawing import by_hash
from training.evaluation.embedding import embed_images

_OURS = {WEIGHTS, CONFIG, REFERENCE, CARD, PROJECTION}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a projection is fitted.

    Attributes:
        dimensions: That are kept; None for all of the network's.
        whitening: See `fit_projection`.
        max_images: That are looked at.
    """

    dimensions: int | None
    whitening: float
    max_images: int


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """What became of it.

    Attributes:
        manifest: Of the new bundle.
        images: That could be read and were looked at.
        variance_percent: Of the centred embeddings, that the kept directions hold.
    """

    manifest: Manifest
    images: int
    variance_percent: float


def reduce_bundle(
    bundle: Bundle,
    images: Images,
    out: Path,
    *,
    fit: Fit,
    batch_size: int = 64,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Reduced:
    """Fits a projection to the pooled embeddings of a bundle's network, and writes both as a new bundle.

    A projection that the bundle has is replaced, not followed by another.

    Args:
        bundle: Stays as it is.
        images: Their labels are not looked at.
        out: Where the new bundle goes.
        fit: How.
        batch_size: Images that go through the network together.
        on_progress: Hears how many more images are done.

    Raises:
        ConfigError: There is something at `out`.
        ProjectionError: The images are too few, or the dimensions too many.
        BundleError: What was written does not load again.
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: give --out another name, or move the old bundle away")
    old = bundle.model
    pooled = EmbeddingModel(
        old.backbone, preprocessing=old.preprocessing, pooling=old.pooling, normalise=True
    ).to(next(old.parameters()).device)
    features_ND = embed_images(
        pooled,
        images,
        places=by_hash(images)[: fit.max_images],
        batch_size=batch_size,
        on_progress=on_progress,
    ).features_ND
    projection = fit_projection(
        features_ND, dimensions=fit.dimensions or pooled.dimensions, whitening=fit.whitening
    )
    variance_percent = 100 * kept_variance(features_ND, projection)
    model = EmbeddingModel(
        old.backbone,
        preprocessing=old.preprocessing,
        pooling=old.pooling,
        normalise=old.normalise,
        projection=projection,
    ).to("cpu")
    what = {
        "images": len(features_ND),
        "data": str(images.origin),
        "dimensions": projection.dimensions,
        "whitening": fit.whitening,
        "variance_percent": variance_percent,
        "of": bundle.manifest.fingerprint,
    }
    manifest = write_bundle(
        out,
        model,
        provenance={**bundle.manifest.provenance, "projection": what},
        card=_card(bundle, out.name, what),
        assets={
            name: (bundle.path / name).read_bytes() for name in bundle.manifest.files if name not in _OURS
        },
    )
    return Reduced(manifest=manifest, images=len(features_ND), variance_percent=variance_percent)


def _card(bundle: Bundle, name: str, what: dict[str, Any]) -> str:
    """The old card under the new name, with what was done to it; its measurements stay those of the old."""
    card = (bundle.path / CARD).read_text(encoding="utf-8")
    for form in ("# {}\n", "models/{}"):
        card = card.replace(form.format(bundle.manifest.id), form.format(name))
    return f"""{card.rstrip()}

## Projection
What the network pools is scaled to length 1, centred, and turned onto its {what["dimensions"]} strongest
directions ({what["variance_percent"]:.1f} % of the variance; whitening {what["whitening"]:g}), fitted to
{what["images"]:,} images without labels. The measurements above were made before that.
"""
