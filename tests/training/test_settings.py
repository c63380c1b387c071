"""From words to a plan: precedence, recipes, both spellings, and refusals that say what to do."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from tests.training.conftest import MakeConfig, MakeFolder
from training.config import sentence_of
from training.data.addresses import name_of
from training.distributed import World
from training.errors import ConfigError, DataError, RunDirectoryError
from training.rundir import own_run_directory
from training.settings import RunSettings, refuse_changes_on_resume, refuse_unknown_environment


def parsed(*words: object) -> RunSettings:
    return CliApp.run(RunSettings, cli_args=[str(word) for word in words], cli_exit_on_error=False)


def test_a_recipe_fills_what_is_not_given(make_folder: MakeFolder) -> None:
    data = make_folder("birds", per_class=20)
    settings = parsed("--data", data, "--recipe", "smoke", "--optimizer.peak-lr", "0.25")
    plan = settings.plan()
    assert plan.config.recipe == "smoke"
    assert plan.config.optimizer.peak_lr == 0.25
    assert plan.config.optimizer.clip == "global"
    assert (plan.out, settings.run_dir) == (Path("models/birds"), Path("runs/birds"))


def test_flags_beat_environment_beats_file_beats_recipe(
    make_folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("steps = 11\nseed = 11\nbatch_size = 11\n[optimizer]\npeak_lr = 0.11\nend_lr = 0.11\n")
    monkeypatch.setenv("DINO_TRAIN_SEED", "22")
    monkeypatch.setenv("DINO_TRAIN_STEPS", "22")
    monkeypatch.setenv("DINO_TRAIN_OPTIMIZER__END_LR", "0.022")
    words = ("--data", make_folder(), "--recipe", "smoke", "--config", file, "--steps", 33)
    config = parsed(*words).plan().config
    assert (config.steps, config.seed, config.batch_size) == (33, 22, 11)
    assert (config.optimizer.peak_lr, config.optimizer.end_lr) == (0.11, 0.022)


def test_a_shorter_run_has_shorter_warm_ups(make_folder: MakeFolder) -> None:
    config = parsed("--data", make_folder(), "--recipe", "cpu", "--steps", 20).plan().config
    assert config.optimizer.warmup_steps == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(("--recipe", "cpuu"), "did you mean cpu", id="recipe misspelt"),
        pytest.param(("--config", "nowhere.toml"), "nowhere.toml cannot be read", id="no such file"),
    ],
)
def test_what_is_misspelt_is_named(make_folder: MakeFolder, words: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parsed("--data", make_folder(), *words)


def test_a_file_that_is_no_toml_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("steps: 3")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML"):
        parsed("--data", make_folder(), "--config", tmp_path / "bad.toml")


def test_an_unknown_key_in_a_file_is_refused(make_folder: MakeFolder, tmp_path: Path) -> None:
    (tmp_path / "typo.toml").write_text("[optimizer]\npeek_lr = 3\n")
    with pytest.raises(ValidationError) as refused:
        parsed("--data", make_folder(), "--recipe", "smoke", "--config", tmp_path / "typo.toml")
    said = sentence_of(refused.value)
    assert said == "optimizer.peek_lr: there is no such setting: did you mean optimizer.peak_lr?"


def test_an_unknown_flag_is_refused(make_folder: MakeFolder) -> None:
    with pytest.raises(SettingsError, match="--optimizer.peek-lr"):
        parsed("--data", make_folder(), "--optimizer.peek-lr", 3)


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(ConfigError, match="DINO_TRAIN_STEPZ names no setting: did you mean DINO_TRAIN_STEPS"):
        refuse_unknown_environment({"DINO_TRAIN_STEPZ": "3", "HOME": "/"})
    refuse_unknown_environment({"DINO_TRAIN_STEPS": "3", "DINO_TRAIN_OPTIMIZER__PEAK_LR": "1"})


def test_without_data_the_sentence_asks_for_it() -> None:
    with pytest.raises(ConfigError, match="--data DIR"):
        parsed()


def test_an_empty_folder_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found no image"):
        parsed("--data", tmp_path / "empty")


@pytest.fixture
def begun(make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path) -> Path:
    """The folder of a run that has begun."""
    settings = parsed(
        "--data", make_folder(), "--recipe", "smoke", "--run-dir", tmp_path / "run", "--seed", 5
    )
    with own_run_directory(settings.run_dir, settings.plan(), resume=False, world=World()):
        pass
    return settings.run_dir


def test_a_resumed_run_takes_its_own_settings_and_paths(begun: Path) -> None:
    settings = parsed("--resume", "--run-dir", begun)
    assert settings.plan().config.seed == 5
    assert name_of(settings.data) == "pictures"


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        pytest.param(("--seed", "5"), True, id="what it was"),
        pytest.param(("--checkpoints.keep", "7"), True, id="how many checkpoints"),
        pytest.param(("--loading.workers", "0"), True, id="threads"),
        pytest.param(("--optimizer.peak-lr", "3"), False, id="learning rate"),
        pytest.param(("--loading.canvas-px", "20"), False, id="other pixels"),
    ],
)
def test_a_resumed_run_refuses_what_would_change_its_weights(
    begun: Path, words: tuple[str, ...], allowed: bool
) -> None:
    saved = parsed("--resume", "--run-dir", begun).plan().config
    asked = parsed("--resume", "--run-dir", begun, *words).plan().config
    if allowed:
        refuse_changes_on_resume(saved, asked)
    else:
        with pytest.raises(ConfigError, match="a resumed run keeps its settings"):
            refuse_changes_on_resume(saved, asked)


@pytest.mark.parametrize("words", [(), ("--run-dir", "nowhere"), ("--out", "models/nowhere")])
def test_resuming_what_is_not_there_says_so(words: tuple[Any, ...]) -> None:
    with pytest.raises(RunDirectoryError, match=r"which run\?|there is no run to resume"):
        parsed("--resume", *words)
