"""Every source of images by the real command line: it trains, goes on, and says what is wrong."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest

from tests.training.conftest import MakeFolder
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


def test_a_run_on_shards_in_memory_stops_and_goes_on_bit_for_bit(
    make_folder: MakeFolder, tmp_path: Path
) -> None:
    files = sorted(make_folder().rglob("*.png"))
    memory = fsspec.filesystem("memory")
    for number in range(2):
        packed = pack(tmp_path / f"{number}.tar", files[number::2])
        memory.pipe_file(f"/resumes/{number}.tar", packed.read_bytes())
    data = "memory://resumes/{0..1}.tar"
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
