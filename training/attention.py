"""Where a ViT looks, as pictures for people."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from dino_core.embedding import EmbeddingModel
from dino_core.errors import ImageError
from dino_core.preprocess import load_pixels
from training.errors import DataError
from training.pictures import attention_picture


@torch.no_grad()
def attention_pictures(model: EmbeddingModel, images: Sequence[Path], out: Path) -> Iterator[Path]:
    """Draws the last block's attention of the class token over each image.

    Yields:
        The file of each drawing, as soon as it is written.

    Raises:
        BackboneError: The network has no attention.
        DataError: A picture cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    for image in images:
        try:
            pixels_CHW = load_pixels(image.read_bytes(), model.preprocessing)
        except (ImageError, OSError) as error:
            raise DataError(f"{image} cannot be read: {error}") from error
        maps_AYX = model.attention_maps(pixels_CHW[None].to(device))[0]
        path = out / f"{image.stem}.attention.png"
        path.write_bytes(attention_picture(pixels_CHW, maps_AYX))
        yield path
