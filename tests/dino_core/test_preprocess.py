"""From a decoded picture to the model's input: sizes, crop, normalisation; the whole way on photographs."""

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from dino_core.preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    decode,
    load_pixels,
    normalise,
    resize_and_crop,
)

SHARED = Path(os.environ.get("DINO_SHARED", Path(__file__).parents[2].parent / "shared"))
SMALL = Preprocessing(resize_px=64, crop_px=56)


def photographs() -> list[Path]:
    found = (
        sorted((SHARED / "data" / "copies").rglob("*.jpg"))[::40]
        + sorted((SHARED / "data" / "imagenette" / "val").rglob("*.JPEG"))[::200]
    )
    if not found:
        pytest.skip("needs photographs in ../shared/data (or under DINO_SHARED)")
    return found


def encoded(pixels_HWC: np.ndarray, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC).save(stream, image_format, **options)
    return stream.getvalue()


def smooth_picture(height_px: int, width_px: int) -> np.ndarray:
    y, x = np.mgrid[:height_px, :width_px]
    channels = (127 + 120 * np.sin(x / 40), 127 + 120 * np.cos(y / 30), 127 + 120 * np.sin((x + y) / 50))
    return np.stack(channels, axis=2).astype(np.uint8)


def with_pillow(data: bytes, preprocessing: Preprocessing) -> Tensor:
    """Decode, transpose, resize and crop as torchvision's transforms on Pillow images do."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    scale = preprocessing.resize_px / min(picture.size)
    size = (int(picture.width * scale + 1e-9), int(picture.height * scale + 1e-9))
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - preprocessing.crop_px) / 2) for side in size)
    box = (left, top, left + preprocessing.crop_px, top + preprocessing.crop_px)
    return torch.from_numpy(np.array(resized.crop(box))).permute(2, 0, 1)


def grey_levels_apart(first: Tensor, second: Tensor) -> float:
    return (first.float() - second.float()).abs().mean().item()


@pytest.mark.parametrize("preprocessing", [Preprocessing(), SMALL], ids=["224 px", "56 px, JPEG scaled"])
def test_photographs_are_within_one_grey_level_of_pillows_decode_and_resize(
    preprocessing: Preprocessing,
) -> None:
    for photograph in photographs():
        data = photograph.read_bytes()
        ours = load_pixels(data, preprocessing)
        assert ours.shape == (3, preprocessing.crop_px, preprocessing.crop_px)
        assert grey_levels_apart(ours, with_pillow(data, preprocessing)) < 1


def test_a_large_jpeg_is_decoded_at_an_eighth_and_still_looks_the_same() -> None:
    data = encoded(smooth_picture(1104, 1400), "JPEG", quality=92)
    assert decode(data, shorter_side_px=2 * SMALL.resize_px).shape == (3, 138, 175)
    assert grey_levels_apart(load_pixels(data, SMALL), with_pillow(data, SMALL)) < 1


def test_the_whole_is_the_sum_of_its_parts() -> None:
    data = encoded(smooth_picture(300, 400), "PNG")
    assert torch.equal(load_pixels(data, Preprocessing()), resize_and_crop(decode(data), Preprocessing()))


def test_a_jpeg_and_a_png_of_the_same_pixels_give_the_same_input() -> None:
    jpeg = encoded(smooth_picture(300, 400), "JPEG", quality=90)
    png = encoded(decode(jpeg).permute(1, 2, 0).numpy(), "PNG")
    assert torch.equal(load_pixels(jpeg, Preprocessing()), load_pixels(png, Preprocessing()))


@settings(max_examples=60, deadline=None)
@given(height_px=st.integers(8, 300), width_px=st.integers(8, 300))
def test_any_shape_becomes_the_square(height_px: int, width_px: int) -> None:
    grey = torch.full((3, height_px, width_px), 77, dtype=torch.uint8)
    out = resize_and_crop(grey, SMALL)
    assert out.shape == (3, 56, 56)
    assert out.dtype == torch.uint8
    assert (out == 77).all()  # neither the filter nor an edge changes a plain picture


@pytest.mark.parametrize("size_hw", [(375, 500), (500, 375), (60, 61)])
def test_a_resize_keeps_pixels_together_and_gives_the_numbers_of_planes(size_hw: tuple[int, int]) -> None:
    """torch took a picture with a new first axis for planes: a slow resize, and a slow copy after it."""
    data = encoded(smooth_picture(*size_hw), "JPEG")
    pixels_CHW = load_pixels(data, Preprocessing())
    assert pixels_CHW.stride()[0] == 1
    assert pixels_CHW.stride()[2] == 3
    planes_CHW = decode(data, shorter_side_px=512).contiguous()
    assert planes_CHW.stride()[2] == 1
    assert torch.equal(pixels_CHW, resize_and_crop(planes_CHW, Preprocessing()))


def test_a_picture_of_the_right_size_is_only_cropped() -> None:
    picture = torch.randint(
        0, 256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(resize_and_crop(picture, SMALL), picture[:, 4:60, 12:68])


def test_the_memory_order_of_the_picture_does_not_change_its_pixels() -> None:
    picture = torch.from_numpy(smooth_picture(100, 150)).permute(2, 0, 1)
    ours, planar = resize_and_crop(picture, SMALL), resize_and_crop(picture.contiguous(), SMALL)
    assert grey_levels_apart(ours, planar) < 0.01


def test_resizing_filters_what_it_shrinks() -> None:
    stripes = torch.zeros(3, 512, 512, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    out = resize_and_crop(stripes, SMALL).float()
    assert (out[:, 4:-4, 4:-4] - 127.5).abs().max() < 3  # without the filter: all black or all white


def test_normalise_is_the_formula_in_float32() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).reshape(1, 3, 16, 16)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )
    expected = (pixels.double() / 255 - mean) / std
    found = normalise(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=1e-6
    )  # values reach 2.6: a few float32 steps


def test_normalise_keeps_the_memory_order() -> None:
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).to(memory_format=torch.channels_last)
    assert normalise(pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD).is_contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_normalise_gives_the_same_numbers_in_any_memory_order(images: int, channels: int) -> None:
    pixels = torch.randint(0, 256, (images, channels, 7, 9), dtype=torch.uint8)
    told = {"mean": [0.1 * (1 + each) for each in range(channels)], "std": [0.2] * channels}
    planes = normalise(pixels, **told)
    for order in (torch.contiguous_format, torch.channels_last):
        assert torch.equal(normalise(pixels.contiguous(memory_format=order), **told), planes)
    window = torch.zeros(images, channels, 20, 20, dtype=torch.uint8)[:, :, 3:10, 5:14]  # of a larger picture
    assert torch.equal(normalise(window.copy_(pixels), **told), planes)


def test_preprocessing_survives_json() -> None:
    ours = Preprocessing(resize_px=96, crop_px=80, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert Preprocessing.from_json(ours.to_json()) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"interpolation": "nearest"}, "interpolation is 'nearest'", id="another interpolation"),
        pytest.param({"antialias": False}, "antialias is False", id="no antialias"),
        pytest.param({"crop_px": 300}, "crop_px is 300", id="crop larger than the picture"),
        pytest.param({"crop_px": 0}, "crop_px is 0", id="empty crop"),
        pytest.param({"mean": [0.5]}, "3 numbers", id="one mean"),
        pytest.param({"mean": [0.5, 0.5, float("nan")]}, "finite", id="mean not a number"),
        pytest.param({"std": [0.5, 0.5, 0.0]}, "above 0", id="no spread"),
        pytest.param({"std": "abc"}, "list of numbers", id="std is text"),
        pytest.param({"crop_px": "224"}, "wrong type", id="size is text"),
        pytest.param({"gamma": 2.2}, "gamma", id="unknown field"),
    ],
)
def test_a_foreign_preprocessing_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_json({**Preprocessing().to_json(), **changes})


def test_a_preprocessing_that_contradicts_itself_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="crop_px is 224, expected 1 to resize_px"):
        replace(Preprocessing(), resize_px=200)
