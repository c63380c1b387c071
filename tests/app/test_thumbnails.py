import io

import pytest
from PIL import Image

from app.thumbnails import THUMBNAIL_PX, make_thumbnail
from dino_core.errors import ImageError
from dino_core.preprocess import ImageLimits


def encoded(picture: Image.Image, image_format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format)
    return file.getvalue()


@pytest.mark.parametrize(
    ("size_px", "expected_px"),
    [
        pytest.param((1600, 800), (THUMBNAIL_PX, THUMBNAIL_PX // 2), id="wide"),
        pytest.param((400, 1600), (THUMBNAIL_PX // 4, THUMBNAIL_PX), id="tall"),
        pytest.param((100, 60), (100, 60), id="small ones keep their size"),
    ],
)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_the_longer_side_is_bounded_and_the_shape_kept(
    size_px: tuple[int, int], expected_px: tuple[int, int], image_format: str
) -> None:
    data = make_thumbnail(encoded(Image.new("RGB", size_px, (10, 200, 30)), image_format))
    thumbnail = Image.open(io.BytesIO(data))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", expected_px)
    red, green, blue = thumbnail.convert("RGB").getpixel((20, 20))  # type: ignore[misc]
    assert abs(red - 10) < 12
    assert abs(green - 200) < 12
    assert abs(blue - 30) < 12


def test_transparent_parts_are_white() -> None:
    data = make_thumbnail(encoded(Image.new("RGBA", (64, 64), (255, 0, 0, 0)), "PNG"))
    assert min(Image.open(io.BytesIO(data)).convert("RGB").getpixel((32, 32))) > 245  # type: ignore[arg-type]


def test_what_is_no_picture_or_above_the_limit_is_refused() -> None:
    with pytest.raises(ImageError, match="format"):
        make_thumbnail(b"text")
    with pytest.raises(ImageError) as refused:
        make_thumbnail(encoded(Image.new("RGB", (64, 64)), "PNG"), limits=ImageLimits(max_pixels=100))
    assert refused.value.code == "image_too_large"
