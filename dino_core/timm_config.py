"""A bundle's config.json: what timm needs to load the bundle with no code of ours."""

import math
from typing import Any

from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing

# Facts of timm's about the network, which its loader reads.
KEPT_FIELDS = ("first_conv", "classifier", "pool_size")


def timm_config(model: EmbeddingModel) -> dict[str, Any]:
    """Describes a model in timm's format.

    The network that timm makes of it gives the backbone's default embedding, not scaled to length 1; its data
    configuration (`timm.data.resolve_model_data_config`) gives our sizes, mean and std.

    Args:
        model: The model that is bundled.

    Returns:
        JSON values.
    """
    backbone = model.backbone
    preprocessing = model.preprocessing
    known: dict[str, Any] = getattr(backbone.network, "pretrained_cfg", {})
    takes_any_size = backbone.model_args.get("dynamic_img_size") or "img_size" not in backbone.model_args
    return {
        "architecture": backbone.architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": backbone.model_args,
        "pretrained_cfg": {
            "tag": "dino",
            "custom_load": False,
            "input_size": [preprocessing.channels, preprocessing.crop_px, preprocessing.crop_px],
            "fixed_input_size": not takes_any_size,
            "interpolation": preprocessing.interpolation,
            "crop_pct": _crop_share(preprocessing),
            "crop_mode": "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            **{name: _plain(known[name]) for name in KEPT_FIELDS if known.get(name) is not None},
        },
    }


def _crop_share(preprocessing: Preprocessing) -> float:
    """Gives the share that timm turns back into our sizes: it computes floor(crop / share)."""
    share = preprocessing.crop_px / preprocessing.resize_px
    if math.floor(preprocessing.crop_px / share) < preprocessing.resize_px:
        share = math.nextafter(share, 0.0)
    return share


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
