"""Before the first step: a look at the images, and the loader that the settings ask for."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from training.config import RunConfig
from training.data.cache import forget, memory_cache_dir, open_cache
from training.data.canvases import CanvasSource, DecodedCanvases
from training.data.checking import DataReport, check_images
from training.data.images import Images
from training.data.loader import CanvasLoader
from training.distributed import World, any_of

_SAMPLE = 256  # images that are looked at before a run: a second or two


def open_loader(
    images: Images,
    config: RunConfig,
    run_dir: Path,
    *,
    world: World,
    device: torch.device,
    say: Callable[[str], None] | None = None,
) -> CanvasLoader:
    """The loader of a run, with the cache that its settings ask for; its processes call it together.

    It tells `say` when images are long in coming.

    Raises:
        DataError: There are too few images, or there is no room for the cache.
    """
    return CanvasLoader(
        images,
        canvas_px=config.loading.canvas_px,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=config.loading.workers,
        source=_source(images, config, run_dir, world=world, device=device),
        max_wait_s=config.guard.max_data_wait_s,
        say=say,
    )


def findings(images: Images, val_images: Images | None, config: RunConfig) -> tuple[DataReport, str] | None:
    """Looks at images as `loading.check` says: what was found, and in a sentence; none if all is well."""
    loading, crop_px = config.loading, config.crops.global_px
    if loading.check == "off":
        return None
    parts = [("", images)] if val_images is None else [("train/", images), ("val/", val_images)]
    sample = _SAMPLE if loading.check == "sample" else None
    channels = config.backbone.in_channels if config.planes() is not None else None
    report = check_images(
        parts, crop_px=crop_px, sample=sample, channels=channels, workers=loading.workers or None
    )
    if report.is_clean:
        return None
    copies = sum(len(group) - 1 for group in report.duplicates)
    found = [
        f"{count:,} {words}"
        for count, words in (
            (len(report.unreadable), "cannot be read"),
            (copies, "are copies of others"),
            (len(report.small), f"have a side below the crop's {crop_px} px"),
            (len(report.odd_channels), "have other channels than the network"),
        )
        if count
    ]
    return report, f"of {report.looked_at:,} images that were looked at {', '.join(found)}"


def _source(
    images: Images, config: RunConfig, run_dir: Path, *, world: World, device: torch.device
) -> CanvasSource:
    loading, planes = config.loading, config.planes()
    if loading.cache == "off":
        return DecodedCanvases(images, loading.canvas_px, planes)
    cache_dir = _cache_dir(loading.cache, loading.cache_dir or run_dir / "cache")
    cache = open_cache(
        images,
        canvas_px=loading.canvas_px,
        planes=planes,
        cache_dir=cache_dir,
        workers=loading.workers or None,
    )
    if loading.cache == "memory":
        # Once every process has opened it, its name goes: what is left ends with the last process, even a
        # killed one.
        any_of(False, world=world, device=device)
        forget(images, canvas_px=loading.canvas_px, planes=planes, cache_dir=cache_dir)
    return cache


def _cache_dir(kind: Literal["disk", "memory"], on_disk: Path) -> Path:
    return on_disk if kind == "disk" else memory_cache_dir()
