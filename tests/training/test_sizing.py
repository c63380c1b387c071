"""What a run takes: computed where it can be, measured where not; and nothing is left behind."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.conftest import MakeConfig, MakeFolder
from training import sizing
from training.cli import main
from training.data.folder import find_images
from training.errors import ConfigError, DataError
from training.sizing import fitting_batch, largest_that_fits, sizes_of


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: two threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(data: Path, tmp_path: Path, *more: str) -> list[str]:
    out, run_dir = tmp_path / "models/one", tmp_path / "runs/one"
    common = ["--data", str(data), "--recipe", "smoke", "--device", "cpu", "--steps", "3"]
    return ["run", *common, "--out", str(out), "--run-dir", str(run_dir), *more]


@given(limit=st.integers(0, 5000), start=st.integers(1, 64), most=st.integers(1, 4096))
def test_the_largest_that_fits_fits_and_little_more_would(limit: int, start: int, most: int) -> None:
    tried: list[int] = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= limit

    found = largest_that_fits(fits, start=start, most=most)
    assert found <= min(limit, most)
    assert found >= min(limit, most) * 2 // 3 - 8
    assert found >= min(limit, most, 1)
    assert len(tried) <= 15
    assert found <= 8 or found % 8 == 0


def test_a_plan_says_what_the_run_then_takes_and_writes_nothing(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(per_class=10)
    ask = ["--batch-size", "5", "--loading.cache", "disk", "--checkpoints.every-steps", "2"]
    assert main(words(data, tmp_path, "--plan", *ask)) == 0
    said = capsys.readouterr().out
    assert "steps   3 of 5 images, 0.8 passes over the images" in said
    assert re.search(r"time    [\d.]+ to [\d.]+ \w+: \S+ s a step \((one was|\d were) measured\)", said)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]

    planned = re.search(r"3 checkpoints of (\d+) MB", said)
    assert planned is not None
    assert main(words(data, tmp_path, *ask)) == 0
    checkpoints = list((tmp_path / "runs/one/checkpoints").glob("*/state.safetensors"))
    assert int(planned[1]) == pytest.approx(checkpoints[0].stat().st_size / 1e6, abs=1)
    assert len(checkpoints) == 2  # and a third while it is written


def test_bytes_on_disk_are_those_that_a_run_writes(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    images = find_images(make_folder(per_class=5))
    sizes = sizes_of(make_config(loading={"cache": "disk"}), images)
    assert sizes.cache_bytes == 10 * 3 * 20 * 20
    assert sizes.checkpoints == 3
    low, high = sizes.seconds
    assert 0 < low < high
    assert sizes.memory_bytes > sizes.checkpoint_bytes > 0
    assert sizes_of(make_config(loading={"cache": "off"}), images).cache_bytes == 0


def test_a_run_of_one_step_is_planned_too(make_config: MakeConfig, make_folder: MakeFolder) -> None:
    config = make_config(
        steps=1,
        loss={"teacher_temperature_warmup_steps": 0},
        optimizer={"warmup_steps": 0},
        checkpoints={"every_steps": 1000},
    )
    sizes = sizes_of(config, find_images(make_folder()))
    assert (sizes.measured_steps, sizes.checkpoints) == (1, 2)


def test_measuring_leaves_the_streams_of_chance_alone(
    make_config: MakeConfig, make_folder: MakeFolder
) -> None:
    before = torch.random.get_rng_state()
    sizes_of(make_config(), find_images(make_folder()))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_large_batch_on_a_cpu_is_measured_with_fewer_images(
    make_config: MakeConfig, make_folder: MakeFolder
) -> None:
    images = find_images(make_folder(per_class=40))
    small, large = (sizes_of(make_config(batch_size=size), images) for size in (32, 64))
    assert (small.measured_images, large.measured_images) == (32, 32)
    assert large.memory_bytes > 0


def test_images_that_cannot_be_read_are_passed_over(make_config: MakeConfig, make_folder: MakeFolder) -> None:
    assert sizes_of(make_config(), find_images(make_folder(corrupt=3))).measured_steps
    broken = make_folder("broken", per_class=1, corrupt=2)
    for picture in broken.rglob("*.png"):
        picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of the first images"):
        sizes_of(make_config(), find_images(broken))


def test_auto_is_a_tenth_of_few_images_and_the_recipe_follows_it(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(per_class=20)
    assert main(words(data, tmp_path, "--batch-size", "auto")) == 0
    assert "batch_size = 4: a tenth of the 40 images" in capsys.readouterr().err
    saved = json.loads((tmp_path / "runs/one/config.json").read_text())
    assert saved["config"]["batch_size"] == 4
    assert saved["reasons"]["batch_size"].startswith("4: a tenth")
    (tmp_path / "runs/one/result.json").unlink()
    (tmp_path / "models/one").rename(tmp_path / "models/old")
    again = words(data, tmp_path, "--batch-size", "auto", "--resume")
    assert main(again) == 0, "the resumed run keeps the number that was found"


def test_auto_keeps_enough_updates_where_a_larger_batch_makes_fewer(
    make_config: MakeConfig, make_folder: MakeFolder
) -> None:
    images = find_images(make_folder(per_class=40))
    config = make_config(steps=1000, batch_size=4)
    assert fitting_batch(config, images, steps_are_given=False)[0] == 4
    assert fitting_batch(config, images, steps_are_given=True) == (
        8,
        "8: a tenth of the 80 images; more memory would take more",
    )


def test_auto_stops_at_the_memory_that_is_free(
    make_config: MakeConfig, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = find_images(make_folder(per_class=200))
    config = make_config(crops={"global_px": 64, "local_px": 32})
    monkeypatch.setattr(sizing, "free_memory_bytes", lambda: 4 * 10**10)
    assert fitting_batch(config, images, steps_are_given=True)[0] == 40
    monkeypatch.setattr(sizing, "free_memory_bytes", lambda: 10**6)
    with pytest.raises(ConfigError, match="not even two images fit"):
        fitting_batch(config, images, steps_are_given=True)


@pytest.mark.parametrize("world", ["2", "8"])
def test_auto_is_refused_to_several_processes(
    make_config: MakeConfig, make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match="what one process computes at once"):
        fitting_batch(make_config(), find_images(make_folder()), steps_are_given=True)


def test_a_plan_of_a_run_that_goes_on_is_refused(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder()
    assert main(words(data, tmp_path, "--batch-size", "4")) == 0
    assert main(words(data, tmp_path, "--batch-size", "4", "--resume", "--plan")) == 2
    assert "--plan is for a run that has not begun" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_auto_finds_on_a_gpu_trains(make_config: MakeConfig, make_folder: MakeFolder) -> None:
    images = find_images(make_folder(per_class=200))
    found, _ = fitting_batch(make_config(device="cuda"), images, steps_are_given=True)
    sizes = sizes_of(make_config(device="cuda", batch_size=found), images)
    assert sizes.memory_bytes < sizes.free_bytes
