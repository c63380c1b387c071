import os
from pathlib import Path

import pytest

from app.sources.folder import FolderSource
from app.sources.picture import NoPictures, Picture
from tests.app.sources.entries import failures, taken, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    write(
        root,
        **{
            "b.png": "1",
            "cats/a.jpg": "2",
            "cats/old/tom.JPEG": "3",
            "cats.jpg": "4",
            "dogs/rex.webp": "5",
            "readme.txt": "no picture",
            ".hidden.jpg": "no",
            ".git/x.jpg": "no",
        },
    )
    return root


def test_a_folder_is_walked_in_order_of_path_and_paths_are_ids(folder: Path) -> None:
    ids = [picture.id for picture in taken(FolderSource(folder))]
    assert ids == ["b.png", "cats.jpg", "cats/a.jpg", "cats/old/tom.JPEG", "dogs/rex.webp"]
    assert ids == sorted(ids)
    assert FolderSource(folder).count() == 5


def test_metadata_say_path_folder_and_class(folder: Path) -> None:
    by_id = {picture.id: picture.metadata for picture in taken(FolderSource(folder))}
    assert by_id["b.png"] == {"path": "b.png"}
    assert by_id["cats/old/tom.JPEG"] == {"path": "cats/old/tom.JPEG", "folder": "cats/old", "class": "cats"}


def test_a_picture_says_where_it_is_how_large_and_what_is_in_it(folder: Path) -> None:
    first = taken(FolderSource(folder))[0]
    assert (first.source, first.size_bytes, first.read()) == (str(folder / "b.png"), 1, b"1")


def test_links_to_folders_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", **{"c.gif": "5"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "cats" / "circle").symlink_to(folder)
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere")
    ids = [picture.id for picture in taken(FolderSource(folder))]
    assert ids[-2:] == ["dogs/rex.webp", "linked/c.gif"]
    assert len(ids) == 6


def test_a_folder_without_pictures_says_what_was_found(tmp_path: Path) -> None:
    write(tmp_path, **{"a.txt": "1", "b.txt": "2", "c": "3"})
    with pytest.raises(NoPictures, match=r"looked for .*\.jpg.*; found 2 \.txt, 1 no suffix"):
        FolderSource(tmp_path).count()
    with pytest.raises(NoPictures, match="does not exist"):
        FolderSource(tmp_path / "nowhere")
    with pytest.raises(NoPictures, match="is not a folder"):
        FolderSource(tmp_path / "c")


def test_a_stamp_changes_with_the_file_also_where_size_and_time_of_the_content_are_kept(folder: Path) -> None:
    def stamp() -> object:
        return taken(FolderSource(folder))[0].stamp

    path, before = folder / "b.png", stamp()
    assert stamp() == before
    status = path.stat()
    path.write_text("9")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert stamp() != before


def test_what_vanishes_or_may_not_be_read_fails_in_its_place(folder: Path) -> None:
    entries = FolderSource(folder).entries(max_image_bytes=1)
    next(entries)
    (folder / "cats.jpg").unlink()
    rest = list(entries)
    assert [type(entry) is Picture for entry in rest] == [False, True, True, True]
    if os.geteuid() != 0:  # root may read anything
        (folder / "cats").chmod(0)
        assert [failed.failure.code for failed in failures(FolderSource(folder))] == ["unreadable_folder"]
        (folder / "cats").chmod(0o755)
