"""`dino-train eval`: what an embedding is worth."""

import json
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dino_core.bundle import load_bundle
from training.commands.parsing import COMMAND, Device
from training.data.opening import open_split
from training.evaluation.folder import evaluate_folder, save_embeddings
from training.loop import choose_device


class EvalSettings(BaseSettings):
    """Measure a bundle on images: weighted k-NN (T = 0.07) where folders are classes, spread, rank."""

    model_config = COMMAND

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


def eval_command(settings: EvalSettings, console: Console) -> None:
    """Measures a bundle, and prints a table."""
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
