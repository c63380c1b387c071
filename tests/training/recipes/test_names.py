"""Recipes: full and valid for any size of data and any length, with the numbers of their sources."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from dino_core.backbones import make_backbone
from training.config import RunConfig, differences
from training.errors import ConfigError
from training.recipes.about import ABOUT
from training.recipes.names import RECIPES, recipe_named
from training.recipes.size import IMAGENET_IMAGES, IMAGENETTE_IMAGES, RunSize
from training.recipes.small_data import prototypes_for, small_data
from training.settings import spelled
from training.starting import described
from training.step import values_at

DEFAULT = described(str(Path(__file__).parents[3] / "models/default"))


def resolved(name: str, num_images: int, *, batch_size: int | None = None) -> RunConfig:
    return recipe_named(name)(RunSize(num_images=num_images, batch_size=batch_size, start=DEFAULT)).config


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_images", [2, 300, 9_469, IMAGENET_IMAGES])
@pytest.mark.parametrize("steps", [None, 1, 7, 100_000])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_recipe_holds_for_every_size_and_length(
    name: str, num_images: int, steps: int | None, device: Literal["cpu", "cuda"]
) -> None:
    size = RunSize(num_images=num_images, steps=steps, device=device, start=DEFAULT)
    config = RECIPES[name](size).config
    assert RunConfig.model_validate(config.model_dump()) == config  # copies with changes are checked too
    assert config.recipe == name
    assert config.batch_size <= num_images
    assert steps is None or config.steps == steps


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_in_one_sentence_what_it_is(name: str) -> None:
    assert (RECIPES[name].__doc__ or "").splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", RECIPES)
def test_the_network_of_every_recipe_takes_its_crops(name: str) -> None:
    backbone = resolved(name, 9_469).backbone
    made = make_backbone(
        backbone.name, image_size_px=backbone.image_size_px, model_kwargs=backbone.model_kwargs
    )
    assert made.embed_dim > 0


def test_underscores_are_as_good_as_dashes() -> None:
    assert recipe_named("small_data") is recipe_named("small-data")


def test_a_recipe_that_is_misspelt_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean small-data"):
        recipe_named("smalldata")


def test_the_official_run_has_the_official_numbers() -> None:
    config = resolved("vit-small-16-imagenet", IMAGENET_IMAGES)
    epoch_steps = IMAGENET_IMAGES // 512
    assert config.steps == 100 * epoch_steps
    assert config.optimizer.peak_lr == pytest.approx(5e-4 * 512 / 256)
    assert config.optimizer.end_lr == 1e-6
    assert config.optimizer.warmup_steps == 10 * epoch_steps
    assert config.optimizer.freeze_last_layer_steps == epoch_steps
    assert (config.optimizer.weight_decay_start, config.optimizer.weight_decay_end) == (0.04, 0.4)
    assert (config.optimizer.clip, config.optimizer.clip_norm) == ("per_parameter", 3.0)
    assert (config.teacher.momentum_start, config.teacher.momentum_end) == (0.996, 1.0)
    assert config.backbone.drop_path == 0.1
    assert config.head.num_prototypes == 65_536
    assert config.head.norm_last_layer
    assert (config.loss.teacher_temperature, config.loss.teacher_temperature_warmup_steps) == (0.04, 0)
    assert [view.size_px for view in config.crops.views()] == [224] * 2 + [96] * 8
    assert [view.blur_probability for view in config.crops.views()][:3] == [1.0, 0.1, 0.5]
    assert [view.area for view in config.crops.views()][1:3] == [(0.4, 1.0), (0.05, 0.4)]


def test_the_boosted_run_warms_its_temperature_for_30_of_300_epochs() -> None:
    config = resolved("vit-small-16-imagenet-boost", IMAGENET_IMAGES)
    epoch_steps = IMAGENET_IMAGES // 1024
    assert (config.batch_size, config.steps) == (1024, 300 * epoch_steps)
    assert (config.loss.teacher_temperature_start, config.loss.teacher_temperature) == (0.04, 0.07)
    assert config.loss.teacher_temperature_warmup_steps == 30 * epoch_steps
    assert config.loss.teacher_temperature_hold_steps == epoch_steps
    assert not config.head.norm_last_layer


def test_the_official_resnet_has_its_own_optimiser_and_crops() -> None:
    config = resolved("resnet50-imagenet", IMAGENET_IMAGES)
    assert config.optimizer.name == "sgd"
    assert config.optimizer.peak_lr == pytest.approx(0.03 * 512 / 256)
    assert (config.optimizer.weight_decay_start, config.optimizer.weight_decay_end) == (1e-4, 1e-4)
    assert (config.crops.global_area, config.crops.local_area) == ((0.14, 1.0), (0.05, 0.14))


def test_the_published_small_runs_have_the_published_numbers() -> None:
    imagenette = resolved("resnet18-imagenette", IMAGENETTE_IMAGES)
    assert (imagenette.batch_size, imagenette.steps) == (256, 200 * (IMAGENETTE_IMAGES // 256))
    assert imagenette.optimizer.peak_lr == pytest.approx(0.06)
    assert imagenette.teacher.momentum_start == imagenette.teacher.momentum_end == 0.99
    assert [view.size_px for view in imagenette.crops.views()] == [128] * 2 + [64] * 6
    assert (imagenette.head.num_prototypes, imagenette.head.batch_norm) == (2048, True)

    cifar = resolved("resnet18-cifar10", 50_000)
    assert cifar.batch_size == 128
    assert cifar.optimizer.peak_lr == pytest.approx(0.06)
    assert len(cifar.crops.views()) == 2
    assert all(view.blur_probability == 0 for view in cifar.crops.views())
    assert cifar.head.num_layers == 2

    assert [view.solarise_probability for view in cifar.crops.views()] == [0, 0.2]

    vit = resolved("vit-small-16-imagenette", IMAGENETTE_IMAGES)
    assert {(view.blur_probability, view.solarise_probability) for view in vit.crops.views()} == {(0.5, 0.2)}
    epoch_steps = IMAGENETTE_IMAGES // 128
    assert (vit.batch_size, vit.steps) == (128, 200 * epoch_steps)
    assert vit.optimizer.peak_lr == 5e-4
    assert vit.optimizer.betas == (0.9, 0.95)
    assert vit.loss.teacher_temperature_warmup_steps == 10 * epoch_steps
    assert [view.size_px for view in vit.crops.views()] == [224] * 2 + [96] * 6


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [(9_469, 1024), (20_000, 2048), (50_000, 4096), (150_000, 16_384), (400_000, 32_768), (500_000, 65_536)],
)
def test_the_number_of_prototypes_grows_with_the_images(num_images: int, expected: int) -> None:
    assert prototypes_for(num_images)[0] == expected


def test_small_data_warms_up_for_a_share_of_the_run_however_short() -> None:
    config = small_data(RunSize(num_images=3_000, steps=200)).config
    assert config.loss.teacher_temperature_warmup_steps == 60
    assert config.optimizer.warmup_steps == 20
    assert config.optimizer.freeze_last_layer_steps == 10
    assert config.loss.teacher_temperature == pytest.approx(0.02)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("num_images", [3_068, 640_000, 2 * IMAGENET_IMAGES])
def test_small_data_goes_between_the_ends_of_its_table(
    num_images: int, device: Literal["cpu", "cuda"]
) -> None:
    config = small_data(RunSize(num_images=num_images, device=device)).config
    share = min(1, max(0, (num_images - 20_000) / (IMAGENET_IMAGES - 20_000)))
    assert config.loss.teacher_temperature == pytest.approx(0.02 + 0.05 * share, abs=1e-3)
    assert config.teacher.momentum_start == pytest.approx(0.99 + 0.006 * share, abs=1e-4)
    # Twice the batch looks back on half as many steps, which are as many images.
    twice = small_data(RunSize(num_images=num_images, device=device, batch_size=2 * config.batch_size)).config
    assert twice.teacher.momentum_start == pytest.approx(config.teacher.momentum_start**2, abs=1e-4)


def test_small_data_takes_a_larger_vit_for_many_pictures_and_none_for_tiny_ones() -> None:
    names = {
        (num_images, side_px): small_data(
            RunSize(num_images=num_images, side_px=side_px)
        ).config.backbone.name
        for num_images, side_px in ((99_999, 500), (100_000, 500), (100_000, None), (50_000, 32))
    }
    assert names == {
        (99_999, 500): "vit_tiny_patch16_224",
        (100_000, 500): "vit_small_patch16_224",
        (100_000, None): "vit_small_patch16_224",
        (50_000, 32): "resnet10t",
    }
    tiny = small_data(RunSize(num_images=50_000, side_px=32))
    assert tiny.config.steps == 100 * (50_000 // 64)
    assert "32 px" in tiny.reasons["backbone.name"]


def test_small_data_on_a_laptop_is_a_small_convolutional_network() -> None:
    laptop = small_data(RunSize(num_images=3_068, device="cpu")).config
    gpu = small_data(RunSize(num_images=3_068, device="cuda")).config
    assert (laptop.backbone.name, laptop.crops.global_px) == ("resnet10t", 64)
    assert (gpu.backbone.name, gpu.crops.global_px) == ("vit_tiny_patch16_224", 224)
    assert laptop.head.batch_norm
    assert (laptop.precision, gpu.precision) == ("float32", "bf16")


def test_adapt_needs_weights_and_takes_their_network_and_pixels() -> None:
    with pytest.raises(ConfigError, match="give --backbone.weights models/NAME"):
        RECIPES["adapt"](RunSize(num_images=1000))
    config = resolved("adapt", 1000)
    assert config.backbone.name == "tf_efficientnet_lite0"
    assert (config.evaluation.resize_px, config.evaluation.crop_px, config.crops.global_px) == (256, 224, 224)
    assert config.optimizer.head_warmup_steps == config.steps // 10


def test_a_smaller_batch_makes_more_and_gentler_steps() -> None:
    whole, half = (resolved("cpu", 9_469, batch_size=batch) for batch in (64, 32))
    assert half.steps == pytest.approx(2 * whole.steps, rel=0.02)
    assert half.optimizer.peak_lr == pytest.approx(whole.optimizer.peak_lr / 2)


def test_adapt_cuts_local_crops_in_whole_patches() -> None:
    start = described("timm:vit_small_patch14_dinov2.lvd142m")
    crops = RECIPES["adapt"](RunSize(num_images=1000, start=start)).config.crops
    assert crops.global_px % 14 == crops.local_px % 14 == 0


def test_adapt_on_a_laptop_looks_at_as_many_pixels_as_its_hour_allows() -> None:
    large = replace(
        DEFAULT, preprocessing=replace(DEFAULT.preprocessing, resize_px=256, crop_px=224), cell_px=32
    )
    laptop, gpu = (
        RECIPES["adapt"](RunSize(num_images=3000, start=large, device=device)).config
        for device in ("cpu", "cuda")
    )
    pixels = 2 * laptop.crops.global_px**2 + laptop.crops.local_count * laptop.crops.local_px**2
    assert laptop.steps * laptop.batch_size * pixels <= 96_000 * 12_288
    assert gpu.steps == 30 * (3000 // 64)


def test_adapt_keeps_statistics_where_there_are_any() -> None:
    vit = described("timm:vit_small_patch16_224.dino")
    assert resolved("adapt", 1000).backbone.norm_statistics == "frozen"
    assert resolved("adapt", 1000).head.batch_norm
    of_vit = RECIPES["adapt"](RunSize(num_images=1000, start=vit)).config
    assert of_vit.backbone.norm_statistics == "batch"
    assert not of_vit.head.batch_norm


def test_the_official_schedules_are_the_official_formulas() -> None:
    """`cosine_scheduler` and the list of temperatures of the official code, spelt out."""
    config = resolved("vit-small-16-imagenet-boost", IMAGENET_IMAGES)
    epoch, total = IMAGENET_IMAGES // 1024, 300 * (IMAGENET_IMAGES // 1024)
    peak, warmup = 5e-4 * 1024 / 256, 10 * epoch

    def half_cosine(start: float, end: float, share: float) -> float:
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))

    for step in (
        0,
        1,
        epoch - 1,
        epoch,
        warmup - 1,
        warmup,
        15 * epoch,
        29 * epoch,
        150 * epoch + 7,
        total - 1,
    ):
        now = values_at(step, config)
        rate = (
            peak * step / (warmup - 1)
            if step < warmup
            else half_cosine(peak, 1e-6, (step - warmup) / (total - warmup))
        )
        assert now.learning_rate == pytest.approx(rate, rel=1e-9)
        assert now.weight_decay == pytest.approx(half_cosine(0.04, 0.4, step / total), rel=1e-9)
        assert now.teacher_momentum == pytest.approx(half_cosine(0.996, 1, step / total), rel=1e-12)
        temperature = 0.04 + 0.03 * min(1, (step // epoch) / 29)  # numpy.linspace(0.04, 0.07, 30), then 0.07
        assert now.teacher_temperature == pytest.approx(temperature, rel=1e-9)
        assert now.last_layer_frozen == (step < epoch)


def test_everything_is_told_of_every_recipe() -> None:
    assert set(ABOUT) == set(RECIPES)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", RECIPES)
def test_whatever_is_not_as_in_the_official_run_has_a_reason(
    name: str, device: Literal["cpu", "cuda"]
) -> None:
    size = RunSize(num_images=30_000, device=device, start=DEFAULT)
    official = RECIPES["vit-small-16-imagenet"](size).config
    ours = RECIPES[name](size)
    for difference in differences(official, ours.config):
        setting = difference.partition(" ")[0]
        assert ours.reasons.get(setting) or ABOUT[name].reason(setting), setting


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_reason_begins_with_the_value_that_it_is_for(name: str, device: Literal["cpu", "cuda"]) -> None:
    ours = RECIPES[name](RunSize(num_images=30_000, device=device, start=DEFAULT))
    for setting, reason in ours.reasons.items():
        assert reason.startswith(spelled(ours.config, setting)), setting
