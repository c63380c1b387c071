"""`dino-train reduce`: a bundle whose embeddings are centred, shorter, or whitened."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console
from rich.progress import Progress

from dino_core.bundle import load_bundle
from training.commands.parsing import COMMAND, Device
from training.data.addresses import Where
from training.data.opening import open_split
from training.loop import choose_device
from training.reducing import Fit, reduce_bundle


class ReduceSettings(BaseSettings):
    """Fit what follows the pooling to images without labels: centring, fewer dimensions, whitening."""

    model_config = COMMAND

    model: CliPositionalArg[Path]
    """The bundle whose network is taken, models/NAME; it stays as it is."""
    data: Where
    """Images like those to come, as `dino-train run` takes them; never those to measure with."""
    out: Path
    """Where the new bundle goes, models/NAME."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Of an embedding, the strongest are kept; all of the network's if not given."""
    whitening: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0 only centres and turns; 1 gives all directions the same weight."""
    images: Annotated[int, Field(ge=2)] = 20_000
    """How many images are looked at, chosen by their names; more change nothing that one could see."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images that go through the network together."""
    device: Device = "auto"
    """Where the network runs."""


def reduce_command(settings: ReduceSettings, console: Console) -> None:
    """Writes the new bundle, and says what is left of the variance."""
    images, _ = open_split(settings.data)
    bundle = load_bundle(settings.model, device=choose_device(settings.device))
    fit = Fit(dimensions=settings.dimensions, whitening=settings.whitening, max_images=settings.images)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("embedding", total=min(len(images), settings.images))
        reduced = reduce_bundle(
            bundle,
            images,
            settings.out,
            fit=fit,
            batch_size=settings.batch_size,
            on_progress=lambda count: progress.advance(task, count),
        )
    console.print(
        f"{settings.out}: {reduced.manifest.embedding_dimension} dimensions in place of "
        f"{bundle.manifest.embedding_dimension}, with {reduced.variance_percent:.1f} % of the variance, "
        f"fitted to {reduced.images:,} images",
        soft_wrap=True,
    )
