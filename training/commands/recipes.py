"""`dino-train recipes`: the runs with a name."""

from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from training.commands.parsing import COMMAND
from training.errors import ConfigError
from training.recipes import IMAGENETTE_IMAGES, RECIPES, RunSize


class RecipesSettings(BaseSettings):
    """List the recipes, or print all settings of one."""

    model_config = COMMAND

    name: CliPositionalArg[str] = ""
    """The recipe to print in full."""
    num_images: int = Field(default=IMAGENETTE_IMAGES, ge=1)
    """Images of the data that the settings are resolved for."""


def recipes_command(settings: RecipesSettings, console: Console) -> None:
    """Lists the recipes, or prints one in full."""
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
