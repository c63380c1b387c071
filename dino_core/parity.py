"""Whether other software computes a model's embeddings: compared on the reference pictures.

Dimension key: B images · C channels · H W pixels · D embedding
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dino_core.preprocess import Preprocessing, resize_and_crop
from dino_core.reference import reference_pictures

# Other software sums in another order, and fuses what torch keeps apart; a wrong weight, channel or mean is
# far below this, and so are embeddings computed in bfloat16 by networks that don't bear it.
MIN_AGREEMENT = 0.9999


def reference_pixels(preprocessing: Preprocessing) -> Tensor:
    """The reference pictures as a model takes them.

    Returns:
        uint8 [8, C, crop_px, crop_px].
    """
    return torch.stack(
        [resize_and_crop(picture, preprocessing) for picture in reference_pictures(preprocessing.channels)]
    )


def agreement(found_BD: Tensor, expected_BD: Tensor) -> float:
    """The lowest cosine of the pairs of rows; of rows without length 1, one that a wrong length lowers too.

        1 - |found - expected|² / (2 |expected|²)

    Args:
        found_BD: float32.
        expected_BD: float32; no row is zero.

    Returns:
        1 where they are equal; NaN where any number is.

    Raises:
        ValueError: They have different shapes.
    """
    if found_BD.shape != expected_BD.shape:
        raise ValueError(f"embeddings are {list(found_BD.shape)}, expected {list(expected_BD.shape)}")
    differences_B = (found_BD.double() - expected_BD.double()).square().sum(dim=1)
    return float((1 - differences_B / (2 * expected_BD.double().square().sum(dim=1))).min())


def agreement_on_reference(
    compute: Callable[[Tensor], Tensor], expected_BD: Tensor, preprocessing: Preprocessing
) -> float:
    """How well some software reproduces a model on the reference pictures, all at once and one by one.

    Args:
        compute: uint8 [B, C, H, W] to float32 [B, D], on the CPU.
        expected_BD: The model's own embeddings of the reference pictures.
        preprocessing: The model's.

    Returns:
        The lower agreement of the two ways: one by one shows software that has a batch size built in.

    Raises:
        ValueError: Rows come in another shape.
    """
    pixels_BCHW = reference_pixels(preprocessing)
    one_by_one_BD = torch.cat([compute(pixels_CHW[None]) for pixels_CHW in pixels_BCHW])
    # Not by min(), which loses a NaN.
    return agreement(torch.cat([compute(pixels_BCHW), one_by_one_BD]), torch.cat([expected_BD, expected_BD]))
