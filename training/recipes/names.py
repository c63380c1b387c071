"""The recipes by their names."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from training.errors import ConfigError
from training.recipes.adapt import adapt
from training.recipes.imagenet import resnet50_imagenet, vit_small_16_imagenet, vit_small_16_imagenet_boost
from training.recipes.laptop import cpu, smoke
from training.recipes.published import resnet18_cifar10, resnet18_imagenette, vit_small_16_imagenette
from training.recipes.size import Recipe
from training.recipes.small_data import small_data

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.__name__.replace("_", "-"): recipe
        for recipe in (
            cpu,
            small_data,
            adapt,
            smoke,
            resnet18_imagenette,
            vit_small_16_imagenette,
            resnet18_cifar10,
            vit_small_16_imagenet,
            vit_small_16_imagenet_boost,
            resnet50_imagenet,
        )
    }
)


def recipe_named(name: str) -> Recipe:
    """A recipe by its name; underscores are as good as dashes.

    Raises:
        ConfigError: There is none; the message names the nearest.
    """
    spelled = name.replace("_", "-")
    if spelled not in RECIPES:
        nearest = get_close_matches(spelled, RECIPES, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ConfigError(f"there is no recipe {name!r}: {hint}There are {', '.join(RECIPES)}")
    return RECIPES[spelled]
