"""Agreement is the cosine of unit rows; it sees lengths, keeps NaN, and looks at batches and single ones."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dino_core.parity import agreement, agreement_on_reference
from dino_core.preprocess import Preprocessing

PREPROCESSING = Preprocessing(resize_px=40, crop_px=32)


def test_of_rows_of_length_one_it_is_the_lowest_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    found, expected = (functional.normalize(torch.randn(5, 7, generator=generator), dim=1) for _ in range(2))
    assert agreement(found, expected) == pytest.approx((found * expected).sum(dim=1).min().item())


def test_rows_of_the_right_direction_and_a_wrong_length_disagree() -> None:
    expected = torch.tensor([[3.0, 4.0]])
    assert agreement(expected, expected) == 1
    assert agreement(2 * expected, expected) == pytest.approx(0.5)


def test_one_nan_among_good_rows_is_kept() -> None:
    expected = torch.eye(3)
    found = expected.clone()
    found[1, 1] = math.nan
    assert math.isnan(agreement(found, expected))


def test_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"embeddings are \[2, 3\], expected \[3, 3\]"):
        agreement(torch.eye(3)[:2], torch.eye(3))


def _means(pixels_BCHW: Tensor) -> Tensor:
    return functional.normalize(pixels_BCHW.float().mean(dim=(2, 3)), dim=1)


def test_software_that_is_right_only_in_batches_disagrees() -> None:
    pixels: list[Tensor] = []

    def remember(pixels_BCHW: Tensor) -> Tensor:
        pixels.append(pixels_BCHW)
        return _means(pixels_BCHW)

    agreement_on_reference(remember, torch.ones(8, 3), PREPROCESSING)
    expected_BD = _means(max(pixels, key=len))
    assert agreement_on_reference(_means, expected_BD, PREPROCESSING) == pytest.approx(1)

    def wrong_alone(pixels_BCHW: Tensor) -> Tensor:
        return _means(pixels_BCHW) if len(pixels_BCHW) > 1 else _means(pixels_BCHW).flip(1)

    assert agreement_on_reference(wrong_alone, expected_BD, PREPROCESSING) < 0.9999
