"""Images of other channels and depths: what is read, in which order, scaled how; and what is refused."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dino_core.errors import ImageError
from dino_core.planes import Planes, decode_planes, eight_bit_planes, is_raw, read_planes
from dino_core.preprocess import Preprocessing, load_pixels

HEIGHT, WIDTH = 10, 12


def ramp(channels: int, dtype: Any = np.uint16) -> NDArray[Any]:  # noqa: ANN401  any type of number
    return np.arange(HEIGHT * WIDTH * channels).reshape(HEIGHT, WIDTH, channels).astype(dtype)


def npy(values: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def saved(image: Image.Image, image_format: str, **more: Any) -> bytes:  # noqa: ANN401  Pillow's own
    file = io.BytesIO()
    image.save(file, image_format, **more)
    return file.getvalue()


def tiff(pages: list[NDArray[Any]]) -> bytes:
    images = [Image.fromarray(page) for page in pages]
    return saved(images[0], "TIFF", save_all=True, append_images=images[1:])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64, np.bool_])
def test_arrays_of_any_real_type_are_read_as_they_are(dtype: Any) -> None:  # noqa: ANN401
    values = ramp(5, dtype)
    assert np.array_equal(read_planes(npy(values), channels=5), values)


def test_arrays_with_channels_first_are_turned_where_only_that_fits() -> None:
    values = ramp(5)
    first = np.ascontiguousarray(np.moveaxis(values, 2, 0))
    assert np.array_equal(read_planes(npy(first), channels=5), values)
    assert np.array_equal(read_planes(npy(values[:, :, 0]), channels=1), values[:, :, :1])
    assert read_planes(npy(first)).shape == values.shape, "unknown: there are fewer channels than pixels"
    square = ramp(9)[:9, :9]
    assert np.array_equal(read_planes(npy(square), channels=9), square), "both fit: they are last"


def test_pages_of_a_tiff_are_channels() -> None:
    values = ramp(4)
    data = tiff([np.ascontiguousarray(values[:, :, channel]) for channel in range(4)])
    assert is_raw(data)
    found = read_planes(data)
    assert found.dtype == np.uint16
    assert np.array_equal(found, values)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4), ("P", 3), ("1", 1), ("I;16", 1)]
)
def test_pictures_have_their_own_channels(mode: str, channels: int) -> None:
    picture = (
        Image.fromarray(ramp(1)[:, :, 0] * 500)
        if mode == "I;16"
        else Image.fromarray(ramp(3, np.uint8)).convert(mode)
    )
    assert read_planes(saved(picture, "PNG")).shape == (HEIGHT, WIDTH, channels)


def test_sixteen_bits_of_grey_are_all_kept() -> None:
    values = ramp(1)[:, :, 0] * 500
    assert np.array_equal(read_planes(saved(Image.fromarray(values), "PNG"))[:, :, 0], values)


def test_a_value_becomes_its_share_of_the_range_and_is_clipped() -> None:
    planes = Planes(channels=2, low=(100.0, -1.0), high=(610.0, 1.0))
    values = np.array([[[0, -3.0], [100, -1.0], [102, 0.0], [610, np.nan], [900, 1.0]]] * 8, np.float32)
    pixels_CHW = decode_planes(npy(values.repeat(2, axis=1)), planes)
    assert pixels_CHW.dtype == torch.uint8
    assert pixels_CHW[0, 0, ::2].tolist() == [0, 0, 1, 255, 255]
    assert pixels_CHW[1, 0, ::2].tolist() == [0, 0, 128, 0, 255]


def test_eight_bits_are_left_alone() -> None:
    values = ramp(4, np.uint8)
    pixels_CHW = decode_planes(npy(values), eight_bit_planes(4))
    assert np.array_equal(pixels_CHW.permute(1, 2, 0).numpy(), values)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"words and words", r"no \.npy, no TIFF", id="no image"),
        pytest.param(npy(ramp(5))[:300], r"begins as \.npy and ends too early", id="cut array"),
        pytest.param(npy(ramp(5))[:60], r"begins as \.npy and is damaged", id="cut header"),
        pytest.param(npy(np.zeros((9, 9), np.complex64)), "numbers of height, width", id="complex"),
        pytest.param(npy(np.zeros((2, 9, 9, 2))), "numbers of height, width", id="four axes"),
        pytest.param(npy(ramp(4)), "has 4 channels, 5 are expected", id="channels"),
        pytest.param(npy(np.zeros((7, 40, 5))), "shorter side has 7 px", id="small"),
        pytest.param(tiff([ramp(1)[:, :, 0]])[:150], "begins as TIFF", id="cut TIFF"),
        pytest.param(
            tiff([ramp(1)[:, :, 0], np.ascontiguousarray(ramp(1)[:9, :, 0])]), "different sizes", id="pages"
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_our_words(data: bytes, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        decode_planes(data, eight_bit_planes(5))


def test_a_huge_array_is_refused_by_its_header() -> None:
    header = npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(99999, 99999)")[:128]
    with pytest.raises(ImageError, match="pixels, at most"):
        read_planes(header)


def test_memory_is_not_taken_for_what_the_file_does_not_hold() -> None:
    header = npy(np.zeros((9, 9, 1), np.uint8)).replace(b"(9, 9, 1), } ", b"(999, 999, 9999999), } ")
    with pytest.raises(ImageError, match="ends too early"):
        read_planes(header)


def test_pickled_arrays_are_never_loaded() -> None:
    with pytest.raises(ImageError, match="numbers of height, width"):
        read_planes(npy(np.full((9, 9), None, object)))


def test_preprocessing_with_planes_goes_to_json_and_back_and_rgb_says_nothing_of_them() -> None:
    planes = Planes(channels=2, low=(0.0, 1.0), high=(9.0, 10.0))
    ours = Preprocessing(resize_px=9, crop_px=8, mean=(0.1, 0.2), std=(0.3, 0.4), planes=planes)
    assert Preprocessing.from_json(ours.to_json()) == ours
    assert load_pixels(npy(ramp(2)), ours).shape == (2, 8, 8)
    assert "planes" not in Preprocessing().to_json()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"channels": 2, "low": [0.0], "high": [1.0, 2.0]}, "2 numbers each"),
        ({"channels": 1, "low": [1.0], "high": [1.0]}, "must be below high"),
        ({"channels": 1, "low": [1.0]}, "expected channels, low and high"),
        ({"channels": 1, "low": 0, "high": [1.0]}, "planes is"),
    ],
)
def test_planes_that_make_no_sense_are_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Planes.from_json(values)
