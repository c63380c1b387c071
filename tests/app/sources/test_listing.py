import os
from pathlib import Path

import pytest

from app.sources.listing import ListSource
from app.sources.picture import NoPictures
from tests.app.sources.entries import failures, taken, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, **{"photos/a b.jpg": "1", "photos/ü.png": "2", "c": "3"})
    return tmp_path


def test_text_has_a_path_on_each_line_below_its_own_folder_or_absolute(folder: Path) -> None:
    (folder / "list.txt").write_text(f"photos/a b.jpg\n\nphotos/ü.png\r\n{folder}/c")
    source = ListSource(folder / "list.txt")
    assert source.count() == 3
    pictures = taken(source)
    assert [picture.id for picture in pictures] == ["photos/a b.jpg", "photos/ü.png", f"{folder}/c"]
    assert [picture.read() for picture in pictures] == [b"1", b"2", b"3"]
    assert pictures[0].source == str(folder / "photos" / "a b.jpg")
    assert pictures[0].metadata == {"path": "photos/a b.jpg", "folder": "photos", "class": "photos"}


def test_a_csv_has_a_column_of_paths_and_others_are_metadata(folder: Path) -> None:
    (folder / "list.csv").write_text(
        '\ufeffpath,id,year,metadata\n"photos/a b.jpg",one,1999,"{""tags"": [""x""]}"\nc,,,\n'
    )
    source = ListSource(folder / "list.csv")
    assert source.count() == 2
    first, second = taken(source)
    assert first.id == "one"
    assert first.metadata["year"] == "1999"
    assert first.metadata["tags"] == ["x"]
    assert (second.id, second.metadata) == ("c", {"path": "c"})


def test_json_lines_keep_the_types_of_metadata(folder: Path) -> None:
    (folder / "list.jsonl").write_text(
        '{"path": "c", "id": 7, "year": 1999, "metadata": {"deep": {"a": [1, null]}}}\n'
    )
    (picture,) = taken(ListSource(folder / "list.jsonl"))
    assert picture.id == "7"
    assert picture.metadata == {"path": "c", "year": 1999, "deep": {"a": [1, None]}}


def test_bad_rows_fail_alone_and_say_where_they_are(folder: Path) -> None:
    rows = [
        "{",
        "[]",
        '{"id": "x"}',
        '{"path": "nowhere.jpg"}',
        '{"path": "photos"}',
        '{"path": "https://example.org/a.jpg"}',
        '{"path": "c", "metadata": "{"}',
        '{"path": "c", "metadata": [1]}',
        '{"path": "a\\u0000b"}',
        '{"path": "c"}',
    ]
    (folder / "list.jsonl").write_text("\n".join(rows))
    source = ListSource(folder / "list.jsonl")
    assert [failed.failure.code for failed in failures(source)] == [
        "invalid_row",
        "invalid_row",
        "invalid_row",
        "unreadable_file",
        "unreadable_file",
        "invalid_row",
        "invalid_metadata",
        "invalid_metadata",
        "unreadable_file",
    ]
    assert failures(source)[0].where.endswith("list.jsonl, line 1")
    assert len(list(source.entries(max_image_bytes=10))) == 10


def test_a_path_may_be_any_bytes(folder: Path) -> None:
    name = os.fsdecode(b"\xff.jpg")
    (folder / name).write_text("4")
    (folder / "list.txt").write_bytes(b"\xff.jpg\n")
    (picture,) = taken(ListSource(folder / "list.txt"))
    assert picture.read() == b"4"
    assert picture.id.isprintable()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("list.csv", "file,label\na.jpg,1\n", "no column `path`; its columns are 'file', 'label'"),
        ("list.csv", "", "no column `path`; its columns are none"),
        ("list.txt", "\n\n", "is empty"),
        ("list.csv", "path\n", "is empty"),
    ],
)
def test_a_list_of_nothing_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(NoPictures, match=says):
        ListSource(tmp_path / name).count()
