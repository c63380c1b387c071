"""config.json: the sizes that timm reads from it are ours."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_core.preprocess import Preprocessing
from dino_core.timm_config import _crop_share


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 2000), st.integers(0, 2000))
def test_timm_finds_the_resize_from_the_share_of_the_crop(crop_px: int, more_px: int) -> None:
    preprocessing = Preprocessing(resize_px=crop_px + more_px, crop_px=crop_px)
    assert math.floor(crop_px / _crop_share(preprocessing)) == preprocessing.resize_px


def test_a_common_share_is_the_common_number() -> None:
    assert _crop_share(Preprocessing()) == pytest.approx(0.875)
