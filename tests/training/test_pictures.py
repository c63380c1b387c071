"""Pictures: sizes, what is drawn where, colours that mean something; how they look is for eyes."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training.pictures import Panel, attention_picture, augmentation_preview, curves, neighbour_grid

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def opened(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def even(red: int, green: int, blue: int, *, height: int = 40, width: int = 40) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8)[:, None, None].expand(3, height, width)


def share_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(pixels - np.array(colour)).max(axis=-1) <= 2).mean())


GREEN_BAR, RED_BAR = (26, 127, 55), (207, 34, 46)


def test_a_grid_shows_each_query_left_of_its_neighbours() -> None:
    png = neighbour_grid([even(250, 0, 0), even(0, 0, 250)], [[even(200, 0, 0)] * 3, [even(0, 0, 200)] * 3])
    pixels = opened(png)
    upper, lower = np.array_split(pixels, 2)
    for half, query, neighbour in ((upper, (250, 0, 0), (200, 0, 0)), (lower, (0, 0, 250), (0, 0, 200))):
        columns_of_query = np.flatnonzero((np.abs(half - np.array(query)).max(axis=-1) <= 2).any(axis=0))
        columns_of_neighbours = np.flatnonzero(
            (np.abs(half - np.array(neighbour)).max(axis=-1) <= 2).any(axis=0)
        )
        assert columns_of_query.max() < columns_of_neighbours.min()
        assert len(columns_of_query) == 160
        assert len(columns_of_neighbours) == 3 * 160


def test_bars_tell_right_from_wrong() -> None:
    def grid(labels: list[str]) -> np.ndarray:
        return opened(
            neighbour_grid(
                [even(9, 9, 9)], [[even(9, 9, 9)] * 2], query_labels=["cat"], neighbour_labels=[labels]
            )
        )

    assert share_of(grid(["cat", "cat"]), RED_BAR) == 0
    assert share_of(grid(["dog", "dog"]), GREEN_BAR) == 0
    assert share_of(grid(["cat", "dog"]), GREEN_BAR) > 0.001
    assert share_of(grid(["cat", "dog"]), RED_BAR) > 0.001


def test_scores_and_labels_are_written() -> None:
    images = ([even(9, 9, 9)], [[even(9, 9, 9)] * 2])
    one = neighbour_grid(*images, scores=[[0.9, 0.8]])
    other = neighbour_grid(*images, scores=[[0.9, 0.7]])
    assert one != other
    assert neighbour_grid(*images, query_labels=["cat"]) != neighbour_grid(*images, query_labels=["dog"])


def test_a_long_name_is_cut_to_its_column() -> None:
    images = ([even(9, 9, 9)], [[even(9, 9, 9)]])
    short = opened(neighbour_grid(*images, query_labels=["a"]))
    long = opened(neighbour_grid(*images, query_labels=["a name that goes on and on and on " * 9]))
    assert short.shape == long.shape
    np.testing.assert_array_equal(short[:, 200:], long[:, 200:])


@pytest.mark.parametrize("size", [(20, 200), (200, 20), (1, 1), (40, 40)])
def test_pictures_of_any_shape_are_shown_whole(size: tuple[int, int]) -> None:
    height, width = size
    shown = opened(neighbour_grid([even(10, 200, 10, height=height, width=width)], [[even(9, 9, 9)]]))
    rows, columns = np.nonzero(np.abs(shown - np.array([10, 200, 10])).max(axis=-1) <= 2)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 160
    assert (np.ptp(rows) + 1) / (np.ptp(columns) + 1) == pytest.approx(height / width, rel=0.01)


def test_lists_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 queries need 2 lists"):
        neighbour_grid([even(9, 9, 9)] * 2, [[even(9, 9, 9)]])
    with pytest.raises(ValueError, match="all of one length"):
        neighbour_grid([even(9, 9, 9)] * 2, [[even(9, 9, 9)], []])


def test_a_preview_undoes_the_normalisation() -> None:
    colour = (torch.tensor([200, 100, 50.0]) / 255)[:, None, None]
    normalised = (colour - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    views = [normalised.expand(2, 3, 32, 32), normalised.expand(2, 3, 16, 16)]
    shown = opened(augmentation_preview(views, mean=MEAN, std=STD))
    assert share_of(shown, (200, 100, 50)) > 0.5


def test_a_preview_has_the_image_first_and_no_more_rows_than_asked_for() -> None:
    views = [torch.zeros(9, 3, 32, 32), torch.zeros(9, 3, 16, 16)]
    originals = torch.full((9, 3, 8, 8), 77, dtype=torch.uint8)
    shown = opened(augmentation_preview(views, mean=MEAN, std=STD, originals=originals, most_images=2))
    rows, columns = np.nonzero(np.abs(shown - 77).max(axis=-1) == 0)
    assert columns.max() < shown.shape[1] / 2
    assert len(np.unique(rows)) == 2 * 144


def test_images_of_other_channel_counts_are_shown_in_grey() -> None:
    shown = opened(augmentation_preview([torch.zeros(1, 2, 8, 8)], mean=(0.5, 0.1), std=(1.0, 1.0)))
    assert share_of(shown, (128, 128, 128)) > 0.5


def test_attention_is_bright_where_the_map_is_high() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[:, :, :2] = 1.0  # the left half
    shown = opened(attention_picture(even(90, 90, 90, height=64, width=64), maps, cell_px=64, columns=2))
    tile_px = 64 + 6
    head = shown[64 + 20 : 64 + 60, 6:tile_px]
    assert shown[6:70, 6:70].reshape(-1, 3).std(axis=0).max() == 0  # the image itself, untouched
    mean_of_heads = shown[6:70, tile_px + 6 : tile_px + 70].sum(axis=-1)
    assert mean_of_heads[:, :16].mean() > 3 * mean_of_heads[:, -16:].mean()
    assert head.size


def test_a_map_without_contrast_is_no_error() -> None:
    opened(attention_picture(even(90, 90, 90), torch.ones(1, 3, 3)))


def test_curves_leave_out_what_was_not_measured() -> None:
    rows: list[dict[str, object]] = [
        {"step": 0, "loss": 3.0, "knn": 10.0},
        {"step": 1, "loss": math.nan},
        {"step": 2, "loss": 2.0, "event": "checkpoint"},
        {"step": 3, "loss": None, "knn": 20.0},
    ]
    panels = [
        Panel("Loss", {"loss": "loss"}, ("ln K", 3.5)),
        Panel("k-NN", {"top-1": "knn"}),
        Panel("no", {"x": "x"}),
    ]
    shown = opened(curves(rows, panels, events={2: "last layer thaws"}))
    assert shown.shape == (860, 1240, 3)
    blue = np.abs(shown - np.array([9, 105, 218])).max(axis=-1) <= 2
    assert blue[:430, :620].any()
    assert blue[:430, 620:].any()
    assert not blue[430:].any()


def test_a_single_diagram_takes_one_column() -> None:
    shown = opened(curves([{"step": 0, "loss": 1.0}], [Panel("Loss", {"loss": "loss"})]))
    assert shown.shape == (430, 620, 3)
