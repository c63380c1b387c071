import pytest

from app.inference import headers
from app.inference.config import InferenceConfig
from app.inference.headers import header_of
from app.inference.results import ImageFailure
from dino_core.preprocess import ImageHeader, ImageLimits
from tests.app.inference.colours import picture

CONFIG = InferenceConfig(limits=ImageLimits(max_pixels=1000))


def test_a_header_has_format_and_size() -> None:
    assert header_of(picture((1, 2, 3), size_px=(20, 30)), CONFIG) == ImageHeader("PNG", 20, 30)


def test_too_many_pixels_are_refused_by_the_header_before_they_cost_anything() -> None:
    failure = header_of(picture((1, 2, 3), size_px=(40, 30)), CONFIG)
    assert isinstance(failure, ImageFailure)
    assert (failure.code, failure.limit, failure.actual) == ("image_too_large", 1000, 1200)


def test_a_parser_that_breaks_costs_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes, *, limits: ImageLimits) -> ImageHeader:
        raise IndexError("a parser's own words")

    monkeypatch.setattr(headers, "read_header", broken)
    failure = header_of(b"anything", CONFIG)
    assert isinstance(failure, ImageFailure)
    assert failure.code == "undecodable_image"
    assert "own words" not in failure.title


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_images_per_request": 9, "max_images_in_flight": 8}, "could never enter"),
        ({"max_pixels_in_flight": 999}, "could never enter"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(bounds: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**bounds)  # type: ignore[arg-type]
