"""Recipes: full and valid for any size of data and any length, with the numbers of their sources."""

import pytest

from training.recipes import (
    IMAGENET_IMAGES,
    RECIPES,
    RunSize,
    cpu,
    prototypes_for,
    small_data,
    vit_small_16_imagenet,
)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_images", [2, 300, 9_469, IMAGENET_IMAGES])
@pytest.mark.parametrize("steps", [None, 1, 7, 100_000])
def test_every_recipe_holds_for_every_size_and_length(name: str, num_images: int, steps: int | None) -> None:
    config = RECIPES[name](RunSize(num_images=num_images, steps=steps))
    assert config.recipe == name
    assert config.batch_size <= num_images
    assert steps is None or config.steps == steps


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_in_one_sentence_what_it_is(name: str) -> None:
    assert (RECIPES[name].__doc__ or "").splitlines()[0].endswith(".")


def test_the_official_run_has_the_official_numbers() -> None:
    config = vit_small_16_imagenet(RunSize(num_images=IMAGENET_IMAGES))
    assert config.steps == 100 * (IMAGENET_IMAGES // 512)
    assert config.optimizer.peak_lr == pytest.approx(5e-4 * 512 / 256)
    assert config.optimizer.warmup_steps == 10 * (IMAGENET_IMAGES // 512)
    assert config.optimizer.freeze_last_layer_steps == IMAGENET_IMAGES // 512
    assert (config.optimizer.weight_decay_start, config.optimizer.weight_decay_end) == (0.04, 0.4)
    assert (config.teacher.momentum_start, config.teacher.momentum_end) == (0.996, 1.0)
    assert config.head.num_prototypes == 65_536
    assert [view.size_px for view in config.crops.views()] == [224] * 2 + [96] * 8
    assert [view.blur_probability for view in config.crops.views()][:3] == [1.0, 0.1, 0.5]


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [(9_469, 1024), (20_000, 2048), (50_000, 4096), (150_000, 16_384), (400_000, 32_768), (500_000, 65_536)],
)
def test_the_number_of_prototypes_grows_with_the_images(num_images: int, expected: int) -> None:
    assert prototypes_for(num_images) == expected


def test_small_data_warms_up_for_a_share_of_the_run_however_short() -> None:
    config = small_data(RunSize(num_images=3_000, steps=200))
    assert config.loss.teacher_temperature_warmup_steps == 60
    assert config.optimizer.warmup_steps == 20
    assert config.optimizer.freeze_last_layer_steps == 10
    assert config.loss.teacher_temperature == pytest.approx(0.02)


def test_a_smaller_batch_makes_more_and_gentler_steps() -> None:
    whole, half = (cpu(RunSize(num_images=9_469, batch_size=batch)) for batch in (64, 32))
    assert half.steps == pytest.approx(2 * whole.steps, rel=0.02)
    assert half.optimizer.peak_lr == pytest.approx(whole.optimizer.peak_lr / 2)
