"""Snapshots and what is read back out of them, while others search and write."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.errors import (
    CollectionExists,
    InvalidCollection,
    NotReady,
    StorageError,
    SuccessorExists,
    UnknownCollection,
    UnknownSnapshot,
)
from app.search.collection import Collection, Item
from app.search.embedded.library import Collections
from app.search.embedded.restoring import restore_collection, restore_directory
from app.search.embedded.snapshot_files import SnapshotFile, Snapshots

D = 6


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Collections]:
    with Collections.open(tmp_path / "data") as collections:
        yield collections


@pytest.fixture
def snapshots(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path / "data" / "snapshots")


def item(number: int, *, version: int = 0) -> Item:
    rng = np.random.default_rng([number, version])
    return Item(
        id=f"{number:04}",
        vector=rng.standard_normal(D).astype(np.float32),
        metadata={"number": number, "version": version},
        sha256="ab" * 32 if number % 2 else "",
        source=f"/photos/{number}" if number % 3 else None,
        thumbnail=b"RIFF" + bytes([number % 256]) if number % 5 else None,
    )


def fill(collection: Collection, numbers: range, *, version: int = 0) -> None:
    items = [item(number, version=version) for number in numbers]
    collection.upsert(items, fingerprint=collection.fingerprint)


def contents(collection: Collection) -> dict[str, tuple[object, ...]]:
    return {
        found.id: (
            found.vector.tobytes(),
            found.metadata,
            found.sha256,
            found.source,
            collection.thumbnail(found.id),
        )
        for found in collection.scroll(cursor=None, limit=1_000).items
    }


def test_a_snapshot_says_what_is_in_it(catalogue: Collections, snapshots: Snapshots) -> None:
    assert snapshots.list() == []
    fill(catalogue.create("photos", fingerprint="f", dimensions=D), range(10))
    catalogue.create("empty", fingerprint="g", dimensions=3)
    catalogue.begin_successor("photos", fingerprint="h", dimensions=2)
    made = snapshots.make(catalogue)
    again = snapshots.make(catalogue)
    assert made.name != again.name
    assert made.name.endswith("Z.sqlite")
    assert [info.name for info in snapshots.list()] == [made.name, again.name]
    assert made.size_bytes == snapshots.path(made.name).stat().st_size
    assert [(info.name, info.fingerprint, info.dimensions, info.items) for info in made.collections] == [
        ("empty", "g", 3, 0),
        ("photos", "f", D, 10),
    ]
    snapshots.delete(made.name)
    assert [info.name for info in snapshots.list()] == [again.name]


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../collections.sqlite",
        "a/b.sqlite",
        "/etc/passwd",
        "x.sqlite\n",
        "nul\x00.sqlite",
        "ü.sqlite",
    ]
    + [
        "there-is-none.sqlite",
        ".hidden.sqlite",
        "link.sqlite",
        "folder.sqlite",
        "x" * 300 + ".sqlite",
        "other.txt",
    ],
)
def test_a_name_that_is_none_leads_nowhere(catalogue: Collections, snapshots: Snapshots, name: str) -> None:
    kept = snapshots.path(snapshots.make(catalogue).name)
    folder = kept.parent
    (folder / "link.sqlite").symlink_to(folder.parent / "collections.sqlite")
    (folder / "folder.sqlite").mkdir()
    (folder / ".hidden.sqlite").write_bytes(b"")
    (folder / "other.txt").write_bytes(b"")
    for call in (snapshots.path, snapshots.delete):
        with pytest.raises(UnknownSnapshot, match="there is no snapshot"):
            call(name)
    assert [info.name for info in snapshots.list()] == [kept.name]
    assert (folder.parent / "collections.sqlite").exists()


def test_what_a_killed_process_left_is_cleared_away(catalogue: Collections, snapshots: Snapshots) -> None:
    folder = snapshots.path(snapshots.make(catalogue).name).parent
    (folder / ".2026-01-01T00-00-00Z.sqlite.part").write_bytes(b"half")
    snapshots.make(catalogue)
    assert not list(folder.glob(".*"))


def test_a_restored_collection_is_equal_bit_for_bit_and_the_one_before_stays(
    catalogue: Collections, snapshots: Snapshots
) -> None:
    photos = catalogue.create("photos", fingerprint="f", dimensions=D)
    catalogue.set_alias("best", "photos")
    fill(photos, range(700))
    photos.delete(["0003"])
    before = contents(photos)
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    fill(photos, range(0, 800, 2), version=1)
    photos.delete([f"{number:04}" for number in range(1, 400, 2)])
    later = contents(photos)

    restored = restore_collection(catalogue, snapshot, "photos")
    assert (restored.collection, restored.fingerprint, restored.items) == ("photos", "f", 699)
    assert contents(catalogue.get("photos")) == before
    assert contents(catalogue.get("best")) == before
    assert restored.previous is not None
    assert contents(catalogue.get(restored.previous)) == later
    assert all(info.successor is None for info in catalogue.list())


def test_a_collection_is_restored_beside_the_other_under_a_new_name(
    catalogue: Collections, snapshots: Snapshots
) -> None:
    photos = catalogue.create("photos", fingerprint="f", dimensions=D)
    fill(photos, range(20))
    before = contents(photos)
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    fill(photos, range(30), version=1)
    restored = restore_collection(catalogue, snapshot, "photos", as_name="old")
    assert (restored.collection, restored.previous) == ("old", None)
    assert contents(catalogue.get("old")) == before
    assert [info.name for info in catalogue.list()] == ["old", "photos"]
    assert photos.count() == 30


def test_a_dropped_collection_comes_back_and_one_of_another_model_is_taken_over(
    catalogue: Collections, snapshots: Snapshots
) -> None:
    fill(catalogue.create("photos", fingerprint="f", dimensions=D), range(20))
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    catalogue.drop("photos")
    assert restore_collection(catalogue, snapshot, "photos").previous is None
    catalogue.drop("photos")
    catalogue.create("photos", fingerprint="g", dimensions=3)
    restored = restore_collection(catalogue, snapshot, "photos")
    assert catalogue.get("photos").fingerprint == "f"
    assert restored.previous is not None
    assert catalogue.get(restored.previous).fingerprint == "g"


def test_every_search_during_a_restore_sees_all_of_one_or_all_of_the_other(
    catalogue: Collections, snapshots: Snapshots
) -> None:
    photos = catalogue.create("photos", fingerprint="f", dimensions=D)
    fill(photos, range(600))
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    fill(photos, range(600), version=1)
    seen: list[set[object]] = []
    done = threading.Event()

    def search() -> None:
        while not done.is_set():
            (found,) = catalogue.get("photos").search(np.ones((1, D)), k=600)
            assert len(found) == 600
            seen.append({neighbour.metadata["version"] for neighbour in found})

    searcher = threading.Thread(target=search)
    searcher.start()
    restore_collection(catalogue, snapshot, "photos")
    count = len(seen)
    while len(seen) < count + 2:
        assert searcher.is_alive()
    done.set()
    searcher.join()
    assert seen[0] == {1}
    assert seen[-1] == {0}
    assert all(versions in ({0}, {1}) for versions in seen)


def refused_and_unchanged(catalogue: Collections, snapshot: Path, kind: type[Exception], says: str) -> None:
    before = contents(catalogue.get("photos"))
    for as_name in (None, "new"):
        with pytest.raises(kind, match=says):
            restore_collection(catalogue, snapshot, "photos", as_name=as_name)
    assert contents(catalogue.get("photos")) == before
    assert [(info.name, info.successor) for info in catalogue.list()] == [("photos", None)]


def test_damage_is_found_before_anything_is_changed(catalogue: Collections, snapshots: Snapshots) -> None:
    fill(catalogue.create("photos", fingerprint="f", dimensions=D), range(300))
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    whole = snapshot.read_bytes()
    for damaged, says in (
        (b"", "not a SQLite database"),
        (whole[:50], "cut short"),
        (b"a JPEG, say" * 100, "not a SQLite database"),
        (whole[: len(whole) // 2], "damaged"),
        (whole[:8_192] + bytes(8_192) + whole[16_384:], "damaged"),
        (whole[:68] + b"none" + whole[72:], "another program"),
        (whole[:60] + (99).to_bytes(4, "big") + whole[64:], "upgrade dinoserve"),
    ):
        snapshot.write_bytes(damaged)
        refused_and_unchanged(catalogue, snapshot, StorageError, says)
        (listed,) = snapshots.list()
        assert listed.problem is None or says in listed.problem
    snapshot.write_bytes(whole)
    snapshot.with_name(snapshot.name + "-wal").write_bytes(b"journal")
    refused_and_unchanged(catalogue, snapshot, StorageError, "has a journal beside it")


def test_a_vector_that_is_missing_or_cut_is_damage(catalogue: Collections, snapshots: Snapshots) -> None:
    fill(catalogue.create("photos", fingerprint="f", dimensions=D), range(300))
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    for statement in (
        "UPDATE vectors SET vector = substr(vector, 2) WHERE rid = 290",
        "DELETE FROM vectors WHERE rid = 290",
        "UPDATE items SET metadata = '{' WHERE rid = 290",
    ):
        with sqlite3.connect(snapshot) as connection:
            connection.execute(statement)
        connection.close()
        refused_and_unchanged(catalogue, snapshot, StorageError, "damaged")


def test_what_can_not_be_restored_is_said(catalogue: Collections, snapshots: Snapshots) -> None:
    fill(catalogue.create("photos", fingerprint="f", dimensions=D), range(5))
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    with pytest.raises(UnknownCollection, match="it has: photos"):
        restore_collection(catalogue, snapshot, "nothing")
    with pytest.raises(CollectionExists, match="'photos' is taken"):
        restore_collection(catalogue, snapshot, "photos", as_name="photos")
    catalogue.set_alias("best", "photos")
    with pytest.raises(CollectionExists, match="'best' is taken"):
        restore_collection(catalogue, snapshot, "photos", as_name="best")
    with pytest.raises(InvalidCollection):
        restore_collection(catalogue, snapshot, "photos", as_name="a/b")
    with pytest.raises(StorageError, match="No such file"):
        restore_collection(catalogue, snapshot.with_name("nowhere.sqlite"), "photos")
    catalogue.begin_successor("photos", fingerprint="g", dimensions=3)
    with pytest.raises(SuccessorExists, match="DELETE /collections/photos/reindex") as refused:
        restore_collection(catalogue, snapshot, "photos")
    assert (refused.value.expected, refused.value.found) == ("g", "f")
    (info,) = catalogue.list()
    assert info.successor is not None


def test_a_restore_that_is_stopped_has_changed_nothing(catalogue: Collections, snapshots: Snapshots) -> None:
    fill(catalogue.create("photos", fingerprint="f", dimensions=D), range(5))
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    stop = threading.Event()
    stop.set()
    for as_name in (None, "new"):
        with pytest.raises(NotReady, match="nothing was changed"):
            restore_collection(catalogue, snapshot, "photos", as_name=as_name, stop=stop)
    assert [(info.name, info.successor) for info in catalogue.list()] == [("photos", None)]


def test_a_directory_is_made_from_a_snapshot(
    catalogue: Collections, snapshots: Snapshots, tmp_path: Path
) -> None:
    photos = catalogue.create("photos", fingerprint="f", dimensions=D)
    fill(photos, range(50))
    catalogue.set_alias("best", "photos")
    snapshot = snapshots.path(snapshots.make(catalogue).name)
    assert [info.name for info in restore_directory(snapshot, tmp_path / "new")] == ["photos"]
    with Collections.open(tmp_path / "new") as copy:
        assert contents(copy.get("best")) == contents(photos)
    (tmp_path / "left" / "snapshots").mkdir(parents=True)
    restore_directory(snapshot, tmp_path / "left")
    (tmp_path / "left" / "collections.sqlite").unlink()
    (tmp_path / "left" / "collections.sqlite-wal").write_bytes(b"of another database")
    with pytest.raises(StorageError, match="not empty .collections.sqlite-wal.:"):
        restore_directory(snapshot, tmp_path / "left")
    with pytest.raises(StorageError, match="is not empty"):
        restore_directory(snapshot, tmp_path / "new")
    snapshot.write_bytes(snapshot.read_bytes()[:20_000])
    with pytest.raises(StorageError, match="damaged"):
        restore_directory(snapshot, tmp_path / "newer")
    assert not (tmp_path / "newer").exists()


def test_a_snapshot_of_the_first_schema_is_read(tmp_path: Path, catalogue: Collections) -> None:
    old = tmp_path / "old.sqlite"
    connection = sqlite3.connect(old)
    connection.executescript(
        """
        CREATE TABLE collections (cid INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
            fingerprint TEXT NOT NULL, dimensions INTEGER NOT NULL, created_at REAL NOT NULL,
            seq INTEGER NOT NULL DEFAULT 0) STRICT;
        CREATE TABLE items (rid INTEGER PRIMARY KEY, cid INTEGER NOT NULL, id TEXT NOT NULL,
            seq INTEGER NOT NULL, metadata TEXT NOT NULL, sha256 TEXT NOT NULL, source TEXT, deleted_at REAL,
            UNIQUE (cid, id)) STRICT;
        CREATE TABLE vectors (rid INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT;
        CREATE TABLE thumbnails (rid INTEGER PRIMARY KEY, webp BLOB NOT NULL) STRICT;
        INSERT INTO collections VALUES (1, 'photos', 'f', 2, 0.0, 1);
        INSERT INTO items VALUES (1, 1, 'a', 1, '{}', '', NULL, NULL), (2, 1, 'b', 1, '{}', '', NULL, 5.0);
        INSERT INTO vectors VALUES (1, X'0000803F00000000'), (2, X'0000803F00000000');
        PRAGMA application_id = 1145654863; PRAGMA user_version = 1;
        """
    )
    connection.close()
    with SnapshotFile.open(old) as snapshot:
        assert [(info.name, info.items) for info in snapshot.collections()] == [("photos", 1)]
    restore_collection(catalogue, old, "photos")
    assert [found.id for found in catalogue.get("photos").scroll(cursor=None, limit=10).items] == ["a"]
