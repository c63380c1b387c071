"""Whole runs: from pictures to a bundle, stopped, killed, resumed, with broken files and sick gradients."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from dino_core.bundle import load_bundle
from dino_core.errors import CollapseError
from tests.training.conftest import MakeConfig, MakeFolder
from training.checkpoint import checkpoints_in
from training.config import RunConfig
from training.errors import ConfigError, DataError
from training.loop import choose_device, run, stop_requests
from training.rundir import RunPlan
from training.runlog import read_metrics
from training.step import train_step

ROOT = Path(__file__).parents[2]


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


def plan_of(data: Path, config: RunConfig, out: Path) -> RunPlan:
    return RunPlan(data=data, val_data=None, out=out, config=config)


def losses_of(run_dir: Path) -> list[tuple[int, float]]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [(line["step"], line["loss_nats"]) for line in lines if line["kind"] == "step"]


SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from training.config import RunConfig
from training.loop import run
from training.rundir import RunPlan

config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
plan = RunPlan(data=Path(sys.argv[2]), val_data=None, out=Path(sys.argv[3]), config=config)
run(plan, Path(sys.argv[4]), resume=sys.argv[5] == "resume", console=Console(stderr=True))
"""


def start(
    folder: Path, name: str, how: str, config: RunConfig, data: Path, *, stderr: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """A run in a process of its own."""
    (folder / f"{name}.json").write_text(config.model_dump_json())
    words = [folder / f"{name}.json", data, folder / f"out-{name}", folder / f"run-{name}", how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, words)], env=environment, stderr=stderr)


