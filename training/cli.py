"""`dino-train`: text -> settings -> one call. What a user can get wrong ends in one sentence and status 2."""

import json
import os
import re
import sys
from argparse import Action, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dino_core.bundle import load_bundle
from dino_core.errors import DinoError
from training.attention import attention_pictures
from training.config import RunConfig, sentence_of
from training.data.opening import open_split
from training.errors import ConfigError, TrainingError
from training.evaluation.folder import evaluate_folder, save_embeddings
from training.export import export_checkpoint
from training.loop import choose_device, run
from training.recipes import IMAGENETTE_IMAGES, RECIPES, RunSize
from training.rundir import read_plan
from training.settings import ENV_PREFIX, RunSettings, refuse_changes_on_resume, refuse_unknown_environment

USAGE = """usage: dino-train COMMAND ...

  run        train a teacher on a folder of images; ends with a bundle in models/
  recipes    list the recipes, or print one in full
  eval       measure a bundle: k-NN where folders are classes, spread and rank
  export     write the teacher of a checkpoint as a bundle
  attention  draw where a ViT looks

dino-train COMMAND --help lists every setting of a command."""

Device = Literal["auto", "cpu", "cuda"]
Settings = TypeVar("Settings", bound=BaseSettings)

_COMMAND = SettingsConfigDict(
    frozen=True,
    extra="forbid",
    use_attribute_docstrings=True,
    env_prefix=ENV_PREFIX,
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_avoid_json=True,
    cli_hide_none_type=True,
)


class RecipesSettings(BaseSettings):
    """List the recipes, or print all settings of one."""

    model_config = _COMMAND

    name: CliPositionalArg[str] = ""
    """The recipe to print in full."""
    num_images: int = Field(default=IMAGENETTE_IMAGES, ge=1)
    """Images of the data that the settings are resolved for."""


class EvalSettings(BaseSettings):
    """Measure a bundle on images: weighted k-NN (T = 0.07) where folders are classes, spread, rank."""

    model_config = _COMMAND

    bundle: CliPositionalArg[Path]
    """The bundle, models/NAME."""
    data: Path
    """Folder of images; val/ is classified by train/ if it has both, else each tenth by the rest."""
    json_file: Path | None = None
    """Where to write the result as JSON too."""
    embeddings: Path | None = None
    """Where to write the vectors of all images with their paths, .npz or .safetensors."""
    batch_size: int = Field(default=64, ge=1)
    """Images that go through the network together."""
    workers: int | None = None
    """Threads that decode; one for each core if not given."""
    device: Device = "auto"
    """Where the network runs."""


class ExportSettings(BaseSettings):
    """Write the teacher of a checkpoint as a bundle."""

    model_config = _COMMAND

    checkpoint: CliPositionalArg[Path]
    """Folder of the checkpoint, runs/NAME/checkpoints/step-…"""
    out: Path
    """Where the bundle goes, models/NAME."""


