"""`dino-train import`: weights that others made -> a bundle, and a report of every tensor."""

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from training.commands.parsing import COMMAND
from training.importing.headfile import head_file
from training.importing.sources import foreign_model
from training.importing.writing import refuse_taken, report, write_import


class ImportSettings(BaseSettings):
    """Make a bundle of weights that others made: DINO, DINOv2, DINOv3, timm, transformers, torchvision."""

    model_config = COMMAND

    source: CliPositionalArg[str]
    """A file (.pth, .pt, .bin, .safetensors), a directory of timm or transformers, or by name where there is
    internet: timm:NAME, torchvision:NAME, hf:OWNER/NAME."""
    out: Path
    """Where the bundle goes, models/NAME."""
    name: str | None = None
    """timm's name of the network, for a file whose tensors do not tell it."""
    heads: Annotated[int, Field(ge=1)] | None = None
    """Attention heads, for a file with a ViT of a width that was never published."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Side of the crop in pixels, in place of the source's."""


def import_command(settings: ImportSettings, console: Console) -> None:
    """Writes a bundle, and says what became of each tensor."""
    refuse_taken(settings.out)
    model = foreign_model(settings.source, name=settings.name, heads=settings.heads)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    for line in report(model):
        say(line)
    manifest = write_import(model, settings.out, image_size_px=settings.image_size)
    say(f"{settings.out}: {manifest.architecture}, {manifest.embedding_dimension} dimensions")
    if model.heads.teacher:
        say(f"{head_file(settings.out)}: the head, with which training goes on")
    say(f"next: dino-train eval {settings.out} --data DIR, or dino-serve run --model {settings.out}")
