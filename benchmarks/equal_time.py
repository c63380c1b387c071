"""The recipe `cpu` against the literal official one in the same time: `python -m benchmarks.equal_time`.

    official    benchmarks.official_recipe, in this process
    ours        `dino-train run --recipe cpu`, as a user starts it

The same data, untrained network, sizes of crops and batch; --minutes of wall clock each, one after the other.
Each is tried for a minute first, and gets as many steps as the time holds, so that its schedules end with it;
what is not done when the time is over is cut off. On the way teachers are put aside, and measured when the
clock has stopped: k-NN (k = 20) of all of val among all of train, by the code that measures runs, at the size
that `cpu` exports (96 px); the last ones also at the official ratio to the crops (shorter side 73, crop 64
px), of which the official one is given the better.

The official clock begins when the first batch is asked for, ours with the process: its imports, its look at
the images, its cache of decoded ones and its checkpoints count.

    python -m benchmarks.equal_time --minutes 60 [--only official | --only ours] [--out FOLDER]

Each half writes its part of benchmarks/equal_time.json and draws docs/pictures/equal-time.svg anew. Nothing
else may compute meanwhile.
"""

import argparse
import copy
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.official_recipe import OfficialRun, batches, new_backbone, train
from dino_core.backbones import Backbone
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing
from training.checkpoint import checkpoints_in, load_checkpoint
from training.config import EvaluationConfig, RunConfig
from training.data.opening import open_split
from training.evaluation.monitor import make_monitor
from training.export import teacher_model
from training.recipes.laptop import small_convolutional
from training.recipes.size import RunSize
from training.runlog import read_metrics

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).with_suffix(".json")
PICTURE = ROOT / "docs/pictures/equal-time.svg"
DATA = ROOT.parent / "shared/data/imagenette"
MOMENTS = 8  # teachers that are measured
TRIAL_S = 60.0
ENDLESS = 1_000_000
MARGIN = 0.98  # of the time: a schedule that is cut off is worse than one that ends a little early
EXPORTED, OFFICIAL = (96, 96), (73, 64)  # shorter side and crop in px; 73 = 64 * 256 / 224
BAR_POINTS = 5


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher that was put aside, and when."""

    step: int
    seconds: float
    backbone: Backbone


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What came of a run: when steps were done, by their numbers, and teachers."""

    seconds_at: Mapping[int, float]
    teachers: Sequence[Teacher]

    def steps_in(self, seconds: float) -> int:
        """How many steps a run of this length has time for, at the pace of this one."""
        (first, began_s), (last, ended_s) = min(self.seconds_at.items()), max(self.seconds_at.items())
        if last == first:
            raise SystemExit("the trial ended before its steps could be timed: give more --minutes")
        step_s = (ended_s - began_s) / (last - first)
        return max(MOMENTS, int(MARGIN * (seconds - (began_s - first * step_s)) / step_s))


