"""`dino-train export`: the teacher of a checkpoint -> a bundle; a model -> transformers' format, or ONNX."""

from pathlib import Path

import torch
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from dino_core.manifest import MANIFEST
from dino_core.parity import MIN_AGREEMENT
from training.commands.parsing import COMMAND
from training.errors import ConfigError
from training.evaluation.models import model_named
from training.export import export_checkpoint
from training.exporting.huggingface import write_transformers
from training.exporting.onnx_file import write_onnx


class ExportSettings(BaseSettings):
    """Write the teacher of a checkpoint as a bundle, or a bundle in the formats of others."""

    model_config = COMMAND

    source: CliPositionalArg[Path]
    """Folder of a checkpoint, runs/NAME/checkpoints/step-…; for --hf and --onnx also a bundle or a run."""
    out: Path | None = None
    """Where the bundle of a checkpoint goes, models/NAME."""
    hf: Path | None = None
    """Where a directory for Hugging Face's transformers goes."""
    onnx: Path | None = None
    """Where an ONNX file goes."""


def export_command(settings: ExportSettings, console: Console) -> None:
    """Writes what was asked for, and says what it is."""
    if settings.out is None and settings.hf is None and settings.onnx is None:
        raise ConfigError("export to what? Give --out models/NAME, --hf DIR or --onnx FILE")
    if settings.out is not None:
        if (settings.source / MANIFEST).is_file():
            raise ConfigError(f"{settings.source} is a bundle already: give --hf DIR or --onnx FILE")
        manifest = export_checkpoint(settings.source, settings.out)
        dimensions = manifest.embedding_dimension
        console.print(f"{settings.out}: {manifest.architecture}, {dimensions} dimensions", soft_wrap=True)
    if settings.hf is None and settings.onnx is None:
        return
    named = model_named(str(settings.source), device=torch.device("cpu"))
    if settings.hf is not None:
        cosine, difference = write_transformers(named.model, settings.hf, name=settings.hf.name)
        console.print(
            f"{settings.hf}: for transformers; cosine with ours at least {cosine:.7f}, largest difference "
            f"{difference:.1e} of the largest number",
            highlight=False,
            soft_wrap=True,
        )
    if settings.onnx is not None:
        write_onnx(named.model, settings.onnx)
        console.print(
            f"{settings.onnx}: for ONNX runtimes; ONNX Runtime computes our embeddings from it (cosine at "
            f"least {MIN_AGREEMENT})",
            highlight=False,
            soft_wrap=True,
        )
