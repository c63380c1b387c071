"""Saving what can be read of a damaged directory."""

import os
import sqlite3
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from app.errors import DirectoryInUse, StorageError
from app.search.collection import Item
from app.search.directory import DATABASE_NAME
from app.search.library import Collections
from app.search.rescue import rescue

D = 64
PAGE = 8_192


def vector_of(number: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(number).normal(size=D).astype(np.float32)


def item_of(number: int) -> Item:
    return Item(
        id=f"{number:05}",
        vector=vector_of(number),
        metadata={"number": number, "text": "x" * 50},
        sha256=f"{number:064x}",
        source=f"/photos/{number}.jpg",
        thumbnail=b"webp" * 20,
    )


def fill(directory: Path, *, count: int = 2_000) -> Path:
    with Collections.open(directory) as collections:
        main = collections.create("main", fingerprint="sha256:f", dimensions=D)
        main.upsert([item_of(n) for n in range(count)], fingerprint="sha256:f")
        main.delete(["00000", "00001"])
        collections.create("empty", fingerprint="g", dimensions=3)
        collections.set_alias("current", "main")
        successor = collections.begin_successor("main", fingerprint="new", dimensions=2)
        successor.upsert([Item(id="a", vector=np.ones(2, dtype=np.float32), metadata={})], fingerprint="new")
    return directory / DATABASE_NAME


def assert_right(collections: Collections, *, least: int) -> set[str]:
    """Every item that is there is what it was."""
    main = collections.get("main")
    assert main.fingerprint == "sha256:f"
    seen: set[str] = set()
    cursor = None
    while True:
        page = main.scroll(cursor=cursor, limit=1_000)
        for item in page.items:
            expected = item_of(int(item.id))
            assert (item.metadata, item.sha256, item.source) == (
                expected.metadata,
                expected.sha256,
                expected.source,
            )
            np.testing.assert_allclose(
                item.vector, expected.vector / np.linalg.norm(expected.vector), atol=1e-6
            )
            seen.add(item.id)
        cursor = page.next_cursor
        if cursor is None:
            break
    assert len(seen) >= least
    assert not seen & {"00000", "00001"}, "deleted items stay deleted"
    return seen


def test_a_whole_directory_is_saved_whole(tmp_path: Path) -> None:
    database = fill(tmp_path / "a")
    before = database.read_bytes()
    report = rescue(tmp_path / "a", tmp_path / "b")
    assert [(c.name, c.fingerprint, c.items, c.lost) for c in report.collections] == [
        ("empty", "g", 0, []),
        ("main", "sha256:f", 1_998, []),
        ("main-successor", "new", 1, []),
    ]
    assert (report.aliases, report.complaints) == ({"current": "main"}, [])
    assert database.read_bytes() == before
    with Collections.open(tmp_path / "b") as collections:
        assert_right(collections, least=1_998)
        assert collections.get("current").thumbnail("00005") == b"webp" * 20
        ((nearest,),) = collections.get("main").search(vector_of(77)[None], k=1)
        assert (nearest.id, nearest.score) == ("00077", 1.0)


def roots(database: Path) -> dict[str, int]:
    connection = sqlite3.connect(database)
    found = dict(connection.execute("SELECT name, rootpage FROM sqlite_master"))
    connection.close()
    return found


@pytest.mark.parametrize("seed", range(8))
def test_flipped_bytes_cost_the_items_of_their_pages_and_the_report_names_them(
    tmp_path: Path, seed: int
) -> None:
    database = fill(tmp_path / "a")
    rng = np.random.default_rng(seed)
    content = bytearray(database.read_bytes())
    kept_whole = {1, *roots(database).values()}  # the first page and the tops of all tables
    pages = [page for page in range(2, len(content) // PAGE + 1) if page not in kept_whole]
    for page in rng.choice(pages, size=3, replace=False):
        start = (page - 1) * PAGE
        content[start : start + PAGE] = rng.bytes(PAGE)
    database.write_bytes(content)
    report = rescue(tmp_path / "a", tmp_path / "b")
    (main,) = [one for one in report.collections if one.name == "main"]
    assert main.items >= 1_600
    with Collections.open(tmp_path / "b") as collections:
        saved = assert_right(collections, least=main.items)
    if main.lost is not None:
        everything = {f"{n:05}" for n in range(2, 2_000)}
        assert saved == everything - set(main.lost)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_of_a_file_that_was_cut_what_is_left_is_saved(tmp_path: Path, share: float) -> None:
    database = fill(tmp_path / "a")
    os.truncate(database, int(database.stat().st_size * share) // PAGE * PAGE)
    with pytest.raises(StorageError, match=r"damaged.*'main': [\d,]+ items") as refused:
        Collections.open(tmp_path / "a")
    report = rescue(tmp_path / "a", tmp_path / "b")
    saved = {one.name: one.items for one in report.collections}
    assert f"'main': {saved.get('main', 0):,} items" in str(refused.value)
    assert report.complaints
    if saved.get("main"):
        with Collections.open(tmp_path / "b") as collections:
            assert_right(collections, least=saved["main"])


def test_damaged_vectors_and_texts_cost_their_items_only(tmp_path: Path) -> None:
    database = fill(tmp_path / "a")
    connection = sqlite3.connect(database)
    connection.execute("UPDATE vectors SET vector = zeroblob(7) WHERE rid = 100")
    connection.execute("UPDATE vectors SET vector = zeroblob(256) WHERE rid = 101")
    connection.execute("DELETE FROM vectors WHERE rid = 102")
    connection.execute("UPDATE items SET metadata = '{\"a\": ' WHERE rid = 103")
    connection.execute("UPDATE items SET metadata = '[]' WHERE rid = 104")
    connection.execute("UPDATE items SET metadata = CAST(x'ff' AS TEXT) WHERE rid = 105")
    connection.execute("UPDATE items SET sha256 = 'x' WHERE rid = 106")
    connection.execute("DELETE FROM thumbnails WHERE rid = 107")
    connection.commit()
    connection.close()
    report = rescue(tmp_path / "a", tmp_path / "b")
    (main,) = [one for one in report.collections if one.name == "main"]
    assert (main.items, main.lost) == (1_991, [f"{n:05}" for n in range(99, 106)])


def test_where_the_table_of_collections_is_damaged_items_are_saved_under_made_up_names(
    tmp_path: Path,
) -> None:
    database = fill(tmp_path / "a")
    root = roots(database)["collections"]
    with database.open("r+b") as file:
        file.seek((root - 1) * PAGE)
        file.write(b"\x5a" * PAGE)
    report = rescue(tmp_path / "a", tmp_path / "b")
    assert [(c.name, c.fingerprint, c.items, c.lost) for c in report.collections] == [
        ("rescued-1", "unknown", 1_998, []),
        ("rescued-3", "unknown", 1, []),
    ]


def test_what_cannot_be_saved_from_or_into_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing to save"):
        rescue(tmp_path, tmp_path / "b")
    fill(tmp_path / "a", count=10)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(StorageError, match="not empty"):
        rescue(tmp_path / "a", tmp_path / "full")
    with Collections.open(tmp_path / "a"), pytest.raises(DirectoryInUse):
        rescue(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_of_a_directory_without_a_readable_first_page_nothing_is_saved_and_that_is_said(
    tmp_path: Path,
) -> None:
    database = fill(tmp_path / "a", count=10)
    with database.open("r+b") as file:
        file.seek(100)
        file.write(b"\x5a" * 8_000)
    report = rescue(tmp_path / "a", tmp_path / "b")
    assert (report.collections, report.aliases) == ([], {})
    assert report.complaints
