"""`dino-train export`: the teacher of a checkpoint -> a bundle."""

from pathlib import Path

from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from training.commands.parsing import COMMAND
from training.export import export_checkpoint


class ExportSettings(BaseSettings):
    """Write the teacher of a checkpoint as a bundle."""

    model_config = COMMAND

    checkpoint: CliPositionalArg[Path]
    """Folder of the checkpoint, runs/NAME/checkpoints/step-…"""
    out: Path
    """Where the bundle goes, models/NAME."""


def export_command(settings: ExportSettings, console: Console) -> None:
    """Writes a bundle, and says what it is."""
    manifest = export_checkpoint(settings.checkpoint, settings.out)
    console.print(f"{settings.out}: {manifest.architecture}, {manifest.embedding_dimension} dimensions")
