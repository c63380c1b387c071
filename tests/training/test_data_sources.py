"""Every source of images by the real command line: it trains, goes on, and says what is wrong."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dino_core.bundle import read_manifest
from tests.training.conftest import MakeFolder
from tests.training.data.test_tables import hub_table, png, save_to_disk
from tests.training.test_cli import run_words
from training.cli import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))


def train(tmp_path: Path, data: Path | str, *more: str, name: str = "one") -> int:
    return main([*run_words(data, tmp_path, name), *more])


def weights_of(tmp_path: Path, name: str) -> bytes:
    return (tmp_path / "models" / name / "model.safetensors").read_bytes()


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err.splitlines()
    (sentence,) = [line for line in said if line.startswith("dino-train: error: ")]
    return sentence


def pack(path: Path, files: Sequence[Path]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(files):
            content = file.read_bytes()
            info = tarfile.TarInfo(f"{number:03}{file.suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def in_memory(files: Sequence[Path], tmp_path: Path) -> str:
    for number in range(2):
        packed = pack(tmp_path / f"{number}.tar", files[number::2])
        fsspec.filesystem("memory").pipe_file(f"/resumes/{number}.tar", packed.read_bytes())
    return "memory://resumes/{0..1}.tar"


def in_rows(files: Sequence[Path]) -> pa.Table:
    return pa.table({"image": [{"bytes": file.read_bytes(), "path": None} for file in files]})


def in_parquet(files: Sequence[Path], tmp_path: Path) -> Path:
    pq.write_table(in_rows(files), tmp_path / "rows.parquet", row_group_size=5)
    return tmp_path / "rows.parquet"


def in_arrow(files: Sequence[Path], tmp_path: Path) -> Path:
    return save_to_disk(tmp_path / "saved", in_rows(files))


@pytest.mark.parametrize("packed", [in_memory, in_parquet, in_arrow])
def test_a_run_stops_and_goes_on_bit_for_bit(
    make_folder: MakeFolder, tmp_path: Path, packed: Callable[[Sequence[Path], Path], Path | str]
) -> None:
    data = packed(sorted(make_folder().rglob("*.png")), tmp_path)
    assert train(tmp_path, data, "--steps", "4", "--checkpoints.every-steps", "2", name="whole") == 0
    assert train(tmp_path, data, "--steps", "4", "--checkpoints.every-steps", "2", name="cut") == 0
    run_dir = tmp_path / "runs" / "cut"
    (tmp_path / "models" / "cut").rename(tmp_path / "models" / "taken")
    (run_dir / "result.json").unlink()
    last = sorted((run_dir / "checkpoints").iterdir())[-1]
    last.rename(tmp_path / "last")
    assert main(["run", "--resume", "--run-dir", str(run_dir)]) == 0
    assert weights_of(tmp_path, "cut") == weights_of(tmp_path, "whole")


def test_a_run_does_not_go_on_with_other_data(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder()
    assert train(tmp_path, folder) == 0
    run_dir = tmp_path / "runs" / "one"
    (run_dir / "result.json").unlink()
    (tmp_path / "models" / "one").rename(tmp_path / "models" / "taken")
    next(folder.rglob("*.png")).unlink()
    assert main(["run", "--resume", "--run-dir", str(run_dir)]) == 2
    assert "had 12 images and has 11 now: put it back as it was" in complaint(capsys)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        pytest.param("s3://bucket/{0..3}.tar", "pip install 's3fs'", id="no package"),
        pytest.param("nothing://x.tar", "there is no protocol nothing://", id="no protocol"),
        pytest.param("memory://gone/{0..3}.tar", "memory://gone/0.tar is not there", id="no shard"),
        pytest.param("memory://empty/", "no file fits memory://empty/", id="empty folder"),
    ],
)
def test_an_address_that_gives_nothing_is_refused_in_one_sentence(
    data: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").makedirs("/empty", exist_ok=True)
    assert train(tmp_path, data) == 2
    assert sentence in complaint(capsys)


def test_a_shard_that_shrank_is_named(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = pack(tmp_path / "birds.tar", sorted(make_folder().rglob("*.png")))
    shard.write_bytes(shard.read_bytes()[:9000])
    assert train(tmp_path, shard) == 2
    assert f"{shard} cannot be read as a tar file (unexpected end of data)" in complaint(capsys)


@pytest.mark.parametrize(
    ("table", "behind", "sentence"),
    [
        pytest.param(hub_table([], [], ["owl"]), "", "birds.parquet has no rows", id="empty"),
        pytest.param(
            hub_table([1], [0], ["owl"]), "#label=lable", "no column lable: did you mean label?", id="column"
        ),
        pytest.param(
            pa.table({"text": ["a"]}),
            "",
            "has no column of images (bytes, or structs of bytes",
            id="no image",
        ),
    ],
)
def test_a_table_that_gives_nothing_is_refused_in_one_sentence(
    table: pa.Table, behind: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(table, tmp_path / "birds.parquet")
    assert train(tmp_path, f"{tmp_path}/birds.parquet{behind}") == 2
    assert sentence in complaint(capsys)


def test_a_corrupt_row_is_passed_over_by_name(tmp_path: Path) -> None:
    content = [png(level) for level in range(0, 60, 5)]
    content[7] = content[7][:40]
    pq.write_table(pa.table({"image": content}), tmp_path / "birds.parquet")
    assert train(tmp_path, tmp_path / "birds.parquet", "--crops.local-px", "16") == 0
    skipped = json.loads((tmp_path / "runs" / "one" / "skipped.json").read_text())
    assert list(skipped) == ["birds.parquet/7"]


def make_arrays(folder: Path, *, count: int = 12, channels: int = 5, dtype: type = np.uint16) -> Path:
    """Patterns in a few of 65,536 levels, each channel in another range."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        levels = noise.integers(0, 400, (26, 24, channels)) + 1000 * np.arange(channels)
        levels[:: 2 + number % 3] += 300
        np.save(folder / f"{number:03}.npy", levels.astype(dtype))
    return folder


