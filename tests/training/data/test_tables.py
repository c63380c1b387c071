"""Rows of Parquet and Arrow files: which columns, which names, which labels; and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from training.data.addresses import where
from training.data.files import local_file
from training.data.images import UnreadableImage
from training.data.opening import open_images, open_split
from training.data.row_files import GroupCache, ParquetRows
from training.data.tables import RowNames
from training.errors import DataError


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def hub_metadata(**features: dict[str, Any]) -> dict[bytes, bytes]:
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def hub_table(levels: list[int], labels: list[int | None], names: list[str]) -> pa.Table:
    rows = [{"bytes": png(level), "path": f"{level}.png"} for level in levels]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array(labels, pa.int64())})
    metadata = hub_metadata(image={"_type": "Image"}, label={"names": names, "_type": "ClassLabel"})
    return table.replace_schema_metadata(metadata)


def save_to_disk(folder: Path, table: pa.Table, *, batches: int = 2) -> Path:
    """What `datasets` 4 writes: a stream of record batches beside two descriptions."""
    folder.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=-(-len(table) // batches))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def test_images_and_class_names_are_read_as_the_hub_has_them(tmp_path: Path) -> None:
    pq.write_table(hub_table([1, 2, 3], [1, 0, 1], ["owl", "crow"]), tmp_path / "b.parquet", row_group_size=2)
    images = open_images(tmp_path / "b.parquet")
    assert [images.read(index) for index in range(3)] == [png(1), png(2), png(3)]
    assert images.class_names == ("crow", "owl")
    assert images.labels_N is not None
    assert images.labels_N.tolist() == [0, 1, 0]
    assert list(images.names) == ["b.parquet/0", "b.parquet/1", "b.parquet/2"]


@pytest.mark.parametrize("labels", [[None, None], [-1, -1]])
def test_rows_without_labels_have_no_classes(tmp_path: Path, labels: list[int | None]) -> None:
    pq.write_table(hub_table([1, 2], labels, ["owl", "crow"]), tmp_path / "b.parquet")
    images = open_images(tmp_path / "b.parquet")
    assert images.labels_N is None
    assert images.class_names == ()


def test_plain_bytes_and_words_are_read_and_other_columns_can_be_named(tmp_path: Path) -> None:
    table = pa.table({"thumb": [png(9), png(9)], "photo": [png(1), png(2)], "kind": ["owl", "crow"]})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"several columns .*\(thumb, photo\): name one .* #image=thumb"):
        open_images(tmp_path / "b.parquet")
    images = open_images(Path(f"{tmp_path}/b.parquet#image=photo,label=kind"))
    assert images.read(1) == png(2)
    assert images.class_names == ("crow", "owl")
    with pytest.raises(DataError, match="has no column phto: did you mean photo?"):
        open_images(Path(f"{tmp_path}/b.parquet#image=phto"))
    with pytest.raises(DataError, match="the column kind of .* holds string"):
        open_images(Path(f"{tmp_path}/b.parquet#image=kind"))
    with pytest.raises(DataError, match="write #image=NAME,label=NAME"):
        open_images(Path(f"{tmp_path}/b.parquet#image=photo,lable=kind"))


def test_files_of_the_hub_are_split_by_their_names(tmp_path: Path) -> None:
    data = tmp_path / "birds" / "data"
    data.mkdir(parents=True)
    for name, level in (
        ("train-0-of-2", 1),
        ("train-1-of-2", 2),
        ("test-0-of-1", 3),
        ("validation-0-of-1", 4),
    ):
        pq.write_table(hub_table([level], [0], ["owl", "crow"]), data / f"{name}.parquet")
    train, val = open_split(tmp_path / "birds")
    assert val is not None
    assert [train.read(index) for index in range(len(train))] == [png(1), png(2)]
    assert [val.read(index) for index in range(len(val))] == [png(4)]
    assert len(open_images(data / "*.parquet")) == 4
    assert len(open_images(tmp_path / "**" / "t*.parquet")) == 3


def test_parquet_is_read_from_an_address(tmp_path: Path) -> None:
    pq.write_table(hub_table([1, 2, 3], [1, 0, 1], ["owl", "crow"]), tmp_path / "b.parquet")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/tables/data/train-0.parquet", (tmp_path / "b.parquet").read_bytes())
    for written in (
        "memory://tables/data/train-{0..0}.parquet",
        "memory://tables",
        "memory://tables/*/*.parquet",
    ):
        images, val = open_split(where(written))
        assert val is None
        assert images.read(2) == png(3)


def test_what_save_to_disk_wrote_is_mapped_and_split(tmp_path: Path) -> None:
    table = hub_table([1, 2, 3], [1, 0, 1], ["owl", "crow"])
    save_to_disk(tmp_path / "saved" / "train", table)
    save_to_disk(tmp_path / "saved" / "test", table.slice(1, 1))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train, val = open_split(tmp_path / "saved")
    assert val is not None
    assert [train.read(index) for index in range(3)] == [png(1), png(2), png(3)]
    assert train.class_names == val.class_names == ("crow", "owl")
    assert val.read(0) == png(2)
    assert len(open_images(tmp_path / "saved" / "test")) == 1


def test_a_mapped_file_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", hub_table([1, 2, 3], [1, 0, 1], ["owl", "crow"]))
    images = open_images(folder)
    (file,) = folder.glob("*.arrow")
    with file.open("r+b") as handle:
        handle.truncate(100)
    with pytest.raises(DataError, match=r"\.arrow has changed since it was opened"):
        images.read(2)
    with pytest.raises(DataError, match=r"\.arrow is no whole Arrow file"):
        open_images(folder)


def test_a_row_without_an_image_is_passed_over_by_name(tmp_path: Path) -> None:
    (tmp_path / "beside.png").write_bytes(png(7))
    rows = [{"bytes": None, "path": None}, {"bytes": None, "path": "beside.png"}, None]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image}), tmp_path / "b.parquet")
    images = open_images(tmp_path / "b.parquet")
    assert images.read(1) == png(7)
    for index in (0, 2):
        with pytest.raises(UnreadableImage, match="the row holds no image"):
            images.read(index)


def test_groups_are_decoded_once_while_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.parquet"
    pq.write_table(hub_table(list(range(6)), [0] * 6, ["owl", "crow"]), path, row_group_size=2)
    decoded: list[int] = []
    whole = ParquetRows.decoded

    def counted(self: ParquetRows, group: int, name: str) -> Any:  # noqa: ANN401  pyarrow ships no types
        decoded.append(group)
        return whole(self, group, name)

    monkeypatch.setattr(ParquetRows, "decoded", counted)
    rows = ParquetRows(local_file(path), GroupCache(kept_bytes=1))
    for group in (0, 0, 1, 1, 0):
        rows.column(group, "image")
    assert decoded == [0, 1, 0]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        pytest.param(hub_table([], [], ["owl"]), "has no rows", id="empty"),
        pytest.param(
            pa.table({"text": ["a"]}), r"no column of images .* are text \(string\)", id="no images"
        ),
        pytest.param(hub_table([1, 2], [0, None], ["owl"]), "row 1, .* has no label", id="some labels"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(tmp_path: Path, table: pa.Table, sentence: str) -> None:
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=sentence):
        open_images(tmp_path / "b.parquet")


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    pq.write_table(hub_table([1], [0], ["owl"]), tmp_path / "b.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="is no whole Parquet file"):
        open_images(tmp_path / "b.parquet")


def test_names_of_rows_are_counted_within_their_file() -> None:
    names = RowNames(["a", "b"], [2, 3])
    assert names[:] == ["a/0", "a/1", "b/0", "b/1", "b/2"]
    assert names[-1] == "b/2"
    assert list(names) == names[:]
    with pytest.raises(IndexError):
        names[5]
