import numpy as np
from numpy.typing import NDArray

from dino_core.heatmap import heat, heat_over


def brightness(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    summed: NDArray[np.int64] = pixels.astype(np.int64).sum(axis=-1)
    return summed


def test_the_most_is_light_and_the_least_is_dark_at_their_places() -> None:
    drawn = heat(np.array([[0.0, 1.0], [2.0, 9.0]]), size_hw=(20, 40))
    assert drawn.shape == (20, 40, 3)
    assert drawn.dtype == np.uint8
    assert drawn[0, 0].tolist() == [0, 0, 4]
    assert drawn[-1, -1].tolist() == [252, 255, 164]
    assert brightness(drawn)[0, 0] < brightness(drawn)[-1, 0] < brightness(drawn)[-1, -1]


def test_only_the_shape_of_a_map_counts_not_its_scale() -> None:
    map_YX = np.random.default_rng(0).random((3, 5))
    np.testing.assert_array_equal(heat(map_YX, size_hw=(9, 9)), heat(map_YX * 1e-3 + 7, size_hw=(9, 9)))


def test_a_map_that_is_the_same_everywhere_is_dark() -> None:
    assert (heat(np.full((2, 2), 0.25), size_hw=(4, 4)) == (0, 0, 4)).all()


def test_the_picture_is_seen_through_the_map() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    drawn = brightness(heat_over(pixels, np.zeros((2, 2))))
    assert (drawn[:, 4:] - drawn[:, :4] > 200).all()  # of 3 · 255 · 0.3
    assert (
        heat_over(pixels, np.array([[0.0, 1.0]]))[:, -1] > heat_over(pixels, np.zeros((1, 2)))[:, -1]
    ).all()
