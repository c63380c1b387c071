"""The reference pictures: the same for ever, and rich enough to notice a change."""

import hashlib

import torch

from dino_core.preprocess import Preprocessing, resize_and_crop
from dino_core.reference import reference_pictures


def test_the_pictures_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for picture in reference_pictures():
        digest.update(picture.numpy().tobytes())
    # Written down once. Another value would make every bundle in the world fail to load: never change it.
    assert digest.hexdigest() == "f585ebe1656135b863f777a9e5c9f2649252576d0f043bcfa0e0363b3fef26ce"


def test_the_pictures_are_rgb_of_several_shapes() -> None:
    pictures = reference_pictures()
    assert len(pictures) == 8
    assert all(picture.dtype == torch.uint8 and picture.shape[0] == 3 for picture in pictures)
    assert len({picture.shape for picture in pictures}) == 4


def test_every_picture_uses_its_channels_differently_and_none_is_flat() -> None:
    for picture in reference_pictures():
        assert picture.float().std() > 20
        assert not torch.equal(picture[0], picture[1])
        assert not torch.equal(picture[0], picture[2])


def test_every_picture_differs_from_its_mirror_image() -> None:
    """Otherwise a flipped axis would go unnoticed."""
    for picture in reference_pictures():
        pixels = resize_and_crop(picture, Preprocessing())
        assert (pixels.float() - pixels.flip(2).float()).abs().mean() > 1
        assert (pixels.float() - pixels.flip(1).float()).abs().mean() > 1