def test_five_channels_of_sixteen_bits_train_go_on_and_are_measured_by_their_bundle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_arrays(tmp_path / "arrays")
    words = ["--backbone.in-channels", "5", "--steps", "4", "--checkpoints.every-steps", "2"]
    assert train(tmp_path, data, *words, name="whole") == 0
    said = capsys.readouterr().err
    assert "images of 5 channels, scaled to 8 bits from 0 to 69" in said
    assert "colour jitter and grey are left out" in said
    assert f"measure it: dino-train eval {tmp_path / 'models' / 'whole'}" in said
    assert "5 channels, scaled to 8 bits" in (tmp_path / "models" / "whole" / "README.md").read_text()
    manifest = read_manifest(tmp_path / "models" / "whole")
    planes = manifest.preprocessing.planes
    assert planes is not None
    assert planes.channels == 5
    assert [low // 1000 for low in planes.low] == [0, 1, 2, 3, 4]
    saved = json.loads((tmp_path / "runs" / "whole" / "config.json").read_text())["config"]
    assert saved["loading"]["scale_low"] == list(planes.low)
    assert len(saved["crops"]["mean"]) == 5

    assert train(tmp_path, data, *words, "--loading.cache", "memory", name="cut") == 0
    assert weights_of(tmp_path, "cut") == weights_of(tmp_path, "whole"), "the cache changes nothing"
    run_dir = tmp_path / "runs" / "cut"
    (tmp_path / "models" / "cut").rename(tmp_path / "models" / "taken")
    (run_dir / "result.json").unlink()
    sorted((run_dir / "checkpoints").iterdir())[-1].rename(tmp_path / "last")
    assert main(["run", "--resume", "--run-dir", str(run_dir)]) == 0
    assert weights_of(tmp_path, "cut") == weights_of(tmp_path, "whole")

    out = tmp_path / "report.json"
    bundle = str(tmp_path / "models" / "whole")
    assert main(["eval", bundle, "--data", str(data), "--json-file", str(out)]) == 0
    measured, untrained = json.loads(out.read_text())["models"]
    assert measured["images"] == untrained["images"] == 12


def test_images_of_other_channels_than_the_network_are_refused_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_arrays(tmp_path / "arrays")
    assert train(tmp_path, data) == 2
    assert "have 5 channels and the network takes 3: give --backbone.in-channels 5" in complaint(capsys)
    assert train(tmp_path, data, "--backbone.in-channels", "7") == 2
    assert "have 5 channels and the network takes 7: give --backbone.in-channels 5" in complaint(capsys)


def test_sixteen_bit_grey_and_pages_of_tiff_train(tmp_path: Path) -> None:
    arrays = make_arrays(tmp_path / "arrays", channels=2)
    for kind in ("grey", "pages"):
        (tmp_path / kind).mkdir()
    for file in sorted(arrays.iterdir()):
        first, second = (
            Image.fromarray(np.ascontiguousarray(plane)) for plane in np.load(file).transpose(2, 0, 1)
        )
        first.save(tmp_path / "grey" / f"{file.stem}.png")
        first.save(tmp_path / "pages" / f"{file.stem}.tif", save_all=True, append_images=[second])
    for kind, channels in (("grey", 1), ("pages", 2)):
        words = ["--backbone.in-channels", str(channels)]
        assert train(tmp_path, tmp_path / kind, *words, name=kind) == 0
        assert json.loads((tmp_path / "runs" / kind / "skipped.json").read_text()) == {}
    assert train(tmp_path, arrays, "--backbone.in-channels", "2", name="arrays") == 0
    assert weights_of(tmp_path, "arrays") == weights_of(tmp_path, "pages"), "the same values, however stored"


def test_rgb_weights_are_made_to_fit_other_channels(make_folder: MakeFolder, tmp_path: Path) -> None:
    assert train(tmp_path, make_folder(), name="rgb") == 0
    words = ["--backbone.weights", str(tmp_path / "models" / "rgb"), "--backbone.in-channels", "5"]
    words += ["--backbone.name", "test_resnet", "--optimizer.peak-lr", "1e-12", "--optimizer.end-lr", "0"]
    assert train(tmp_path, make_arrays(tmp_path / "arrays"), *words, name="five") == 0
    before, after = (
        load_file(tmp_path / "models" / name / "model.safetensors")["conv1.0.weight"]
        for name in ("rgb", "five")
    )
    expected = before.repeat(1, 2, 1, 1)[:, :5] * 3 / 5
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


def test_mean_and_spread_are_measured_where_that_is_asked_for(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = make_folder()
    assert train(tmp_path, folder, "--measure-colours") == 0
    saved = json.loads((tmp_path / "runs" / "one" / "config.json").read_text())["config"]
    pixels = np.concatenate(
        [np.asarray(Image.open(file), np.float64).reshape(-1, 3) for file in folder.rglob("*.png")]
    )
    np.testing.assert_allclose(saved["crops"]["mean"], pixels.mean(axis=0) / 255, rtol=1e-4)
    np.testing.assert_allclose(saved["crops"]["std"], pixels.std(axis=0) / 255, rtol=1e-4)
    assert list(read_manifest(tmp_path / "models" / "one").preprocessing.mean) == saved["crops"]["mean"]
