"""What the learner's crops are: the paper's, in proportion to the size of the image.

Dimension key: B images · C channels · H W pixels
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dino_core.augment import View

# The paper's sizes; other image sizes keep the proportions.
PAPER_GLOBAL_PX = 224
PAPER_LOCAL_PX = 96
PAPER_BLUR_SIGMA_PX = 2.0


def default_local_px(image_size_px: int) -> int:
    """Side of a local crop: 96 for 224, and that proportion, in whole patches, for other sizes.

    Args:
        image_size_px: Side of a global crop.

    Returns:
        A multiple of the largest power of two up to 32 that divides `image_size_px` four times or more.
    """
    patch_px = 32
    while patch_px > 1 and (image_size_px % patch_px or image_size_px < 4 * patch_px):
        patch_px //= 2
    return max(1, round(image_size_px * PAPER_LOCAL_PX / PAPER_GLOBAL_PX / patch_px)) * patch_px


def learner_views(official: Sequence[View], *, augmented: bool) -> tuple[View, ...]:
    """Fits the official views to the learner.

    Args:
        official: The paper's views; the first is a global one.
        augmented: False leaves nothing but the crops, for an augmentation of the user's own.

    Returns:
        Views whose blur, which the paper gives for 224 pixels, is in proportion to the image.
    """
    if not augmented:
        return tuple(
            View(
                size_px=view.size_px,
                area=view.area,
                flip_probability=0,
                jitter_probability=0,
                grey_probability=0,
                blur_probability=0,
            )
            for view in official
        )
    sigma_px = PAPER_BLUR_SIGMA_PX * official[0].size_px / PAPER_GLOBAL_PX
    return tuple(dataclasses.replace(view, blur_sigma_px=(min(0.1, sigma_px), sigma_px)) for view in official)


def by_turns(functions: Sequence[Callable[[Tensor], Tensor]], crops: Sequence[Tensor]) -> list[Tensor]:
    """Augments crops by functions that take turns.

    Args:
        functions: Each maps [1,C,H,W] to the same shape. They are called once for each image and crop, as
            torchvision's transforms draw once for all that they are given.
        crops: One [B,C,H,W] for each crop.

    Returns:
        The crops, augmented.
    """
    return [
        torch.cat([functions[place % len(functions)](image_CHW[None]) for image_CHW in crop_BCHW])
        for place, crop_BCHW in enumerate(crops)
    ]
