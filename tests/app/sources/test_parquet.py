import datetime
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.sources.parquet import ParquetSource, is_parquet
from app.sources.picture import NoPictures, Picture
from tests.app.running import ROOT
from tests.app.sources.entries import failures, taken, write


def test_pictures_as_hugging_face_writes_them(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": b"one", "path": "1.jpg"}, "label": 3},
        {"image": {"bytes": b"two", "path": None}, "label": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    source = ParquetSource(tmp_path / "train.parquet")
    assert source.count() == 2
    first, second = taken(source)
    assert (first.id, first.read(), first.metadata) == ("train/0", b"one", {"path": "1.jpg", "label": 3})
    assert (second.id, second.read(), second.metadata) == ("train/1", b"two", {})
    assert first.source == f"{tmp_path}/train.parquet#0"


def test_plain_bytes_with_ids_metadata_and_other_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": [7, 8],
            "image": [b"one", b"two"],
            "metadata": ['{"a": 1}', None],
            "taken": [datetime.datetime(2024, 1, 2, 3, 4), None],
            "size": [float("nan"), 1.5],
            "tags": [["x"], []],
            "other_bytes": [b"left out", b""],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    first, second = taken(ParquetSource(tmp_path / "t.parquet"))
    assert (first.id, first.metadata) == ("7", {"a": 1, "taken": "2024-01-02T03:04:00", "tags": ["x"]})
    assert (second.id, second.metadata) == ("8", {"size": 1.5, "tags": []})


def test_a_column_of_paths_names_files(tmp_path: Path) -> None:
    write(tmp_path, **{"photos/a.jpg": "1"})
    table = pa.table({"path": ["photos/a.jpg", "nowhere.jpg", None], "label": ["cat", "dog", "cow"]})
    pq.write_table(table, tmp_path / "t.parquet")
    source = ParquetSource(tmp_path / "t.parquet")
    (first, *_) = source.entries(max_image_bytes=100)
    assert first.id == "photos/a.jpg"
    assert [failed.failure.code for failed in failures(source)] == ["unreadable_file", "empty_image"]


def test_a_row_may_name_its_file_where_it_has_no_bytes(tmp_path: Path) -> None:
    write(tmp_path, **{"a.jpg": "1"})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "a.jpg"}, None], type=kind)
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet")
    first, second = ParquetSource(tmp_path / "t.parquet").entries(max_image_bytes=100)
    assert first.id == "a.jpg"
    assert second in failures(ParquetSource(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"vector": [[0.1]], "fingerprint": ["f"], "id": ["a"]}, "use `dino-serve index import"),
        ({"img": ["x"], "label": [1]}, r"neither a column `image` .* its columns are img \(string\), label"),
        ({"image": ["text"]}, "neither"),
        ({"path": [1]}, "neither"),
    ],
)
def test_other_columns_are_refused(tmp_path: Path, columns: dict[str, list[object]], says: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    with pytest.raises(NoPictures, match=says):
        ParquetSource(tmp_path / "t.parquet")


def test_an_export_that_says_so_in_its_own_metadata_is_refused(tmp_path: Path) -> None:
    table = pa.table({"vector": [[0.1]], "id": ["a"]}).replace_schema_metadata({b"dinoserve": b"{}"})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(NoPictures, match="index import"):
        ParquetSource(tmp_path / "t.parquet")


def test_what_is_cut_short_is_refused_and_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    noise = random.Random(0)
    path = tmp_path / "t.parquet"
    images = [noise.randbytes(2_000) for _ in range(200)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=50)
    data = bytearray(path.read_bytes())
    assert is_parquet(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(NoPictures, match="not a whole Parquet file"):
        ParquetSource(path)
    path.write_bytes(data)
    start = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    data[start : start + 64] = b"\xff" * 64  # the head of the third group's page
    path.write_bytes(data)
    entries = list(ParquetSource(path).entries(max_image_bytes=2**20))
    assert [entry.read() for entry in entries[:-1] if isinstance(entry, Picture)] == images[:96]  # 3 x 32
    assert failures(ParquetSource(path)) == entries[-1:]
    assert failures(ParquetSource(path))[0].failure.code == "damaged_parquet"


def test_memory_does_not_grow_with_the_file_nor_with_its_groups_of_rows(tmp_path: Path) -> None:
    noise = random.Random(0)
    path = tmp_path / "t.parquet"
    block = noise.randbytes(2**20)
    with pq.ParquetWriter(path, pa.schema([("image", pa.binary())]), compression="none") as writer:
        writer.write_table(
            pa.table({"image": [block[i:] + block[:i] for i in range(300)]}), row_group_size=300
        )
    program = (
        "import resource, sys, pathlib\n"
        "from app.sources.parquet import ParquetSource\n"
        "source = ParquetSource(pathlib.Path(sys.argv[1]))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert sum(len(e.read()) for e in source.entries(max_image_bytes=1)) == 300 * 2**20\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200  # MiB, of a file of 300
