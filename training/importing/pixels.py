"""What a source says of its images -> our preprocessing, and where the two differ."""

from collections.abc import Mapping
from typing import Any

from timm.data.config import resolve_data_config

from dino_core.preprocess import Preprocessing

# Of the official evaluations: shorter side to 256 pixels, crop of 224.
_RESIZE_SHARE = 256 / 224
# PIL's numbers of its filters, as transformers writes them.
_PIL_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def official_pixels(*, positions_px: int | None, patch_px: int) -> tuple[Preprocessing, tuple[str, ...]]:
    """The official evaluations' images, for files that say nothing of theirs.

    Args:
        positions_px: What the network's positions are for; a smaller network sees smaller images.
        patch_px: The crop is a multiple of it.
    """
    side = min(224, positions_px or 224)
    side = max(patch_px, side // patch_px * patch_px)
    preprocessing = with_crop(Preprocessing(), side)
    return preprocessing, (
        "the file says nothing of its images: ImageNet's mean and deviation are taken, the shorter side "
        f"becomes {preprocessing.resize_px} px, the crop {side} px; --image-size gives another",
    )


def with_crop(preprocessing: Preprocessing, crop_px: int) -> Preprocessing:
    """The same for another crop, of which as much is cut away."""
    is_default = preprocessing == Preprocessing()
    share = _RESIZE_SHARE if is_default else preprocessing.resize_px / preprocessing.crop_px
    return Preprocessing(
        resize_px=max(crop_px, round(crop_px * share)),
        crop_px=crop_px,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )


def timm_pixels(configuration: Mapping[str, Any]) -> tuple[Preprocessing, tuple[str, ...]]:
    """From timm's `pretrained_cfg`."""
    config = resolve_data_config({}, pretrained_cfg=dict(configuration))  # type: ignore[no-untyped-call]
    side = int(config["input_size"][-1])
    preprocessing = Preprocessing(
        resize_px=max(side, round(side / float(config["crop_pct"]))),
        crop_px=side,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    notes = _other_filter(str(config["interpolation"]))
    if config.get("crop_mode", "center") != "center":
        notes = (*notes, f"timm's crop is {config['crop_mode']!r}, ours is from the middle")
    return preprocessing, notes


def transformers_pixels(values: Mapping[str, Any]) -> tuple[Preprocessing, tuple[str, ...]]:
    """From transformers' preprocessor_config.json.

    Raises:
        ValueError: It has values that no picture can have.
    """
    resize_px = _shorter_px(values.get("size", 224))
    crop_px = resize_px
    notes: tuple[str, ...] = ()
    if crops := values.get("crop_size") if values.get("do_center_crop", "crop_size" in values) else None:
        crop_px = _shorter_px(crops)
    elif values.get("crop_pct") and resize_px < 384:  # as the processor of ConvNeXt, which ResNets use
        resize_px = int(resize_px / float(values["crop_pct"]))
    else:
        notes = (
            f"the source squeezes pictures into {crop_px} x {crop_px} px; here the shorter side becomes "
            f"{resize_px} px and the middle is cut out, so that nothing is distorted",
        )
    normalises = values.get("do_normalize", True)
    preprocessing = Preprocessing(
        resize_px=max(resize_px, crop_px),
        crop_px=crop_px,
        mean=tuple(values["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        std=tuple(values["image_std"]) if normalises else (1.0, 1.0, 1.0),
    )
    return preprocessing, notes + _other_filter(_PIL_FILTERS.get(int(values.get("resample", 3)), "unknown"))


def _shorter_px(size: Any) -> int:  # noqa: ANN401  any JSON
    """A side of transformers' sizes: a number, one side, or both."""
    if isinstance(size, int):
        return size
    return int(size.get("shortest_edge") or min(size["height"], size["width"]))


def _other_filter(name: str) -> tuple[str, ...]:
    if name in ("bicubic", "random"):
        return ()
    return (f"the source resizes by {name}, ours is bicubic with antialias: embeddings differ by a little",)
