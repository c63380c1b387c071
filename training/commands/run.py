"""`dino-train run`: the whole self-distillation."""

import os

from rich.console import Console

from training.commands.recipes import print_reasons
from training.loop import run
from training.rundir import read_plan
from training.settings import RunSettings, refuse_changes_on_resume, refuse_unknown_environment


def run_command(settings: RunSettings) -> int:
    """Trains; the exit status is 130 for a run that was asked to stop."""
    refuse_unknown_environment(os.environ)
    plan = settings.plan()
    if settings.resume:
        refuse_changes_on_resume(read_plan(settings.run_dir).config, plan.config)
    console = Console(stderr=True)
    if not settings.resume:
        print_reasons(plan.reasons, console)
    bundle = run(plan, settings.run_dir, resume=settings.resume, console=console)
    return 0 if bundle is not None else 130
