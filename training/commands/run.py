"""`dino-train run`: the whole self-distillation."""

import os

from rich.console import Console

from training.distributed import World
from training.loop import run
from training.report.preview import preview_of
from training.rundir import own_run_directory, read_plan
from training.settings import RunSettings, refuse_changes_on_resume, refuse_unknown_environment


def run_command(settings: RunSettings) -> int:
    """Trains; the exit status is 130 for a run that was asked to stop."""
    refuse_unknown_environment(os.environ)
    plan = settings.plan()
    if settings.resume:
        refuse_changes_on_resume(read_plan(settings.run_dir).config, plan.config)
    if settings.preview:
        with own_run_directory(settings.run_dir, plan, resume=settings.resume, world=World()) as directory:
            console = Console()
            console.print(
                str(preview_of(plan, directory.path)), markup=False, highlight=False, soft_wrap=True
            )
        return 0
    bundle = run(plan, settings.run_dir, resume=settings.resume, console=Console(stderr=True))
    return 0 if bundle is not None else 130
