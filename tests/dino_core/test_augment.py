"""Every probability and range, boxes against torchvision's, pixels against a literal version."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchvision.transforms.v2 import RandomResizedCrop

from dino_core.augment import Draws, View, augment, dino_views, draw
from tests.references.reference_augment import augmented

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = View(
    size_px=24,
    area=(0.3, 1.0),
    jitter_probability=0,
    grey_probability=0,
    flip_probability=0,
    blur_probability=0,
)
MANY = 20_000


def drawn(view: View, count: int = MANY, *, size_px: tuple[int, int] = (375, 500), **place: int) -> Draws:
    place = {"seed": 0, "epoch": 0, "crop": 0} | place
    return draw(view, np.tile(size_px, (count, 1)), indices_B=np.arange(count), **place)


def correlation(pair: NDArray[np.float64]) -> float:
    centred = pair - pair.mean(axis=1, keepdims=True)
    return float((centred[0] * centred[1]).mean() / (pair[0].std() * pair[1].std()))


def happened(draws: Draws, name: str) -> NDArray[np.bool_]:
    return draws.sigma_px_B > 0 if name == "blur" else np.asarray(getattr(draws, f"{name}_B"))


def run(pixels: torch.Tensor, views: list[View], **changes: object) -> list[torch.Tensor]:
    arguments: dict[str, object] = {
        "sizes_px_B2": None,
        "views": views,
        "seed": 5,
        "epoch": 2,
        "indices_B": torch.arange(len(pixels)) * 3,
        "mean": MEAN,
        "std": STD,
    }
    return augment(pixels, **(arguments | changes))  # type: ignore[arg-type]


def photographs(count: int = 12, height: int = 40, width: int = 56, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 5, 7, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    noise = torch.rand(count, channels, height, width, generator=generator)
    return ((0.8 * smooth + 0.2 * noise) * 255).to(torch.uint8)


# What happens how often. The official probabilities, written out once more: a famous repository had 1 - p.
OFFICIAL = {
    "first global": {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 1.0, "solarise": 0.0},
    "second global": {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarise": 0.2},
    "local": {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5, "solarise": 0.0},
}


@pytest.mark.parametrize("change", ["flip", "jitter", "grey", "blur", "solarise"])
@pytest.mark.parametrize(
    ("crop", "which"), [(0, "first global"), (1, "second global"), (2, "local"), (9, "local")]
)
def test_each_change_happens_as_often_as_in_the_paper(crop: int, which: str, change: str) -> None:
    share = happened(drawn(dino_views()[crop], crop=crop), change).mean()
    probability = OFFICIAL[which][change]
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / MANY)


@pytest.mark.parametrize(("crop", "probability"), [(0, 1.0), (1, 0.1), (2, 0.5)])
def test_the_pixels_are_blurred_as_often_as_drawn(crop: int, probability: float) -> None:
    """Counted in the pictures: noise loses its contrast when it is blurred."""
    noise = (torch.rand(400, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).to(
        torch.uint8
    ) * 255
    official = [replace(view, size_px=16, blur_sigma_px=(1.5, 2.0)) for view in dino_views()]
    views = [replace(view, area=(1.0, 1.0), aspect=(1.0, 1.0), solarise_probability=0) for view in official]
    crops = run(noise, views[: crop + 1], mean=(0.0,), std=(1.0,))
    blurry = crops[crop].std(dim=(1, 2, 3)) < 0.3  # a fair coin's contrast is 0.5
    tolerance = 4 * math.sqrt(probability * (1 - probability) / len(noise))
    assert abs(float(blurry.float().mean()) - probability) <= tolerance


def test_changes_are_drawn_independently() -> None:
    view = replace(dino_views()[1], blur_probability=0.5)
    draws = drawn(view)
    changes = np.stack([happened(draws, name) for name in ("flip", "jitter", "grey", "blur", "solarise")])
    correlation = np.corrcoef(changes.astype(float)) - np.eye(5)
    assert np.abs(correlation).max() < 4 / math.sqrt(MANY)


def test_crops_of_an_image_are_drawn_independently() -> None:
    boxes = [drawn(PLAIN, crop=crop).boxes_B4 for crop in range(2)]
    areas = np.stack([box[:, 2] * box[:, 3] for box in boxes])
    assert abs(correlation(areas)) < 4 / math.sqrt(MANY)


def test_strengths_fill_their_ranges_evenly() -> None:
    draws = drawn(replace(dino_views()[0], jitter_probability=1.0))
    for values, low, high in (
        (draws.factors_B3[:, 0], 0.6, 1.4),
        (draws.factors_B3[:, 1], 0.6, 1.4),
        (draws.factors_B3[:, 2], 0.8, 1.2),
        (draws.hue_B, -0.1, 0.1),
        (draws.sigma_px_B, 0.1, 2.0),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        deciles = np.histogram(values, bins=10, range=(low, high))[0]
        assert np.abs(deciles / MANY - 0.1).max() < 4 * math.sqrt(0.09 / MANY)


def test_all_orders_of_the_jitter_are_equally_likely() -> None:
    draws = drawn(PLAIN, 24_000)
    orders = np.concatenate([draws.order_B3, draws.hue_slot_B[:, None]], axis=1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.abs(counts - 1000).max() < 4 * math.sqrt(1000)


def test_without_jitter_factors_are_one_and_hue_is_zero() -> None:
    draws = drawn(dino_views()[0])
    calm = ~draws.jitter_B
    assert calm.any()
    assert (draws.factors_B3[calm] == 1).all()
    assert (draws.hue_B[calm] == 0).all()


def test_a_strength_above_one_never_makes_a_factor_negative() -> None:
    draws = drawn(replace(PLAIN, jitter_probability=1.0, brightness=1.5))
    assert draws.factors_B3[:, 0].min() >= 0


@pytest.mark.parametrize(
    "size_px",
    [
        pytest.param((375, 500), id="photograph"),
        pytest.param((64, 64), id="small square"),
        pytest.param((100, 700), id="panorama, where most boxes don't fit"),
        pytest.param((900, 30), id="column, where no box fits"),
    ],
)
@pytest.mark.parametrize("area", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_distributed_as_torchvisions(area: tuple[float, float], size_px: tuple[int, int]) -> None:
    count = 3000
    ours = drawn(replace(PLAIN, area=area), count, size_px=size_px).boxes_B4
    reference = RandomResizedCrop(224, scale=area)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, *size_px)
        made = [reference.make_params([image]) for _ in range(count)]
    theirs = np.array([[box["top"], box["left"], box["height"], box["width"]] for box in made], dtype=float)
    for of_ours, of_theirs in zip(measures(ours), measures(theirs), strict=True):
        # Kolmogorov-Smirnov: above this once in 5,000 for samples of one distribution.
        assert greatest_gap(of_ours, of_theirs) < 2.2 * math.sqrt(2 / count)


def test_every_place_is_as_likely_as_every_other_the_last_included() -> None:
    """Boxes of 2 x 2 in 5 x 5 pixels have 4 places along each side."""
    view = replace(PLAIN, area=(4 / 25, 4 / 25), aspect=(1.0, 1.0))
    boxes = drawn(view, size_px=(5, 5)).boxes_B4
    for starts in (boxes[:, 0], boxes[:, 1]):
        places, counts = np.unique(starts, return_counts=True)
        assert places.tolist() == [0, 1, 2, 3]
        assert np.abs(counts / MANY - 1 / 4).max() < 4 * math.sqrt(3 / 16 / MANY)


def measures(boxes: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    tops, lefts, heights, widths = boxes.T
    return [heights * widths, widths / heights, tops, lefts]


def greatest_gap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Between the cumulative distributions of two samples."""
    values = np.union1d(one, other)
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (one, other)]
    return float(np.abs(shares[0] - shares[1]).max())


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    seed=st.integers(-(2**63), 2**63),
    low=st.floats(0.01, 1),
)
def test_boxes_lie_in_the_image_whatever_its_size(height: int, width: int, seed: int, low: float) -> None:
    boxes = drawn(replace(PLAIN, area=(low, 1.0)), 8, size_px=(height, width), seed=seed).boxes_B4
    tops, lefts, heights, widths = boxes.T
    assert (boxes == np.rint(boxes)).all()
    assert min(tops.min(), lefts.min()) >= 0
    assert min(heights.min(), widths.min()) >= 1
    assert (tops + heights).max() <= height
    assert (lefts + widths).max() <= width


