"""From flags, environment, a TOML file and a recipe to the settings of one run.

    flags  >  DINO_TRAIN_…  >  --config FILE.toml  >  --recipe NAME (or, with --resume, the run's own
    config.json)

All of them fill one typed model, so each setting has one name: `--optimizer.peak-lr`,
`DINO_TRAIN_OPTIMIZER__PEAK_LR`, and `peak_lr` under `[optimizer]`.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, TypeAdapter, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSuppress, PydanticBaseSettingsSource, SettingsConfigDict

from training.config import RunConfig, differences
from training.data.addresses import Where, name_of, where
from training.data.images import Images, median_side_px
from training.data.measuring import SAMPLE_IMAGES, channel_statistics, holds_planes
from training.data.opening import open_split
from training.errors import ConfigError, RunDirectoryError
from training.recipes.names import recipe_named
from training.recipes.size import Recipe, Resolved, RunSize
from training.rundir import RunPlan, begun_by_this_launch, read_plan
from training.sizing import fitting_batch
from training.starting import Start, described

ENV_PREFIX = "DINO_TRAIN_"
AUTO = "auto"
# Under this name the lowest source hands up the batch size that `auto` stands for.
_FOUND_BATCH = "found_batch_size"
# What may change when a run resumes: nothing that a weight depends on, but for the last digits of another
# device.
OPERATIONAL = (
    "device",
    "recompute",
    "log_every_steps",
    "loading.workers",
    "loading.cache",
    "loading.check",
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
        cli_shortcuts={"plan-only": "plan"},
    )

    data: Where = Field()
    """Folder of images (with train/ and val/ in it, val/ measures), list of files, saved Hugging Face data
    set; tar shards or Parquet files, here or at an address such as s3://bucket/train-{000..099}.tar."""
    val_data: Where | None = None
    """Labelled images (such as a folder for each class) to measure with; never trained on."""
    out: Path
    """Where the bundle goes; models/ and the name of the data folder if not given."""
    run_dir: Path
    """Where configuration, log and checkpoints go; runs/ and the name of the bundle if not given."""
    resume: bool = False
    """Go on with the run in the run directory, from its newest checkpoint; workers that torchrun starts anew
    do so by themselves."""
    measure_colours: bool = False
    """Take the mean and the spread of each channel from 256 of the images, in place of the recipe's. Always
    so for images that are no RGB pictures."""
    preview: bool = False
    """Only write a picture of what the networks will see, preview.png in the run directory."""
    config: Path | None = None
    """TOML file with settings."""
    plan_only: bool = False
    """Measure a few steps, say what the run will take and why its settings are what they are, and end."""
    reasons: CliSuppress[dict[str, str]] = {}
    """Why the recipe's settings are what they are; filled by the recipe."""

    @model_validator(mode="before")
    @classmethod
    def _auto_becomes_what_was_found(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`auto` stands for a number, which the recipe has been resolved with."""
        found = values.get(_FOUND_BATCH)
        rest = {name: value for name, value in values.items() if name != _FOUND_BATCH}
        return rest | {"batch_size": found} if rest.get("batch_size") == AUTO else rest

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
        # A reason begins with the value that it is for: where the user has set another one, it is none.
        reasons = {
            name: reason for name, reason in self.reasons.items() if reason.startswith(spelled(config, name))
        }
        return RunPlan(data=self.data, val_data=self.val_data, out=self.out, config=config, reasons=reasons)


def spelled(config: RunConfig, dotted_name: str) -> str:
    """A setting's value as reasons spell it: thousands apart, floats at their shortest."""
    value: Any = config
    for name in dotted_name.split("."):
        value = getattr(value, name)
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
    )


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
            return _saved_settings(_run_dir(given))
        if (run_dir := _run_dir(given)) and begun_by_this_launch(run_dir):
            return {**_saved_settings(run_dir), "resume": True}
        if "data" not in given:
            raise ConfigError("which images? Give a folder: dino-train run --data DIR")
        data = where(given["data"])
        out = Path(given.get("out", Path("models") / name_of(data)))
        images = open_split(data)[0]
        device: Literal["cpu", "cuda"] = (
            "cuda" if torch.cuda.is_available() and given.get("device") != "cpu" else "cpu"
        )
        size = RunSize(
            num_images=len(images),
            batch_size=_count(given, "batch_size"),
            steps=_count(given, "steps"),
            device=device,
            start=_start(given),
            # Only where there is a choice of networks: it reads some of the images.
            side_px=median_side_px(images) if device == "cuda" else None,
        )
        recipe = recipe_named(given.get("recipe") or _default_recipe(size))
        measured = _measured(recipe(size).config, images, given)
        if given.get("batch_size") == AUTO:
            resolved = _with_fitting_batch(recipe, size, images, {**given, **measured})
        else:
            resolved = recipe(size)
        return {
            "out": out,
            "run_dir": Path("runs") / out.name,
            "reasons": {**resolved.reasons, **_reasons_of(measured)},
            _FOUND_BATCH: resolved.config.batch_size,
            **_over(_with_fingerprint(resolved.config, size).model_dump(), measured),
        }


