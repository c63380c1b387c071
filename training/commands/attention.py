"""`dino-train attention`: where a ViT looks, and which patches it takes to be alike."""

from pathlib import Path

from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from dino_core.bundle import load_bundle
from training.attention import attention_pictures
from training.commands.parsing import COMMAND, Device
from training.loop import choose_device


class AttentionSettings(BaseSettings):
    """Draw where the last block of a ViT looks, for each image, and the patches of all as colours."""

    model_config = COMMAND

    bundle: CliPositionalArg[Path]
    """The bundle, models/NAME."""
    images: CliPositionalArg[list[Path]]
    """Pictures to look at."""
    out: Path = Path("attention")
    """Folder for the drawings."""
    device: Device = "auto"
    """Where the network runs."""


def attention_command(settings: AttentionSettings, console: Console) -> None:
    """Draws, and prints the name of each drawing."""
    bundle = load_bundle(settings.bundle, device=choose_device(settings.device))
    for path in attention_pictures(bundle.model, settings.images, settings.out):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