@pytest.mark.parametrize("crop", [0, 1, 2])
def test_a_view_equals_the_literal_version(crop: int) -> None:
    images = photographs(40)
    views = dino_views(global_px=32, local_px=16, local_count=1)
    # Solarising has a step at one half, where the last bit decides; it has a test of its own.
    views = tuple(replace(view, solarise_probability=0) for view in views)
    ours = run(images, list(views))[crop]
    sizes = np.tile(images.shape[-2:], (len(images), 1))
    indices = np.arange(len(images)) * 3
    draws = draw(views[crop], sizes, seed=5, epoch=2, crop=crop, indices_B=indices)
    for row in range(len(images)):
        theirs = augmented(
            images[row].float() / 255, draws, row, size_px=views[crop].size_px, mean=MEAN, std=STD
        )
        torch.testing.assert_close(ours[row], theirs, rtol=0, atol=2e-3)  # 1e-4 of the range, over std 0.22


def test_solarising_happens_to_the_images_that_drew_it() -> None:
    images = photographs(50)
    view = replace(PLAIN, solarise_probability=0.5)
    plain, solarised = (
        run(images, [PLAIN], mean=(0,) * 3, std=(1,) * 3),
        run(images, [view], mean=(0,) * 3, std=(1,) * 3),
    )
    chosen = draw(
        view, np.tile([40, 56], (50, 1)), seed=5, epoch=2, crop=0, indices_B=np.arange(50) * 3
    ).solarise_B
    assert 0 < chosen.sum() < 50
    for row in range(50):
        expected = torch.where(plain[0][row] >= 0.5, 1 - plain[0][row], plain[0][row])
        assert torch.equal(solarised[0][row], expected if chosen[row] else plain[0][row])


