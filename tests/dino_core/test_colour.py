"""Each colour operation against torchvision's on floats; the blur against a literal convolution."""

import itertools

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageOps

from dino_core.colour import (
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    blurred,
    gaussian_taps,
    grey,
    hue_shifted,
    jitter_,
    solarised,
)
from tests.references.reference_augment import gaussian_blurred


def colours(count: int = 6, size: int = 17) -> torch.Tensor:
    """Random colours, and among them black, white, greys and colours with two equal channels."""
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=3)))
    images[:, :, 0, :] = corners[:size].T
    images[:, :, 1, :10] = corners[-10:].T
    return images


def alone(operation: int) -> torch.Tensor:
    """An order in which the operation comes first; the factors of the others are 1."""
    rest = [other for other in (BRIGHTNESS, CONTRAST, SATURATION) if other != operation]
    return torch.tensor([[operation, *rest]] * 6)


@pytest.mark.parametrize(
    ("operation", "theirs"),
    [
        pytest.param(BRIGHTNESS, tv.adjust_brightness, id="brightness"),
        pytest.param(CONTRAST, tv.adjust_contrast, id="contrast"),
        pytest.param(SATURATION, tv.adjust_saturation, id="saturation"),
    ],
)
def test_an_adjustment_equals_torchvisions(operation: int, theirs: object) -> None:
    assert callable(theirs)
    amounts = torch.tensor([0.0, 0.6, 0.9, 1.1, 1.4, 2.5])
    factors = torch.ones(6, 3)
    factors[:, operation] = amounts
    no_hue = torch.zeros(6)
    ours = jitter_(
        colours(), factors_B3=factors, order_B3=alone(operation), hue_B=no_hue, hue_slot_B=no_hue.long()
    )
    for row, amount in enumerate(amounts.tolist()):
        torch.testing.assert_close(ours[row], theirs(colours()[row], amount), rtol=0, atol=1e-6)


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.03, 0.0, 0.07, 0.1, 0.5])
def test_a_hue_shift_equals_torchvisions(turns: float) -> None:
    ours = hue_shifted(colours(), torch.full((6,), turns))
    torch.testing.assert_close(ours, tv.adjust_hue(colours(), turns), rtol=0, atol=2e-6)


def test_each_image_has_its_own_order_and_strengths() -> None:
    orders = torch.tensor(list(itertools.permutations(range(3))))
    generator = torch.Generator().manual_seed(3)
    factors = torch.rand(6, 3, generator=generator) + 0.5
    hue, hue_slot = torch.rand(6, generator=generator) - 0.5, torch.tensor([0, 1, 2, 3, 0, 2])
    ours = jitter_(colours(), factors_B3=factors, order_B3=orders, hue_B=hue, hue_slot_B=hue_slot)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for row in range(6):
        expected = colours()[row]
        for slot in range(4):
            if hue_slot[row] == slot:
                expected = tv.adjust_hue(expected, float(hue[row]))
            if slot < 3:
                operation = int(orders[row, slot])
                expected = adjust[operation](expected, float(factors[row, operation]))
        torch.testing.assert_close(ours[row], expected, rtol=0, atol=1e-5)


def test_factors_of_one_and_no_hue_change_no_bit() -> None:
    images = jitter_(
        colours(),
        factors_B3=torch.ones(6, 3),
        order_B3=alone(CONTRAST),
        hue_B=torch.zeros(6),
        hue_slot_B=torch.arange(6) % 4,
    )
    assert torch.equal(images, colours())


def test_grey_weighs_the_channels_as_torchvision_does() -> None:
    torch.testing.assert_close(grey(colours()), tv.rgb_to_grayscale(colours()), rtol=0, atol=1e-6)
    primaries = torch.eye(3)[:, :, None, None]
    torch.testing.assert_close(grey(primaries).flatten(), torch.tensor([0.2989, 0.587, 0.114]))


@pytest.mark.parametrize("sigma_px", [0.1, 0.4, 1.0, 1.7, 2.0])
@pytest.mark.parametrize(("height", "width"), [(17, 17), (5, 40)])
def test_a_blur_equals_the_convolution_with_a_gaussian(sigma_px: float, height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    ours = blurred(images, torch.tensor([sigma_px, 0.7]))
    # Ours stops at 4 sigma, where 6e-5 of the kernel is left.
    torch.testing.assert_close(ours[0], gaussian_blurred(images[0], sigma_px=sigma_px), rtol=0, atol=2e-4)
    torch.testing.assert_close(ours[1], gaussian_blurred(images[1], sigma_px=0.7), rtol=0, atol=2e-4)


def test_a_blur_spreads_a_point_by_its_sigma() -> None:
    point = torch.zeros(1, 1, 41, 41)
    point[0, 0, 20, 20] = 1
    spread = blurred(point, torch.tensor([2.0]))[0, 0]
    variance = (spread.sum(dim=0) * (torch.arange(41) - 20) ** 2).sum()
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float(variance) == pytest.approx(4, rel=0.01)


def test_blurring_depends_on_no_other_image_of_the_batch() -> None:
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(4))
    together = blurred(images, torch.tensor([0.3, 2.0, 1.0]))
    torch.testing.assert_close(together[:1], blurred(images[:1], torch.tensor([0.3])), rtol=0, atol=1e-6)


def test_rows_of_a_blur_matrix_sum_to_one_at_the_borders_too() -> None:
    matrix = gaussian_taps(torch.tensor([0.1, 2.0]), size_px=3, device=torch.device("cpu")).matrix(3)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(2, 3))


def test_solarising_equals_pillows_at_every_grey_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    theirs = ImageOps.solarize(Image.fromarray(levels.numpy()[None]), threshold=128).tobytes()
    ours = solarised(levels.float() / 255).mul(255).round().byte()
    assert bytes(ours.tolist()) == theirs
