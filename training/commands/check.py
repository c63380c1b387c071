"""`dino-train check`: what is wrong with the images, before a run."""

import json
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from training.commands.parsing import COMMAND
from training.data.addresses import Where
from training.data.checking import DataReport, check_images
from training.data.opening import open_split
from training.errors import ConfigError

_NAMED = 3  # of each finding, on the screen; the JSON names all


class CheckSettings(BaseSettings):
    """Look for images that cannot be read, are there twice, are too small or have other channels.

    Ends with status 1 if there are any.
    """

    model_config = COMMAND

    data: Where
    """Anything that `dino-train run --data` takes."""
    val_data: Where | None = None
    """Images to measure with; copies of training images among them are found too."""
    sample: int = Field(default=2000, ge=1)
    """How many images to look at, the same ones each time."""
    whole: bool = False
    """Look at all of them."""
    crop_px: int = Field(default=224, ge=1)
    """Images with a side below it are named: a global crop would be blown up."""
    in_channels: int | None = Field(default=None, ge=1)
    """Channels that the network takes of images that are no RGB pictures; as most have if not given."""
    json_file: Path | None = None
    """Where to write every name that was found."""
    workers: int | None = Field(default=None, ge=1)
    """Threads; two for each core if not given."""


def check_command(settings: CheckSettings, console: Console) -> int:
    """Looks at the images, prints a table, and says by the exit status whether anything was found."""
    train, val = open_split(settings.data, settings.val_data)
    parts = [("", train)] if val is None else [("train/", train), ("val/", val)]
    total = sum(len(images) for _, images in parts)
    sample = None if settings.whole or settings.sample >= total else settings.sample
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("looking at images", total=sample or total)
        report = check_images(
            parts,
            crop_px=settings.crop_px,
            sample=sample,
            channels=settings.in_channels,
            workers=settings.workers,
            on_progress=lambda count: progress.advance(task, count),
        )
    if settings.json_file is not None:
        try:
            settings.json_file.write_text(json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{settings.json_file} cannot be written: {error.strerror}") from error
    console.print(_table(report, crop_px=settings.crop_px))
    whole = "" if report.looked_at >= report.images else ": --whole looks at all of them"
    console.print(
        f"looked at {report.looked_at:,} of {report.images:,} images{whole}", highlight=False, soft_wrap=True
    )
    return 0 if report.is_clean else 1


def _table(report: DataReport, *, crop_px: int) -> Table:
    table = Table("finding", "images", "such as", box=None, pad_edge=False)
    unreadable = [f"{name}: {reason}" for name, reason in report.unreadable.items()]
    twice = [" = ".join(group[:3]) for group in report.duplicates]
    small = [f"{name}: {width} x {height}" for name, (width, height) in report.small.items()]
    copies = sum(len(group) - 1 for group in report.duplicates)
    rows = [("cannot be read", len(unreadable), unreadable), ("are copies of others", copies, twice)]
    rows.append((f"have a side below {crop_px} px", len(small), small))
    for finding, count, examples in rows:
        table.add_row(finding, f"{count:,}", _words(examples))
    for channels, count in sorted(report.channels.items(), key=lambda pair: -pair[1]):
        odd = [name for name, found in report.odd_channels.items() if found == channels]
        table.add_row(f"have {channels} channel{'s' * (channels != 1)}", f"{count:,}", _words(odd))
    return table


def _words(examples: list[str]) -> str:
    more = f", and {len(examples) - _NAMED:,} more" if len(examples) > _NAMED else ""
    # Names may hold what rich would take for mark-up.
    return ("; ".join(examples[:_NAMED]) + more).replace("[", "\\[")