def wait_for_steps(process: subprocess.Popen[bytes], run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(losses_of(run_dir)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


def test_a_run_ends_with_a_bundle_a_log_and_how_to_serve_it(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    out, run_dir = tmp_path / "models" / "stripes", tmp_path / "run"
    plan = plan_of(make_folder(corrupt=2), make_config(), out)
    assert run(plan, run_dir, resume=False, console=console) == out

    bundle = load_bundle(out)
    assert bundle.manifest.id == "stripes"
    assert bundle.manifest.provenance["recipe"] == "tiny"
    assert [step for step, _ in losses_of(run_dir)] == [1, 2, 3, 4, 5, 6]
    evaluations = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "evaluation"]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    assert all(line["knn_kind"] == "seen" for line in evaluations)
    assert sorted(json.loads((run_dir / "skipped.json").read_text())) == [
        "across/broken-0.jpg",
        "across/broken-1.jpg",
    ]
    said = console.export_text()
    assert f"serve it: dino-serve run --model {out}" in said
    assert "2 files could not be read" in said
    card = (out / "README.md").read_text()
    assert "k-NN accuracy" in card
    assert "untrained" in card
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_bundle_is_the_teachers_backbone(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    run(
        plan_of(make_folder(), make_config(), tmp_path / "out"),
        tmp_path / "run",
        resume=False,
        console=console,
    )
    checkpoint = load_file(checkpoints_in(tmp_path / "run" / "checkpoints")[0] / "state.safetensors")
    bundle = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "teacher.backbone.network."
    assert {name.removeprefix(prefix) for name in checkpoint if name.startswith(prefix)} == set(bundle)
    assert all(torch.equal(tensor, checkpoint[prefix + name]) for name, tensor in bundle.items())


def test_a_finished_run_says_so_and_does_nothing(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    plan = plan_of(make_folder(), make_config(), tmp_path / "out")
    run(plan, tmp_path / "run", resume=False, console=console)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert run(plan, tmp_path / "run", resume=True, console=console) == tmp_path / "out"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "this run is finished" in console.export_text()


@pytest.mark.parametrize("at_step", [1, 3, 4])
def test_a_run_that_is_asked_to_stop_goes_on_bit_for_bit(
    make_config: MakeConfig,
    make_folder: MakeFolder,
    tmp_path: Path,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
    at_step: int,
) -> None:
    data, config = make_folder(corrupt=1), make_config()
    whole = run(plan_of(data, config, tmp_path / "whole"), tmp_path / "run-1", resume=False, console=console)

    def and_ask(state: Any, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - passed through
        metrics = train_step(state, *arguments, **named)
        if state.step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    plan = plan_of(data, config, tmp_path / "stopped")
    with monkeypatch.context() as patched:
        patched.setattr("training.loop.train_step", and_ask)
        assert run(plan, tmp_path / "run-2", resume=False, console=console) is None
    assert f"go on with: dino-train run --resume --run-dir {tmp_path / 'run-2'}" in console.export_text()
    resumed = run(plan, tmp_path / "run-2", resume=True, console=console)
    assert whole is not None
    assert resumed is not None
    assert losses_of(tmp_path / "run-2") == losses_of(tmp_path / "run-1")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_bit_for_bit(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    # BatchNorm, SGD, accumulation, two decoding threads and the cache: what the other test leaves out.
    config = make_config(
        steps=12,
        batch_size=4,
        accumulation_steps=2,
        backbone={"name": "test_resnet", "image_size_px": 32, "model_kwargs": {}},
        head={"batch_norm": True},
        crops={"global_px": 32, "local_px": 16},
        optimizer={"name": "sgd"},
        loading={"workers": 2, "cache": "disk", "canvas_px": 40},
        checkpoints={"every_steps": 3},
        evaluation={"every_steps": 100},
    )
    data = make_folder(corrupt=1)
    assert start(tmp_path, "whole", "new", config, data).wait(timeout=120) == 0
    killed = start(tmp_path, "killed", "new", config, data)
    wait_for_steps(killed, tmp_path / "run-killed", 5)
    killed.kill()
    killed.wait()
    steps_before = len(losses_of(tmp_path / "run-killed"))
    assert 5 <= steps_before < 12, "the run must die in its middle"
    assert start(tmp_path, "killed", "resume", config, data).wait(timeout=120) == 0

    assert losses_of(tmp_path / "run-killed") == losses_of(tmp_path / "run-whole")
    one, two = (tmp_path / f"out-{name}" / "model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == two.read_bytes()


def test_a_split_folder_is_measured_on_val(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    make_folder("split/train")
    make_folder("split/val", per_class=2, seed=1)
    run(
        plan_of(tmp_path / "split", make_config(), tmp_path / "out"),
        tmp_path / "run",
        resume=False,
        console=console,
    )
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert (last["knn_kind"], last["knn_queries"], last["knn_bank"]) == ("val", 4, 12)


def test_a_flat_folder_trains_without_labels(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    out = run(
        plan_of(make_folder(flat=True), make_config(), tmp_path / "out"),
        tmp_path / "run",
        resume=False,
        console=console,
    )
    assert out is not None
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["kind"] == "evaluation"
    assert "knn_percent" not in last
    assert "rank_me" in last


def test_one_image_is_refused(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    data = make_folder(flat=True, per_class=1)
    (data / "down-0.png").unlink()
    with pytest.raises(DataError, match="holds one image"):
        run(
            plan_of(data, make_config(batch_size=1), tmp_path / "out"),
            tmp_path / "run",
            resume=False,
            console=console,
        )


def test_a_bundle_that_is_there_is_not_overwritten_and_costs_no_training(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        run(
            plan_of(make_folder(), make_config(), tmp_path / "out"),
            tmp_path / "run",
            resume=False,
            console=console,
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_gradients_that_stay_bad_stop_the_run_with_advice(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    config = make_config(
        steps=50,
        optimizer={"peak_lr": 1e30, "clip": "none", "warmup_steps": 0},
        guard={"max_nonfinite_steps": 3},
    )
    with pytest.raises(CollapseError, match="NaN or infinite.*--optimizer.peak-lr"):
        run(plan_of(make_folder(), config, tmp_path / "out"), tmp_path / "run", resume=False, console=console)


def test_a_collapsed_run_stops_or_only_warns(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    # Pictures without any difference: the teacher cannot but answer all of them alike.
    data = make_folder(flat=True)
    for path in data.iterdir():
        path.write_bytes((data / "across-0.png").read_bytes())
    changes: dict[str, Any] = {
        "crops": {"jitter_probability": 0, "grey_probability": 0, "blur_probability": [0, 0, 0]}
        | {"solarise_probability": [0, 0, 0], "global_area": [1, 1]},
        "head": {"num_prototypes": 8},
    }
    config = make_config(**changes, guard={"patience_steps": 2, "stop": False})
    run(plan_of(data, config, tmp_path / "warned"), tmp_path / "run-1", resume=False, console=console)
    assert "the same" in console.export_text()
    config = make_config(**changes, guard={"patience_steps": 2})
    with pytest.raises(CollapseError, match="Checkpoints are in"):
        run(plan_of(data, config, tmp_path / "stopped"), tmp_path / "run-2", resume=False, console=console)


def test_images_of_one_colour_stop_the_run_with_advice(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path, console: Console
) -> None:
    data = make_folder()
    for path in data.rglob("*.png"):
        Image.new("RGB", (24, 26), (9, 9, 9)).save(path)
    plan = plan_of(data, make_config(steps=30), tmp_path / "out")
    with pytest.raises(CollapseError, match="step 19: every image of 20 batches .*--loading.cache off"):
        run(plan, tmp_path / "run", resume=False, console=console)
    assert [line["event"] for line in read_metrics(tmp_path / "run/metrics.jsonl") if "event" in line] == [
        "sickness"
    ]


def test_a_disk_that_hangs_ends_the_process_in_a_sentence(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    # A real process, as it is its end that would hang: Python waits for threads of concurrent.futures.
    config = make_config(steps=400, loading={"workers": 2}, guard={"max_data_wait_s": 2.0})
    data = make_folder()
    process = start(tmp_path, "hung", "new", config, data, stderr=subprocess.PIPE)
    wait_for_steps(process, tmp_path / "run-hung", 3)
    for path in data.rglob("*.png"):
        path.unlink()
        os.mkfifo(path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert b"NoImagesCome: no images have come from" in said
    assert b"--guard.max-data-wait-s" in said
    events = [line for line in read_metrics(tmp_path / "run-hung/metrics.jsonl") if line["kind"] == "event"]
    assert [event["event"] for event in events] == ["sickness"]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="PyTorch sees none: use --device auto"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_the_first_ctrl_c_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
