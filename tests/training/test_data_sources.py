"""Every source of images by the real command line: it trains, goes on, and says what is wrong."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
