"""`dino-train recipes`: the runs with a name."""

from collections.abc import Mapping

import torch
from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from training.commands.parsing import COMMAND
from training.errors import ConfigError
from training.recipes.names import RECIPES, recipe_named
from training.recipes.size import IMAGENETTE_IMAGES, Recipe, RunSize
from training.starting import described


class RecipesSettings(BaseSettings):
    """List the recipes, or print all settings of one."""

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
        console.print_json(resolved.config.model_dump_json())
        print_reasons(resolved.reasons, console)
        return
    for name, recipe in RECIPES.items():
        console.print(
            "\n".join([f"{name}: {(recipe.__doc__ or '').splitlines()[0]}", *_numbers(recipe, size)]),
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    console.print(
        f"Steps are for {settings.num_images:,} images (--num-images); "
        "dino-train recipes NAME prints all settings of one, with reasons.",
        soft_wrap=True,
        highlight=False,
    )


def print_reasons(reasons: Mapping[str, str], console: Console) -> None:
    """Prints why settings are what they are, one a line."""
    for name, reason in reasons.items():
        console.print(f"{name} = {reason}", soft_wrap=True, highlight=False, markup=False)


def _numbers(recipe: Recipe, size: RunSize) -> list[str]:
    """What a recipe comes to for so many images; nothing for one that needs weights first."""
    try:
        config = recipe(size).config
    except ConfigError:
        return ["  needs --weights models/NAME"]
    crops = config.crops
    return [
        f"  {config.backbone.name}, crops 2 x {crops.global_px} px + {crops.local_count} x "
        f"{crops.local_px} px, {config.head.num_prototypes} prototypes, {config.steps:,} steps of "
        f"{config.batch_size} images"
    ]
