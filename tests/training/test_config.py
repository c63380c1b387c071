"""Settings: contradictions are refused with a sentence, and nothing can be changed afterwards."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.training.conftest import MakeConfig
from training.config import RunConfig, differences, sentence_of


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param(
            {"batch_size": 5, "accumulation_steps": 2}, "cannot be cut into 2 equal", id="unequal parts"
        ),
        pytest.param({"optimizer": {"warmup_steps": 6}}, "must be below steps", id="nothing but warm-up"),
        pytest.param(
            {"loss": {"teacher_temperature": 0.2}}, "the teacher must be the sharper one", id="dull teacher"
        ),
        pytest.param({"crops": {"local_area": [0.4, 0.1]}}, "smaller number first", id="range upside down"),
        pytest.param({"crops": {"mean": [0.5]}}, "3 numbers each", id="one mean for three channels"),
        pytest.param({"optimizer": {"peek_lr": 1}}, "optimizer.peek_lr: there is no such setting", id="typo"),
        pytest.param({"steps": 0}, "steps: input should be greater than", id="no step"),
        pytest.param({"optimizer": {"name": "lion"}}, "optimizer.name: input should be", id="unknown name"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    make_config: MakeConfig, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        make_config(**changes)
    assert sentence in sentence_of(refused.value)


def test_settings_are_frozen(make_config: MakeConfig) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_config().optimizer.peak_lr = 1.0


def test_settings_survive_json(make_config: MakeConfig) -> None:
    config = make_config(backbone={"pooling": "cls+mean"})
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_views_are_two_globals_with_their_own_blur_and_the_locals(make_config: MakeConfig) -> None:
    views = make_config(crops={"local_count": 3, "blur_probability": [0.9, 0.2, 0.4]}).crops.views()
    assert [view.size_px for view in views] == [16, 16, 8, 8, 8]
    assert [view.blur_probability for view in views] == [0.9, 0.2, 0.4, 0.4, 0.4]
    assert [view.solarise_probability for view in views] == [0, 0.2, 0, 0, 0]


def test_differences_name_the_settings(make_config: MakeConfig) -> None:
    old, new = make_config(), make_config(steps=9, optimizer={"peak_lr": 0.5})
    assert differences(old, new) == ["steps (6 -> 9)", "optimizer.peak_lr (0.01 -> 0.5)"]
    assert differences(old, old) == []


def test_runs_that_were_saved_with_a_boolean_cache_are_understood(make_config: MakeConfig) -> None:
    assert make_config(loading={"cache": True}).loading.cache == "disk"
    assert make_config(loading={"cache": False}).loading.cache == "off"
