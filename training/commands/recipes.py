"""`dino-train recipes`: the runs with a name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from training.commands.parsing import COMMAND
from training.config import RunConfig
from training.errors import ConfigError
from training.recipes.about import ABOUT, About
from training.recipes.imagenet import vit_small_16_imagenet
from training.recipes.names import RECIPES, recipe_named
from training.recipes.size import IMAGENETTE_IMAGES, Recipe, Resolved, RunSize
from training.starting import described


class RecipesSettings(BaseSettings):
    """List the recipes, or print one in full as a settings file, with what is not as in the official run."""

    model_config = COMMAND

    name: CliPositionalArg[str] = ""
    """The recipe to print in full."""
    num_images: int = Field(default=IMAGENETTE_IMAGES, ge=1)
    """Images of the data that the settings are resolved for."""
    weights: str = ""
    """What `adapt` begins with: a bundle, a run, timm:NAME."""


def recipes_command(settings: RecipesSettings, console: Console) -> None:
    """Lists the recipes, or prints one in full."""
    size = RunSize(
        num_images=settings.num_images,
        device="cuda" if torch.cuda.is_available() else "cpu",
        start=described(settings.weights) if settings.weights else None,
    )
    if settings.name:
        resolved = recipe_named(settings.name)(size)
        official = vit_small_16_imagenet(replace(size, start=None)).config
        about = ABOUT[resolved.config.recipe]
        _print(console, *_settings_file(resolved, official, about, num_images=settings.num_images))
        return
    for name, recipe in RECIPES.items():
        about = ABOUT[name]
        _print(
            console,
            f"{name}: {(recipe.__doc__ or '').splitlines()[0]}",
            *_numbers(recipe, size),
            f"  data    {about.data}",
            f"  takes   {about.takes}",
            f"  result  {about.result}",
            f"  source  {about.source}",
            "",
        )
    _print(
        console,
        f"Steps are for {settings.num_images:,} images (--num-images); dino-train recipes NAME prints all "
        "settings of one, with what differs from the official run and why.",
    )


def print_reasons(reasons: Mapping[str, str], console: Console) -> None:
    """Prints why settings are what they are, one a line; nothing where there are no reasons."""
    if reasons:
        _print(console, *(f"{name} = {reason}" for name, reason in reasons.items()))


def _numbers(recipe: Recipe, size: RunSize) -> list[str]:
    """What a recipe comes to for so many images; a hint for one that needs weights first."""
    try:
        config = recipe(size).config
    except ConfigError:
        return ["  network that of --weights models/NAME, and its crops"]
    crops = config.crops
    local = f" + {crops.local_count} x {crops.local_px}" if crops.local_count else ""
    return [
        f"  network {config.backbone.name}, crops 2 x {crops.global_px}{local} px, "
        f"{config.head.num_prototypes:,} prototypes, {config.steps:,} steps of {config.batch_size} images"
    ]


def _settings_file(
    resolved: Resolved, official: RunConfig, about: About, *, num_images: int
) -> Iterator[str]:
    """A recipe as TOML that `--config` takes; comments say what the official run has instead, and why."""
    yield f"# {resolved.config.recipe} for {num_images:,} images. Source: {about.source}"
    yield '# "official" is vit-small-16-imagenet for as many images.'
    values, others = resolved.config.model_dump(mode="json"), official.model_dump(mode="json")
    parts = [name for name, value in values.items() if isinstance(value, dict)]
    for name, value in values.items():
        if name not in parts:
            yield _line(name, value, others[name], resolved.reasons.get(name) or about.reason(name))
    for part in parts:
        yield f"\n[{part}]"
        for name, value in values[part].items():
            setting = f"{part}.{name}"
            reason = resolved.reasons.get(setting) or about.reason(setting)
            yield _line(name, value, others[part][name], reason)


def _line(name: str, value: object, official: object, reason: str | None) -> str:
    written = f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"
    if value == official:
        return written
    because = f": {reason}" if reason else ""
    return f"{written}  # official {'none' if official is None else _toml(official)}{because}"


def _toml(value: Any) -> str:  # noqa: ANN401 - whatever JSON has
    """A value as TOML spells it; JSON's spelling, but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    return json.dumps(value)


def _print(console: Console, *lines: str) -> None:
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
