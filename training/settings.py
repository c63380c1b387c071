"""From flags, environment, a TOML file and a recipe to the settings of one run.

    flags  >  DINO_TRAIN_…  >  --config FILE.toml  >  --recipe NAME (or, with --resume, the run's own
    config.json)

All of them fill one typed model, so each setting has one name: `--optimizer.peak-lr`,
`DINO_TRAIN_OPTIMIZER__PEAK_LR`, and `peak_lr` under `[optimizer]`.
"""

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from training.config import RunConfig, differences
from training.data.opening import open_split
from training.errors import ConfigError, RunDirectoryError
from training.recipes import RECIPES, RunSize
from training.rundir import RunPlan, default_name, read_plan

ENV_PREFIX = "DINO_TRAIN_"
# What may change when a run resumes: nothing that a weight depends on, but for the last digits of another
# device.
OPERATIONAL = (
    "device",
    "log_every_steps",
    "loading.workers",
    "loading.cache",
    "checkpoints.",
    "guard.",
    "trackers",
)


class RunSettings(BaseSettings, RunConfig):
    """Train a teacher on a folder of images, without labels; ends with a bundle that dino-serve runs.

    Settings that are not given come from the recipe: `dino-train recipes` lists them.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        nested_model_default_partial_update=True,
    )

    data: Path = Field()
    """Folder of images, flat or nested; with train/ and val/ in it, val/ measures."""
    val_data: Path | None = None
    """Folder of labelled images (a folder for each class) to measure with; never trained on."""
    out: Path
    """Where the bundle goes; models/ and the name of the data folder if not given."""
    run_dir: Path
    """Where configuration, log and checkpoints go; runs/ and the name of the bundle if not given."""
    resume: bool = False
    """Go on with the run in the run directory, from its newest checkpoint."""
    preview: bool = False
    """Only write a picture of what the networks will see, preview.png in the run directory."""
    config: Path | None = None
    """TOML file with settings."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags come first (the framework adds them), then the environment, the file, the recipe."""
        return (init_settings, env_settings, _TomlSource(settings_cls), _BaseSource(settings_cls))

    def plan(self) -> RunPlan:
        """What to train on what, and where it goes."""
        config = RunConfig.model_validate({name: getattr(self, name) for name in RunConfig.model_fields})
        return RunPlan(data=self.data, val_data=self.val_data, out=self.out, config=config)


def refuse_unknown_environment(environment: Mapping[str, str]) -> None:
    """Refuses variables with our prefix that name no setting: a typo would otherwise be silence.

    Raises:
        ConfigError: There is one.
    """
    known = {name.upper() for name in RunSettings.model_fields}
    for variable in environment:
        if variable.startswith(ENV_PREFIX):
            name = variable.removeprefix(ENV_PREFIX).split("__")[0]
            if name not in known:
                nearest = get_close_matches(name, known, n=1)
                hint = f": did you mean {ENV_PREFIX}{nearest[0]}?" if nearest else ""
                raise ConfigError(f"the environment variable {variable} names no setting{hint}")


def refuse_changes_on_resume(saved: RunConfig, asked: RunConfig) -> None:
    """Refuses settings that would make the resumed run another run.

    Raises:
        ConfigError: A setting differs on which the weights depend.
    """
    changes = [change for change in differences(saved, asked) if not change.startswith(OPERATIONAL)]
    if changes:
        raise ConfigError(
            f"a resumed run keeps its settings, and these differ: {', '.join(changes)}; leave them out, or "
            "start a new run with another --run-dir"
        )


class _TomlSource(PydanticBaseSettingsSource):
    """The file that `--config` names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Is not used: `__call__` gives all fields at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Reads the file, if one is named."""
        path = self.current_state.get("config")
        if path is None:
            return {}
        try:
            return tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"the settings file {path} cannot be read ({error.strerror})") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"the settings file {path} is not TOML: {error}") from error


class _BaseSource(PydanticBaseSettingsSource):
    """What is under all that the user gave: the saved settings of the run, or the recipe's for the data."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Is not used: `__call__` gives all fields at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Resolves paths, then the settings of the run."""
        given = self.current_state
        if TypeAdapter(bool).validate_python(given.get("resume", False)):
            return _saved_settings(given)
        if "data" not in given:
            raise ConfigError("which images? Give a folder: dino-train run --data DIR")
        data = Path(given["data"])
        out = Path(given.get("out", Path("models") / default_name(data)))
        size = RunSize(
            num_images=len(open_split(data)[0]),
            batch_size=_count(given, "batch_size"),
            steps=_count(given, "steps"),
        )
        recipe = _recipe_named(given.get("recipe"))
        return {"out": out, "run_dir": Path("runs") / out.name, **RECIPES[recipe](size).model_dump()}


def _saved_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    if "run_dir" in given:
        run_dir = Path(given["run_dir"])
    elif "out" in given:
        run_dir = Path("runs") / Path(given["out"]).name
    elif "data" in given:
        run_dir = Path("runs") / default_name(Path(given["data"]))
    else:
        raise RunDirectoryError("which run? Give its folder: dino-train run --resume --run-dir runs/NAME")
    plan = read_plan(run_dir)
    saved = {"data": plan.data, "val_data": plan.val_data, "out": plan.out, "run_dir": run_dir}
    return saved | plan.config.model_dump()


def _recipe_named(name: str | None) -> str:
    if name is None:
        return "small_data" if torch.cuda.is_available() else "cpu"
    if name not in RECIPES:
        nearest = get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(f"there is no recipe {name!r}: {hint}There are {', '.join(RECIPES)}")
    return name


def _count(given: Mapping[str, Any], name: str) -> int | None:
    """A count that a recipe is resolved from; anything that is none is left for the validation to refuse."""
    try:
        value = int(given[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if value > 0 else None
