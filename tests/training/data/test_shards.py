"""Tar files of images."""

import io
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from dino_core.bundle import read_manifest
from tests.training.conftest import MakeConfig, MakeFolder
from tests.training.data.test_tables import save_to_disk
from training.data.files import local_file
from training.data.opening import open_images
from training.data.shards import shard_images
from training.errors import DataError
from training.loop import run
from training.rundir import RunPlan


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def packed(path: Path, members: dict[str, bytes], *, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_members_of_one_stem_are_one_sample(tmp_path: Path) -> None:
    members = {"a/1.png": png(1), "a/1.cls": b"cat\n", "a/1.json": b"{}", "a/2.cls": b"7", "a/2.png": png(2)}
    images = shard_images([local_file(packed(tmp_path / "s.tar", members))], origin="s")
    assert tuple(images.names) == ("s.tar/a/1.png", "s.tar/a/2.png")
    assert tuple(images.class_names) == ("7", "cat")
    assert images.labels_N is not None
    assert images.labels_N.tolist() == [1, 0]
    assert [images.read(index) for index in range(2)] == [png(1), png(2)]


def test_folders_files_and_patterns_of_shards_are_opened(tmp_path: Path) -> None:
    for number in range(3):
        packed(tmp_path / f"train-{number}.tar", {f"{number}.png": png(number)})
    assert len(open_images(tmp_path)) == 3
    assert len(open_images(tmp_path / "train-[12].tar")) == 2
    assert len(open_images(tmp_path / "train-0.tar")) == 1
    with pytest.raises(DataError, match="no file fits"):
        open_images(tmp_path / "val-*.tar")


def test_a_shard_is_indexed_once_for_each_content(tmp_path: Path) -> None:
    path = packed(tmp_path / "s.tar", {"1.png": png(1)})
    before = shard_images([local_file(path)], origin="s")
    (kept,) = (tmp_path / "own-cache/dinoserve/shards").iterdir()
    kept.write_text(kept.read_text().replace("1.png", "kept.png"))
    assert tuple(shard_images([local_file(path)], origin="s").names) == ("s.tar/kept.png",)
    kept.write_text("half")
    assert tuple(shard_images([local_file(path)], origin="s").names) == tuple(before.names)
    packed(path, {"2.png": png(2), "3.png": png(3)})
    assert tuple(shard_images([local_file(path)], origin="s").names) == ("s.tar/2.png", "s.tar/3.png")


def test_a_shard_that_was_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = packed(tmp_path / "s.tar", {"1.png": png(1), "2.png": bytes(20_000)})
    path.write_bytes(path.read_bytes()[:9_000])
    with pytest.raises(DataError, match=r"s\.tar cannot be read as a tar file \(unexpected end of data\)"):
        shard_images([local_file(path)], origin="s")


def test_a_shard_that_changes_changes_its_stamps(tmp_path: Path) -> None:
    path = packed(tmp_path / "s.tar", {"1.png": png(1)})
    before = shard_images([local_file(path)], origin="s").stamp(0)
    packed(path, {"1.png": png(200), "2.png": png(3)})
    assert shard_images([local_file(path)], origin="s").stamp(0) != before


@pytest.mark.parametrize(
    ("members", "mode", "sentence"),
    [
        ({"notes.md": b"words"}, "w", "found no image in the 1 tar files"),
        ({"1.png": png(1)}, "w:gz", "give plain .tar files, not compressed ones"),
        ({"1.png": png(1), "1.cls": b"a", "2.png": png(2)}, "w", r"s.tar/2.png has no .cls beside it"),
    ],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, members: dict[str, bytes], mode: str, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        shard_images([local_file(packed(tmp_path / "s.tar", members, mode=mode))], origin="s")


def test_shards_train_the_network_that_their_folder_trains(
    make_folder: MakeFolder, make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = make_folder()
    files = sorted(folder.rglob("*.png"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, some in enumerate((files[:5], files[5:])):
        packed(
            shards / f"{number}.tar",
            {str(file.relative_to(folder)): file.read_bytes() for file in some},
        )
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe_file(f"/training/{number}.tar", (shards / f"{number}.tar").read_bytes())
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"image": rows})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=5)
    save_to_disk(tmp_path / "saved", table)
    listed = tmp_path / "all.txt"
    listed.write_text("".join(f"{file}\n" for file in files))
    fingerprints = []
    sources: list[Path | str] = [folder, shards, "memory://training/{0..1}.tar", listed]
    sources += [tmp_path / "rows.parquet", tmp_path / "saved"]
    for number, data in enumerate(sources):
        out = tmp_path / f"models/{number}"
        plan = RunPlan(data=data, val_data=None, out=out, config=make_config())
        assert run(plan, tmp_path / f"runs/{number}", resume=False, console=Console(quiet=True)) == out
        fingerprints.append(read_manifest(out).fingerprint)
    assert fingerprints == [fingerprints[0]] * 6


def test_arrays_in_a_shard_are_images_where_there_are_no_pictures(tmp_path: Path) -> None:
    arrays = packed(tmp_path / "a.tar", {"1.npy": b"array", "1.json": b"{}", "2.tif": b"scan"})
    mixed = packed(
        tmp_path / "m.tar", {"1.npy": b"features", "1.png": png(1), "2.png": png(2), "2.tif": b"mask"}
    )
    assert tuple(shard_images([local_file(arrays)], origin="a").names) == ("a.tar/1.npy", "a.tar/2.tif")
    assert tuple(shard_images([local_file(mixed)], origin="m").names) == ("m.tar/1.png", "m.tar/2.png")