def _measured(config: RunConfig, images: Images, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that follow from the pixels: where they are no RGB pictures, or where it is asked for."""
    backbone = given.get("backbone")
    asked = backbone.get("in_channels") if isinstance(backbone, Mapping) else None
    try:
        channels = int(asked or config.backbone.in_channels)
    except ValueError:  # left for the validation to refuse
        return {}
    as_planes = holds_planes(images, channels=channels)
    if not as_planes and not TypeAdapter(bool).validate_python(given.get("measure_colours", False)):
        return {}
    found = channel_statistics(images, channels=channels, as_planes=as_planes)
    scale = {"scale_low": found.planes.low, "scale_high": found.planes.high} if found.planes else {}
    return {
        "backbone": {"in_channels": channels},
        "crops": {"mean": found.mean, "std": found.std},
        "loading": scale,
    }


def _reasons_of(measured: Mapping[str, Any]) -> dict[str, str]:
    return {
        f"{part}.{name}": f"{value}: measured on up to {SAMPLE_IMAGES} of the images"
        for part in ("crops", "loading")
        for name, value in measured.get(part, {}).items()
    }


def _with_fingerprint(config: RunConfig, size: RunSize) -> RunConfig:
    """The settings, which any recipe may begin from weights with, and which ones those are."""
    if size.start is None:
        return config
    weights = {"weights": size.start.weights, "weights_fingerprint": size.start.fingerprint}
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=weights)})


def _with_fitting_batch(recipe: Recipe, size: RunSize, images: Images, given: Mapping[str, Any]) -> Resolved:
    """The recipe for the largest batch that fits; memory is that of the run with all that the user set."""
    asked = {name: value for name, value in given.items() if name in RunConfig.model_fields}
    del asked["batch_size"]
    config = RunConfig.model_validate(_over(recipe(size).config.model_dump(), asked))
    batch_size, reason = fitting_batch(config, images, steps_are_given=size.steps is not None)
    resolved = recipe(replace(size, batch_size=batch_size))
    return Resolved(resolved.config, {**resolved.reasons, "batch_size": reason})


def _over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some of them replaced, part by part."""
    return {
        **base,
        **{
            name: _over(base[name], value)
            if isinstance(value, Mapping) and isinstance(base.get(name), Mapping) and name != "model_kwargs"
            else value
            for name, value in changes.items()
        },
    }


def _run_dir(given: Mapping[str, Any]) -> Path | None:
    if "run_dir" in given:
        return Path(given["run_dir"])
    if "out" in given:
        return Path("runs") / Path(given["out"]).name
    return Path("runs") / name_of(where(given["data"])) if "data" in given else None


def _saved_settings(run_dir: Path | None) -> dict[str, Any]:
    if run_dir is None:
        raise RunDirectoryError("which run? Give its folder: dino-train run --resume --run-dir runs/NAME")
    plan = read_plan(run_dir)
    saved = {"data": plan.data, "val_data": plan.val_data, "out": plan.out, "run_dir": run_dir}
    found = {"reasons": dict(plan.reasons), _FOUND_BATCH: plan.config.batch_size}
    return saved | found | plan.config.model_dump()


def _default_recipe(size: RunSize) -> str:
    return "adapt" if size.start else "small-data" if size.device == "cuda" else "cpu"


def _start(given: Mapping[str, Any]) -> Start | None:
    """The weights to begin with, where some are named."""
    backbone = given.get("backbone")
    named = backbone.get("weights") if isinstance(backbone, Mapping) else None
    if not (isinstance(backbone, Mapping) and named):
        return None
    model_kwargs = backbone.get("model_kwargs")
    return described(
        str(named),
        name=backbone.get("name"),
        model_kwargs=model_kwargs if isinstance(model_kwargs, Mapping) else None,
    )


def _count(given: Mapping[str, Any], name: str) -> int | None:
    """A count that a recipe is resolved from; anything that is none is left for the validation to refuse."""
    try:
        value = int(given[name])
    except (KeyError, TypeError, ValueError):
        return None
    return value if value > 0 else None
