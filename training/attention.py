"""Where a ViT looks, and which patches it takes to be alike, as pictures for people."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dino_core.embedding import EmbeddingModel
from dino_core.errors import ImageError
from dino_core.preprocess import load_pixels
from training.components import patch_colours
from training.errors import DataError
from training.pictures import attention_picture, patch_picture

PATCHES = "patches.png"
_FEWEST_PATCHES = 4  # fewer have no three components


@torch.no_grad()
def attention_pictures(model: EmbeddingModel, images: Sequence[Path], out: Path) -> Iterator[Path]:
    """Draws the last block's attention of the class token over each image, and the patches of all.

    The patches' first three principal components are red, green and blue, over all images together: what has
    one colour in two pictures is alike to the network.

    Yields:
        The file of each drawing, as soon as it is written: one for each image, then one of all patches. Of
        images with the same name the second is NAME-2, and so on.

    Raises:
        BackboneError: The network has no attention.
        DataError: A picture cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    seen: list[Tensor] = []
    patches: list[Tensor] = []
    names: list[str] = []
    used: Counter[str] = Counter()
    height = width = 0
    for image in images:
        try:
            pixels_CHW = load_pixels(image.read_bytes(), model.preprocessing)
        except (ImageError, OSError) as error:
            raise DataError(f"{image} cannot be read: {error}") from error
        pixels_BCHW = pixels_CHW[None].to(device)
        features = model.features(pixels_BCHW)
        height, width = features.grid_hw
        attention_ATT = model.attention(pixels_BCHW)[0]
        # The first token asks (the class token, in networks that have one); the last ones are the patches.
        maps_AYX = attention_ATT[:, 0, -height * width :].reshape(-1, height, width)
        used[image.stem] += 1
        name = image.stem if used[image.stem] == 1 else f"{image.stem}-{used[image.stem]}"
        path = out / f"{name}.attention.png"
        path.write_bytes(attention_picture(pixels_CHW, maps_AYX))
        yield path
        seen.append(pixels_CHW)
        patches.append(features.patches_BND[0].float().cpu())
        names.append(name)
    if height * width >= _FEWEST_PATCHES:
        colours_BYX3 = patch_colours(torch.stack(patches)).reshape(len(seen), height, width, 3)
        path = out / PATCHES
        path.write_bytes(patch_picture(torch.stack(seen), colours_BYX3, names=names))
        yield path
