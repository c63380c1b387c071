"""Measuring during a run: which images, by what name, and nothing of the training is touched."""

import copy

import pytest
import torch

from tests.training.conftest import MakeConfig, MakeFolder
from training.config import RunConfig
from training.data.folder import ImageList, find_images
from training.errors import DataError
from training.evaluation.monitor import Monitor, make_monitor
from training.export import teacher_model
from training.state import new_state

CPU = torch.device("cpu")


def monitor_of(config: RunConfig, images: ImageList, val_images: ImageList | None = None) -> Monitor:
    return make_monitor(images, val_images, config.preprocessing(), config.evaluation)


def test_without_a_validation_folder_a_tenth_is_classified_by_the_rest(
    make_config: MakeConfig, make_folder: MakeFolder
) -> None:
    monitor = monitor_of(make_config(), find_images(make_folder(per_class=40)))
    assert monitor.queries is not None
    assert monitor.queries.kind == "seen"
    assert 2 <= len(monitor.queries.pixels_MCHW) <= 16
    assert len(monitor.queries.pixels_MCHW) + len(monitor.bank_NCHW) == 80


def test_as_many_images_as_the_settings_say(make_config: MakeConfig, make_folder: MakeFolder) -> None:
    config = make_config(evaluation={"max_bank_images": 7, "max_query_images": 3})
    train, val = find_images(make_folder("a")), find_images(make_folder("b", seed=1))
    monitor = monitor_of(config, train, val)
    assert monitor.queries is not None
    assert (len(monitor.bank_NCHW), len(monitor.queries.pixels_MCHW)) == (7, 3)
    assert monitor.queries.kind == "val"


def test_measuring_twice_gives_the_same_and_changes_nothing(
    make_config: MakeConfig, make_folder: MakeFolder
) -> None:
    config = make_config(
        backbone={"name": "test_resnet", "image_size_px": 32, "model_kwargs": {}},
        evaluation={"resize_px": 32, "crop_px": 32},
    )
    state = new_state(config, device=CPU)
    before = copy.deepcopy(state.teacher.state_dict())
    numbers = torch.get_rng_state()
    monitor = monitor_of(config, find_images(make_folder(per_class=20)))
    assert monitor.measure(teacher_model(state, config)) == monitor.measure(teacher_model(state, config))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.teacher.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(module.training for module in state.student.modules())


def test_broken_files_are_named(make_config: MakeConfig, make_folder: MakeFolder) -> None:
    monitor = monitor_of(make_config(), find_images(make_folder(corrupt=2)))
    assert set(monitor.skipped) == {"across/broken-0.jpg", "across/broken-1.jpg"}


@pytest.mark.parametrize("flat_val", [False, True])
def test_folders_that_are_no_classes_give_spread_and_rank_alone(
    make_config: MakeConfig, make_folder: MakeFolder, flat_val: bool
) -> None:
    config = make_config()
    train = find_images(make_folder("a", flat=not flat_val))
    val = find_images(make_folder("b", flat=True)) if flat_val else None
    measured = monitor_of(config, train, val).measure(teacher_model(new_state(config, device=CPU), config))
    assert set(measured) == {"feature_std", "rank_me"}


def test_a_class_that_training_lacks_is_refused(make_config: MakeConfig, make_folder: MakeFolder) -> None:
    train, val = find_images(make_folder("a")), make_folder("b")
    (val / "across").rename(val / "around")
    with pytest.raises(DataError, match="'around'"):
        monitor_of(make_config(), train, find_images(val))


def test_weights_that_overflow_measure_nothing_instead_of_failing(
    make_config: MakeConfig, make_folder: MakeFolder
) -> None:
    config = make_config()
    state = new_state(config, device=CPU)
    with torch.no_grad():
        for parameter in state.teacher.backbone.parameters():
            parameter.fill_(float("inf"))
    measured = monitor_of(config, find_images(make_folder(flat=True))).measure(teacher_model(state, config))
    assert measured == {}