class AttentionSettings(BaseSettings):
    """Draw where the last block of a ViT looks, a picture for each image."""

    model_config = _COMMAND

    bundle: CliPositionalArg[Path]
    """The bundle, models/NAME."""
    images: CliPositionalArg[list[Path]]
    """Pictures to look at."""
    out: Path = Path("attention")
    """Folder for the drawings."""
    device: Device = "auto"
    """Where the network runs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Of the command line; those of the process if not given.

    Returns:
        The exit status: 0, or 2 with a sentence on stderr, or 130 for a run that was asked to stop.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    console = Console()
    if not words or words[0] in {"-h", "--help"}:
        console.print(USAGE, markup=False, highlight=False)
        return 0 if words else 2
    try:
        return _dispatch(words[0], words[1:], console)
    except (TrainingError, DinoError) as error:
        sentence = str(error)
    except ValidationError as error:
        sentence = sentence_of(error)
    except SettingsError as error:
        what = str(error).removeprefix("error parsing CLI: ")
        sentence = f"{what}; dino-train {words[0]} --help lists all settings"
    Console(stderr=True).print(
        f"dino-train: error: {sentence}", markup=False, highlight=False, soft_wrap=True
    )
    return 2


def _dispatch(command: str, words: Sequence[str], console: Console) -> int:
    match command:
        case "run":
            return _run(_settings(RunSettings, command, words))
        case "recipes":
            _recipes(_settings(RecipesSettings, command, words), console)
        case "eval":
            _eval(_settings(EvalSettings, command, words), console)
        case "export":
            settings = _settings(ExportSettings, command, words)
            manifest = export_checkpoint(settings.checkpoint, settings.out)
            console.print(
                f"{settings.out}: {manifest.architecture}, {manifest.embedding_dimension} dimensions"
            )
        case "attention":
            _attention(_settings(AttentionSettings, command, words), console)
        case _:
            raise ConfigError(
                f"there is no command {command!r}: give run, recipes, eval, export or attention; --help "
                "explains them"
            )
    return 0


def _run(settings: RunSettings) -> int:
    refuse_unknown_environment(os.environ)
    plan = settings.plan()
    if settings.resume:
        refuse_changes_on_resume(read_plan(settings.run_dir).config, plan.config)
    bundle = run(plan, settings.run_dir, resume=settings.resume, console=Console(stderr=True))
    return 0 if bundle is not None else 130


def _recipes(settings: RecipesSettings, console: Console) -> None:
    size = RunSize(num_images=settings.num_images)
    if settings.name:
        if settings.name not in RECIPES:
            raise ConfigError(f"there is no recipe {settings.name!r}: there are {', '.join(RECIPES)}")
        console.print_json(RECIPES[settings.name](size).model_dump_json())
        return
    for name, recipe in RECIPES.items():
        config = recipe(size)
        crops = config.crops
        lines = (
            f"{name}: {(recipe.__doc__ or '').splitlines()[0]}",
            f"  {config.backbone.name}, crops 2 x {crops.global_px} px + {crops.local_count} x "
            f"{crops.local_px} px, {config.head.num_prototypes} prototypes, {config.steps:,} steps of "
            f"{config.batch_size} images",
        )
        console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"Steps are for {settings.num_images:,} images (--num-images); "
        "dino-train recipes NAME prints all settings of one.",
        soft_wrap=True,
        highlight=False,
    )


def _eval(settings: EvalSettings, console: Console) -> None:
    bundle = load_bundle(settings.bundle, device=choose_device(settings.device))
    images, val_images = open_split(settings.data)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("embedding", total=len(images) + (len(val_images) if val_images else 0))
        report = evaluate_folder(
            bundle.model,
            images,
            val_images,
            batch_size=settings.batch_size,
            workers=settings.workers,
            on_progress=lambda count: progress.advance(task, count),
        )
    result = {"model": bundle.manifest.id, "fingerprint": bundle.manifest.fingerprint, **report.to_json()}
    if settings.json_file is not None:
        settings.json_file.write_text(json.dumps(result, indent=1))
    if settings.embeddings is not None:
        save_embeddings(settings.embeddings, *report.embedded)
    table = Table("measure", "value", box=None, pad_edge=False)
    table.add_row("images", str(report.images))
    table.add_row("k-NN", report.knn_kind)
    for name, value in report.measures.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    for name, reason in report.skipped.items():
        console.print(f"left out {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _attention(settings: AttentionSettings, console: Console) -> None:
    bundle = load_bundle(settings.bundle, device=choose_device(settings.device))
    for path in attention_pictures(bundle.model, settings.images, settings.out):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


class _Help(RawDescriptionHelpFormatter):
    """Says where a setting of a run comes from, instead of a default that the recipe will replace."""

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        name = action.dest.split(".")[0]
        if self._prog.endswith(" run") and name in RunConfig.model_fields:
            return re.sub(r"\s*\((required|default: .*)\)$", "", text)
        return text


def _settings(model: type[Settings], command: str, words: Sequence[str]) -> Settings:
    """Parses a command line; both `--run-dir` and `--run_dir` are understood."""
    spelled = [_with_dashes(word) for word in words]
    source = CliSettingsSource[BaseSettings](
        model, cli_prog_name=f"dino-train {command}", cli_exit_on_error=False, formatter_class=_Help
    )
    return CliApp.run(model, cli_args=spelled, cli_settings_source=source)


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
