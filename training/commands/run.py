"""`dino-train run`: the whole self-distillation, or what it would take."""

import os
import shutil
from pathlib import Path

from rich.console import Console

from training.commands.recipes import print_reasons
from training.data.opening import open_split
from training.distributed import World, is_first_process
from training.errors import ConfigError
from training.loop import device_of, run
from training.report.preview import preview_of
from training.rundir import RunPlan, own_run_directory, read_plan
from training.settings import RunSettings, refuse_changes_on_resume, refuse_unknown_environment
from training.sizing import Sizes, sizes_of


def run_command(settings: RunSettings) -> int:
    """Trains; the exit status is 130 for a run that was asked to stop."""
    refuse_unknown_environment(os.environ)
    plan = settings.plan()
    if settings.plan_only:
        if settings.resume:
            raise ConfigError("--plan is for a run that has not begun: leave out --resume, or --plan")
        print_plan(plan, settings.run_dir, Console())
        return 0
    if settings.resume:
        refuse_changes_on_resume(read_plan(settings.run_dir).config, plan.config)
    if settings.preview:
        with own_run_directory(settings.run_dir, plan, resume=settings.resume, world=World()) as directory:
            path = preview_of(plan, directory.path)
            Console().print(str(path), markup=False, highlight=False, soft_wrap=True)
        return 0
    console = Console(stderr=True)
    if not settings.resume and is_first_process():
        print_reasons(plan.reasons, console)
    bundle = run(plan, settings.run_dir, resume=settings.resume, console=console)
    return 0 if bundle is not None else 130


def print_plan(plan: RunPlan, run_dir: Path, console: Console) -> None:
    """Measures a few steps, and prints what the whole run takes; writes nothing."""
    config = plan.config
    images, _ = open_split(plan.data, plan.val_data)
    sizes = sizes_of(config, images)
    passes = config.steps * config.batch_size / len(images)
    lines = (
        f"{config.recipe} on {images.origin}: {config.backbone.name}, {len(images):,} images, "
        f"{device_of(config)}",
        f"steps   {config.steps:,} of {config.batch_size:,} images, {passes:,.1f} passes over the images",
        f"time    {_span(*sizes.seconds)}: {_step(sizes, config.batch_size)}",
        f"memory  {_size(sizes.memory_bytes)} at its peak; {_size(sizes.free_bytes)} are free",
        f"disk    {_size(sizes.cache_bytes)} of decoded images, {sizes.checkpoints} checkpoints of "
        f"{_size(sizes.checkpoint_bytes)}; {_size(_free_disk_bytes(run_dir))} are free",
        "nothing was written; settings that follow from the data and the machine:",
    )
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    print_reasons(plan.reasons, console)


def _step(sizes: Sizes, batch_size: int) -> str:
    steps = "one was" if sizes.measured_steps == 1 else f"{sizes.measured_steps} were"
    scaled = (
        "" if sizes.measured_images == batch_size else f" with {sizes.measured_images} images, and scaled"
    )
    return f"{sizes.step_s:.2g} s a step ({steps} measured{scaled})"


def _span(low_s: float, high_s: float) -> str:
    """A range of durations, in the unit in which its end is read most easily."""
    for unit_s, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if high_s >= 2 * unit_s:
            return f"{low_s / unit_s:.1f} to {high_s / unit_s:.1f} {unit}"
    return f"{low_s:.0f} to {high_s:.0f} seconds"


def _size(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.1f} GB" if count_bytes >= 1e9 else f"{count_bytes / 1e6:.0f} MB"


def _free_disk_bytes(path: Path) -> int:
    """Room on the disk on which a folder will be made."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