def test_an_image_gets_the_same_views_whatever_batch_it_is_in() -> None:
    images, indices = photographs(10), torch.arange(10) * 7
    views = list(dino_views(global_px=32, local_px=16, local_count=2))
    whole = run(images, views, indices_B=indices)
    rows = torch.tensor([8, 1, 4])
    part = run(images[rows], views, indices_B=indices[rows])
    for of_whole, of_part in zip(whole, part, strict=True):
        torch.testing.assert_close(of_whole[rows], of_part, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 3}, {"indices_B": torch.arange(12) + 1}])
def test_other_places_get_other_views(change: dict[str, object]) -> None:
    before, after = run(photographs(), [PLAIN])[0], run(photographs(), [PLAIN], **change)[0]
    assert ((before - after).abs().amax(dim=(1, 2, 3)) > 0.1).all()


def test_boxes_are_drawn_in_the_originals_proportions() -> None:
    """A canvas of an image four times as wide as high holds boxes that look a quarter as wide as they are."""
    canvas = torch.zeros(200, 1, 64, 64, dtype=torch.uint8)
    draws = draw(PLAIN, np.tile([100, 400], (200, 1)), seed=0, epoch=0, crop=0, indices_B=np.arange(200))
    aspects = draws.boxes_B4[:, 3] / draws.boxes_B4[:, 2]
    assert aspects.min() > 0.73  # whole pixels round 3/4 a little
    assert aspects.max() < 1.35
    crops = run(canvas, [PLAIN], sizes_px_B2=torch.tensor([[100, 400]] * 200), mean=(0.5,), std=(0.5,))
    assert crops[0].shape == (200, 1, 24, 24)


