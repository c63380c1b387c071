"""What the networks will see of the first images of a run, as a picture, before a GPU hour is spent."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_core.augment import Draws, View, augment, draw
from training.checkpoint import write_synced
from training.config import RunConfig
from training.data.canvases import DecodedCanvases
from training.data.images import Images
from training.data.loader import Batch, CanvasLoader
from training.data.opening import open_split
from training.pictures import augmentation_preview
from training.rundir import RunPlan

PREVIEW_FILE = "preview.png"
MOST_IMAGES = 6


def preview_of(plan: RunPlan, run_dir: Path) -> Path:
    """Writes the preview of a run that has not begun.

    Returns:
        The picture.

    Raises:
        DataError: There are no images, or none can be read.
    """
    images, _ = open_split(plan.data, plan.val_data)
    return write_preview(images, plan.config, run_dir)


def write_preview(images: Images, config: RunConfig, run_dir: Path) -> Path:
    """Draws the first images of the first epoch with every crop that step 1 makes of them.

    Returns:
        The picture.

    Raises:
        DataError: None of the images can be read.
    """
    with CanvasLoader(
        images,
        canvas_px=config.loading.canvas_px,
        batch_size=min(MOST_IMAGES, config.batch_size, len(images)),
        seed=config.seed,
        workers=0,
        source=DecodedCanvases(images, config.loading.canvas_px, config.planes()),
    ) as loader:
        batch = next(loader.batches(0))
    crops, views = config.crops, config.crops.views()
    seen = augment(
        batch.pixels_BCHW,
        sizes_px_B2=batch.sizes_px_B2,
        views=views,
        seed=config.seed,
        epoch=0,
        indices_B=batch.indices_B,
        mean=crops.mean,
        std=crops.std,
    )
    path = run_dir / PREVIEW_FILE
    png = augmentation_preview(
        seen,
        mean=crops.mean,
        std=crops.std,
        originals=batch.pixels_BCHW,
        names=["global 1", "global 2", *(f"local {n}" for n in range(1, crops.local_count + 1))],
        notes=list(_notes(batch, views, seed=config.seed, is_rgb=len(crops.mean) == 3)),
    )
    write_synced(path, png)
    return path


def _notes(batch: Batch, views: tuple[View, ...], *, seed: int, is_rgb: bool) -> Iterator[list[str]]:
    """For each view what it does to each image, in lines; draws are functions, so they can be asked again."""
    sizes: NDArray[np.int64] = batch.sizes_px_B2.numpy()
    for crop, view in enumerate(views):
        draws = draw(view, sizes, seed=seed, epoch=0, crop=crop, indices_B=batch.indices_B.numpy())
        yield [words_of(draws, row, sizes, is_rgb=is_rgb) for row in range(len(sizes))]


def words_of(draws: Draws, row: int, sizes_px_B2: NDArray[np.int64], *, is_rgb: bool = True) -> str:
    """What was drawn for an image, a change a line; the share of its area comes first."""
    share = draws.boxes_B4[row, 2] * draws.boxes_B4[row, 3] / sizes_px_B2[row].prod()
    words = [f"{share:.0%} of it"]
    words += ["flipped"] if draws.flip_B[row] else []
    words += ["jittered"] if is_rgb and draws.jitter_B[row] else []
    words += ["grey"] if is_rgb and draws.grey_B[row] else []
    words += [f"blur {draws.sigma_px_B[row]:.1f}"] if draws.sigma_px_B[row] else []
    words += ["solarised"] if draws.solarise_B[row] else []
    return "\n".join(words)