def main() -> None:
    """Trains, measures, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, each")
    parser.add_argument("--only", choices=("official", "ours"), help="one half; what the other gave stays")
    parser.add_argument("--data", type=Path, default=DATA, help="Imagenette, with train/ and val/")
    parser.add_argument("--out", type=Path, help="a folder for JSON and picture, instead of the project's")
    asked = parser.parse_args()
    result_file, picture_file = RESULT, PICTURE
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        result_file, picture_file = asked.out / RESULT.name, asked.out / PICTURE.name
    results: dict[str, Any] = json.loads(result_file.read_text()) if result_file.exists() else {}
    for which, attempt in {"official": official, "ours": ours}.items():
        if asked.only not in (None, which):
            continue
        results[which] = half(attempt, asked.data, seconds=60 * asked.minutes)
        results |= {"verdict": verdict(results)}
        result_file.write_text(json.dumps(results, indent=1) + "\n")
        draw(results, picture_file)
    print(json.dumps(results["verdict"], indent=1))


def half(attempt: Callable[..., Attempt], data: Path, *, seconds: float) -> dict[str, Any]:
    """A trial, the run, and what its teachers are worth."""
    trial = attempt(data, steps=ENDLESS, seconds=min(TRIAL_S, seconds / 2))
    steps = trial.steps_in(seconds)
    run = attempt(data, steps=steps, seconds=seconds)
    step, taken_s = max(run.seconds_at.items())
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "n": "one run, seed 0",
        "minutes": seconds / 60,
        "steps_planned": steps,
        "steps_taken": step,
        "images_per_s": step * recipe().batch_size / taken_s,
        **measured(run.teachers, data),
    }


def recipe() -> RunConfig:
    """Of `cpu`; the official run takes the network, the sizes and the batch from it."""
    return small_convolutional(RunSize(num_images=9_469, device="cpu"))


def official(data: Path, *, steps: int, seconds: float) -> Attempt:
    """The official recipe, here."""
    config = recipe()
    backbone = new_backbone(config.backbone.name, image_size_px=config.backbone.image_size_px)
    run = OfficialRun(backbone, batch_size=config.batch_size, steps=steps)
    seconds_at: dict[int, float] = {}
    teachers: list[Teacher] = []

    def after_step(step: int, since_s: float) -> None:
        seconds_at[step] = since_s
        if step % max(1, steps // MOMENTS) == 0:
            teachers.append(Teacher(step=step, seconds=since_s, backbone=copy.deepcopy(run.teacher_backbone)))

    views = batches(
        data / "train",
        batch_size=config.batch_size,
        global_px=config.crops.global_px,
        local_px=config.crops.local_px,
    )
    with closing(views):
        train(run, views, seconds=seconds, after_step=after_step)
    step, since_s = max(seconds_at.items())
    if not teachers or teachers[-1].step != step:
        teachers.append(Teacher(step=step, seconds=since_s, backbone=run.teacher_backbone))
    return Attempt(seconds_at=seconds_at, teachers=teachers)


def ours(data: Path, *, steps: int, seconds: float) -> Attempt:
    """The recipe `cpu`, by the command; asked to stop when the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        settings: dict[str, object] = {
            "recipe": "cpu",
            "data": data,
            "run-dir": run_dir,
            "out": Path(folder) / "bundle",
            "steps": steps,
            "checkpoints.every-steps": max(1, steps // MOMENTS),
            "checkpoints.keep": MOMENTS + 2,
            "log-every-steps": 1 if steps == ENDLESS else max(1, steps // 100),  # by which it is timed
            # What is measured here need not be measured there.
            "evaluation.every-steps": steps,
            "evaluation.max-bank-images": 100,
            "evaluation.max-query-images": 100,
        }
        words = [f"--{name}={value}" for name, value in settings.items()]
        began_s = time.time()
        seconds_at = watched(["-m", "training", "run", *words], run_dir / "metrics.jsonl", seconds=seconds)
        teachers = []
        for path in reversed(checkpoints_in(run_dir / "checkpoints")):
            written_s = path.stat().st_mtime - began_s
            state, config = load_checkpoint(path, device=torch.device("cpu"))
            backbone = teacher_model(state, config).backbone
            teachers.append(Teacher(step=state.step, seconds=written_s, backbone=backbone))
    return Attempt(seconds_at=seconds_at, teachers=teachers)


def watched(words: Sequence[str], metrics: Path, *, seconds: float) -> dict[int, float]:
    """Runs Python until it ends or the time does, and looks when steps appear in the log."""
    began_s = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT)
    seconds_at: dict[int, float] = {}
    size, asked_to_stop = 0, False
    while process.poll() is None:
        time.sleep(0.1)
        since_s = time.perf_counter() - began_s
        if metrics.exists() and metrics.stat().st_size != size:
            size = metrics.stat().st_size
            for line in read_metrics(metrics):
                if line["kind"] == "step":
                    seconds_at.setdefault(line["step"], since_s)
        if since_s >= seconds and not asked_to_stop:
            process.terminate()
            asked_to_stop = True
    # Asked to stop, a run that trains ends with 130; one that writes its report is ended, and has trained.
    stopped = {130, -signal.SIGTERM} if asked_to_stop else set()
    if process.returncode not in {0, *stopped}:
        raise SystemExit(f"dino-train ended with status {process.returncode}: see above")
    if not seconds_at:
        raise SystemExit(f"dino-train took no step in {seconds:.0f} seconds: give more --minutes")
    return seconds_at


def measured(teachers: Sequence[Teacher], data: Path) -> dict[str, Any]:
    """What each teacher is worth, from the untrained network on; and the last one at the official ratio."""
    config = recipe()
    untrained = new_backbone(config.backbone.name, image_size_px=config.backbone.image_size_px)
    shown = [Teacher(step=0, seconds=0.0, backbone=untrained), *teachers]
    curve = [
        {"step": teacher.step, "minutes": round(teacher.seconds / 60, 2), "knn_percent": percent}
        for teacher, percent in zip(shown, knn(shown, data, EXPORTED), strict=True)
    ]
    return {"curve": curve, "last_at_official_ratio_percent": knn(shown[-1:], data, OFFICIAL)[0]}


def knn(teachers: Sequence[Teacher], data: Path, size_px: tuple[int, int]) -> list[float]:
    """Accuracy of each in %, with the shorter side and the crop that are given."""
    crops = recipe().crops
    preprocessing = Preprocessing(resize_px=size_px[0], crop_px=size_px[1], mean=crops.mean, std=crops.std)
    images, val_images = open_split(data)
    everything = EvaluationConfig(max_bank_images=len(images), max_query_images=len(images))
    monitor = make_monitor(images, val_images, preprocessing, everything)
    found = []
    for teacher in teachers:
        model = EmbeddingModel(teacher.backbone, preprocessing=preprocessing, pooling="mean")
        found.append(round(float(monitor.measure(model)["knn_percent"]), 2))
        print(
            f"step {teacher.step}, {teacher.seconds / 60:.1f} minutes, {size_px}: {found[-1]} %", flush=True
        )
    return found


def verdict(results: Mapping[str, Any]) -> dict[str, Any]:
    """Our last teacher at the size that it is exported for, against the official one at its better size."""
    if "official" not in results or "ours" not in results:
        return {"missing": "the other half"}
    if results["official"]["minutes"] != results["ours"]["minutes"]:
        return {"missing": "two halves of the same minutes"}
    their_end = results["official"]["curve"][-1]["knn_percent"]
    theirs = max(their_end, results["official"]["last_at_official_ratio_percent"])
    our_end = results["ours"]["curve"][-1]["knn_percent"]
    return {
        "ours_percent": our_end,
        "official_percent": theirs,
        "points_ahead": round(our_end - theirs, 2),
        "points_asked": BAR_POINTS,
    }


def draw(results: Mapping[str, Any], path: Path) -> None:
    """The curves of both as an SVG."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for which, name, colour in (("ours", "recipe cpu", "#0969da"), ("official", "official", "#cf222e")):
        if which in results:
            curve = results[which]["curve"]
            percent = [point["knn_percent"] for point in curve]
            label = f"{name}: {percent[-1]:.1f} % after {curve[-1]['step']:,} steps"
            axes.plot([point["minutes"] for point in curve], percent, "-o", color=colour, label=label)
    axes.set_xlabel("minutes of training on two cores")
    axes.set_ylabel("k-NN (k = 20) of the teacher, in %")
    axes.set_title("Imagenette's val, ResNet-10-T, crops of 64 and 32 px", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.8)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    with mpl.rc_context({"svg.hashsalt": path.name}):  # the same names in the file each time
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
