"""What is known of images without decoding them."""

from pathlib import Path

import pytest
from PIL import Image

from training.data.folder import find_images
from training.data.images import median_side_px


@pytest.mark.parametrize(("count", "median_px"), [(1, 50), (3, 51), (100, 52)])
def test_the_median_side_is_the_shorter_one_and_passes_over_what_is_broken(
    count: int, median_px: int, tmp_path: Path
) -> None:
    for number in range(count):
        Image.new("RGB", (50 + number % 5, 90)).save(tmp_path / f"{number:03}.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert median_side_px(find_images(tmp_path)) == median_px


def test_nothing_is_known_where_nothing_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    assert median_side_px(find_images(tmp_path)) is None