def test_sizes_of_the_originals_decide_the_boxes_on_a_canvas() -> None:
    """A ramp from left to right shows how wide a box is, one from top to bottom how high."""
    ramp = torch.linspace(0, 1, 96)
    canvas = torch.stack([ramp[None, :].expand(96, 96), ramp[:, None].expand(96, 96)])[None]
    view = replace(PLAIN, area=(0.5, 0.5), size_px=32)
    sizes = torch.tensor([[300, 400]])
    crop = run(canvas, [view], sizes_px_B2=sizes, mean=(0.0,) * 2, std=(1.0,) * 2)[0][0]
    draws = draw(view, sizes.numpy(), seed=5, epoch=2, crop=0, indices_B=np.array([0]))
    _, _, height, width = draws.boxes_B4[0]
    widest, highest = (float(crop[0, 0, -1] - crop[0, 0, 0]), float(crop[1, -1, 0] - crop[1, 0, 0]))
    assert widest == pytest.approx(width / 400, abs=0.03)
    assert highest == pytest.approx(height / 300, abs=0.03)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channel_counts_keep_their_colours(channels: int) -> None:
    images = photographs(channels=channels)
    colourful = replace(PLAIN, jitter_probability=1.0, grey_probability=1.0)
    grey_levels = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    plain, same = (run(images, [view], **grey_levels)[0] for view in (PLAIN, colourful))
    assert torch.equal(plain, same)
    blurry = run(images, [replace(PLAIN, blur_probability=1.0)], **grey_levels)[0]
    assert not torch.equal(plain, blurry)


def test_grey_views_have_three_equal_channels() -> None:
    view = replace(PLAIN, grey_probability=1.0)
    crop = run(photographs(), [view], mean=(0.0,) * 3, std=(1.0,) * 3)[0]
    assert torch.equal(crop[:, 0], crop[:, 1])
    assert torch.equal(crop[:, 0], crop[:, 2])


def test_floats_and_bytes_give_the_same_views() -> None:
    images = photographs()
    views = list(dino_views(global_px=32, local_px=16, local_count=1))
    views = [replace(view, solarise_probability=0) for view in views]
    for of_bytes, of_floats in zip(run(images, views), run(images.float() / 255, views), strict=True):
        torch.testing.assert_close(of_bytes, of_floats, rtol=0, atol=1e-4)


def test_views_are_float32_normalised_and_leave_the_batch_alone() -> None:
    images = photographs()
    before = images.clone()
    crops = run(images, list(dino_views(global_px=32, local_px=16, local_count=3)))
    assert torch.equal(images, before)
    assert [tuple(crop.shape[1:]) for crop in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    low = torch.tensor([(0 - m) / s for m, s in zip(MEAN, STD, strict=True)])[:, None, None] - 1e-5
    high = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])[:, None, None] + 1e-5
    for crop in crops:
        assert crop.dtype == torch.float32
        assert ((crop >= low) & (crop <= high)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_views() -> None:
    images = photographs()
    views = [
        replace(view, solarise_probability=0) for view in dino_views(global_px=32, local_px=16, local_count=1)
    ]
    for on_host, on_gpu in zip(run(images, views), run(images.cuda(), views), strict=True):
        torch.testing.assert_close(on_host, on_gpu.cpu(), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"indices_B": torch.arange(3)}, "the batch has 12 images", id="too few indices"),
        pytest.param({"sizes_px_B2": torch.ones(3, 2)}, "the batch has 12 images", id="too few sizes"),
        pytest.param({"mean": (0.5,)}, "the images have 3 channels", id="mean of one channel"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(photographs(), [PLAIN], **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size_px": 0}, "size_px is 0"),
        ({"area": (0.5, 0.2)}, "area is"),
        ({"area": (0.5, 1.2)}, "at most the whole image"),
        ({"blur_sigma_px": (0.0, 1.0)}, "blur_sigma_px is"),
        ({"grey_probability": 1.1}, "grey_probability is 1.1"),
        ({"brightness": -0.1}, "brightness is -0.1"),
        ({"hue": 0.6}, "hue is 0.6"),
    ],
)
def test_a_view_out_of_range_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PLAIN, **change)  # type: ignore[arg-type]


def test_the_official_views_have_the_official_numbers() -> None:
    first, second, *local = dino_views()
    assert (first.size_px, second.size_px) == (224, 224)
    assert (first.area, second.area) == ((0.4, 1.0), (0.4, 1.0))
    assert [view.size_px for view in local] == [96] * 8
    assert {view.area for view in local} == {(0.05, 0.4)}
    for view in (first, second, *local):
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
        assert view.blur_sigma_px == (0.1, 2.0)
        assert view.aspect == (3 / 4, 4 / 3)
    assert len(fields(View)) == 13
