from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.sources.opening import open_sources
from app.sources.picture import NoPictures
from tests.app.sources.entries import taken, write
from tests.app.sources.test_tar import pack


def test_what_is_named_is_told_by_what_it_is_and_all_of_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, **{"photos/a.jpg": "1", "list.txt": "photos/a.jpg"})
    pack(tmp_path / "packed", {"b.jpg": b"2"}, mode="w:gz")
    pq.write_table(pa.table({"id": ["c"], "image": [b"3"]}), tmp_path / "table")
    names = ["photos", "packed", "table", "list.txt"]
    sources = open_sources([tmp_path / name for name in names])
    assert [picture.id for picture in taken(sources)] == ["a.jpg", "b.jpg", "c", "photos/a.jpg"]
    assert sources.description == f"the folder {tmp_path}/photos and 3 more"
    assert sources.count() is None  # the tar can't tell
    assert open_sources([tmp_path / "photos", tmp_path / "table"]).count() == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "does not exist; name a folder, a tar file"),
        ("a.jpg", "is a picture: name its folder; what is taken is a folder, a tar file"),
        ("a.doc", "is nothing that pictures come in; what is taken is a folder"),
        ("cut.tar", "is nothing that pictures come in"),
    ],
)
def test_what_is_nothing_of_the_kind_is_refused_with_what_is(tmp_path: Path, name: str, says: str) -> None:
    write(tmp_path, **{"a.jpg": "1", "a.doc": "2" * 1_000, "cut.tar": "3"})
    with pytest.raises(NoPictures, match=says):
        open_sources([tmp_path / name])
