"""`dino-train report`: a run's account of itself."""

from pathlib import Path

from pydantic_settings import BaseSettings, CliPositionalArg
from rich.console import Console

from training.commands.parsing import COMMAND
from training.report.writing import write_report


class ReportSettings(BaseSettings):
    """Write the report of a run, finished or not: one page that needs nothing else."""

    model_config = COMMAND

    run: CliPositionalArg[Path]
    """Folder of the run, runs/NAME."""
    out: Path | None = None
    """Where the page goes; report.html in the run's folder if not given."""


def report_command(settings: ReportSettings, console: Console) -> None:
    """Writes the page, and prints its name."""
    console.print(
        str(write_report(settings.run, settings.out)), markup=False, highlight=False, soft_wrap=True
    )
