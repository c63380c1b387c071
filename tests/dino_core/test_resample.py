"""Crop and resize by matrices against slicing and torch's or Pillow's resize."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dino_core.resample import crop_and_resize, resize_taps, separable
from tests.references.reference_augment import cropped_and_resized

CPU = torch.device("cpu")
BOXES = np.array(
    [[0, 0, 60, 80], [10, 20, 30, 33], [59, 79, 1, 1], [3, 0, 57, 7], [0, 5, 8, 64]], dtype=np.float64
)


def photographs(*, channels: int = 3, height: int = 60, width: int = 80) -> torch.Tensor:
    """Smooth waves with sharp noise on them."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.sin(torch.arange(width) / 9) * torch.cos(torch.arange(height)[:, None] / 7)
    noise = torch.rand(len(BOXES), channels, height, width, generator=generator)
    return ((waves * 0.3 + 0.4 + noise * 0.3) * 255).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("size_px", [16, 64, 224])
def test_a_crop_equals_slicing_and_torchs_antialiased_bicubic(size_px: int) -> None:
    images = photographs()
    ours = crop_and_resize(images, BOXES, size_px=size_px)
    for row, box in enumerate(BOXES.astype(int).tolist()):
        theirs = cropped_and_resized(images[row].float(), *box, size_px=size_px)
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=2e-3)  # grey levels; positions in float32


@pytest.mark.parametrize("size_px", [24, 96])
def test_a_crop_is_within_a_grey_level_of_pillows(size_px: int) -> None:
    images = photographs()
    ours = crop_and_resize(images, BOXES, size_px=size_px).clamp(0, 255)
    for row, (top, left, height, width) in enumerate(BOXES.astype(int).tolist()):
        picture = Image.fromarray(images[row].permute(1, 2, 0).numpy())
        box = picture.crop((left, top, left + width, top + height))
        theirs = np.asarray(box.resize((size_px, size_px), Image.Resampling.BICUBIC), dtype=np.float32)
        # Pillow rounds to whole levels after each axis, and the second one's lobes enlarge that.
        assert np.abs(ours[row].permute(1, 2, 0).numpy() - theirs).max() <= 1.2


def test_flipping_is_exact() -> None:
    flip = np.array([True, False, True, False, True])
    plain = crop_and_resize(photographs(), BOXES, size_px=32)
    flipped = crop_and_resize(photographs(), BOXES, size_px=32, flip_B=flip)
    for row, is_flipped in enumerate(flip):
        expected = plain[row].flip(-1) if is_flipped else plain[row]
        torch.testing.assert_close(flipped[row], expected, rtol=0, atol=1e-4)  # order of sums; of 255 levels


@pytest.mark.parametrize("size_px", [40, 150])  # narrower than a strip of the matrix, and several strips
def test_going_by_taps_equals_the_batched_product(size_px: int) -> None:
    images = photographs()
    matrices = []
    for start, extent, source_px in ((0, 2, 60), (1, 3, 80)):
        starts, extents = BOXES[:, start].copy(), BOXES[:, extent].copy()
        matrices.append(
            resize_taps(starts, extents, size_px=size_px, source_px=source_px, device=CPU).matrix(source_px)
        )
    batched = separable(images.float(), *matrices)
    torch.testing.assert_close(crop_and_resize(images, BOXES, size_px=size_px), batched, rtol=0, atol=1e-3)


def test_rows_of_a_resize_matrix_sum_to_one_and_read_nothing_outside_of_the_interval() -> None:
    starts, extents = np.array([0.0, 3.4, 17.9]), np.array([20.0, 9.1, 2.1])
    matrix = resize_taps(starts, extents, size_px=7, source_px=20, device=CPU).matrix(20)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(3, 7))
    touched = [matrix[row].any(dim=0).nonzero().squeeze(1) for row in range(3)]
    assert [(int(pixels.min()), int(pixels.max())) for pixels in touched] == [(0, 19), (3, 12), (17, 19)]


def test_a_canvas_that_was_squashed_gives_the_crop_of_the_original() -> None:
    """A smooth picture loses nothing on the canvas, so the proportions are all that could go wrong."""
    vertical, horizontal = torch.arange(120)[:, None], torch.arange(200)[None, :]
    original = (0.5 + 0.25 * torch.sin(vertical / 15) + 0.25 * torch.cos(horizontal / 20))[None, None]
    canvas = torch.nn.functional.interpolate(original, size=(128, 128), mode="bicubic", antialias=True)
    box: NDArray[np.float64] = np.array([[20.0, 90.0, 60.0, 80.0]])
    ours = crop_and_resize(canvas, box * np.array([128 / 120, 128 / 200] * 2), size_px=48)
    theirs = cropped_and_resized(original[0], 20, 90, 60, 80, size_px=48)
    assert (ours[0] - theirs).abs().max() < 0.01


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels_goes_through(channels: int) -> None:
    images = photographs(channels=channels)
    ours = crop_and_resize(images, BOXES, size_px=20)
    assert ours.shape == (len(BOXES), channels, 20, 20)
    alone = crop_and_resize(images[:, :1], BOXES, size_px=20)
    torch.testing.assert_close(ours[:, :1], alone, rtol=0, atol=1e-4)


def test_an_even_picture_stays_even() -> None:
    even = torch.full((5, 3, 60, 80), 200, dtype=torch.uint8)
    torch.testing.assert_close(
        crop_and_resize(even, BOXES, size_px=33), torch.full((5, 3, 33, 33), 200.0), rtol=1e-5, atol=0
    )
