"""Copies of collections are the same on every engine: out to Parquet and in, and out of a snapshot."""

import io
from pathlib import Path

import numpy as np
import pytest

from app.errors import CollectionExists, SuccessorExists, Unsupported
from app.search.collection import Catalogue, Collection, Item
from app.search.embedded.library import Collections
from app.search.embedded.restoring import restore_collection
from app.search.embedded.snapshot_files import Snapshots
from app.search.milvus.library import MilvusCollections
from app.search.parquet import export_collection
from app.search.parquet_import import import_collection

D = 48
MODEL = "sha256:copied"


def fill(collection: Collection, *, count: int = 300, version: int = 0) -> None:
    rng = np.random.default_rng(version)
    collection.upsert(
        [
            Item(
                id=f"a/{number:04} ü",
                vector=rng.standard_normal(D).astype(np.float32),
                metadata={"number": number, "version": version, "deep": {"a": [1, None, "ü"]}},
                sha256=f"{number:064x}" if number % 2 else "",
                source=f"/photos/{number}" if number % 3 else None,
                thumbnail=b"RIFF\x00" * 20 if number % 5 else None,
            )
            for number in range(count)
        ],
        fingerprint=MODEL,
    )


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


def test_a_collection_that_was_exported_and_imported_is_equal_bit_for_bit(catalogue: Catalogue) -> None:
    photos = catalogue.create("photos", fingerprint=MODEL, dimensions=D)
    fill(photos)
    file = io.BytesIO()
    assert export_collection(photos, file) == 300
    done = import_collection(catalogue, "copy", file)
    assert (done.created, done.added) == (True, 300)
    assert contents(catalogue.get("copy")) == contents(photos)
    assert import_collection(catalogue, "copy", file).unchanged == 300


def test_a_collection_moves_from_a_directory_to_any_engine_by_a_snapshot(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    with Collections.open(tmp_path / "elsewhere") as elsewhere:
        theirs = elsewhere.create("photos", fingerprint=MODEL, dimensions=D)
        fill(theirs)
        expected = contents(theirs)
        folder = tmp_path / "snapshots"
        snapshot = folder / Snapshots(folder).make(elsewhere).name
    assert restore_collection(catalogue, snapshot, "photos").previous is None
    assert contents(catalogue.get("photos")) == expected
    fill(catalogue.get("photos"), version=1)
    restored = restore_collection(catalogue, snapshot, "photos")
    assert contents(catalogue.get("photos")) == expected
    assert restored.previous is not None
    assert catalogue.get(restored.previous).get(["a/0000 ü"])[0] is not None
    with pytest.raises(CollectionExists):
        restore_collection(catalogue, snapshot, "photos", as_name="photos")
    catalogue.begin_successor("photos", fingerprint=MODEL, dimensions=D)
    with pytest.raises(SuccessorExists):
        restore_collection(catalogue, snapshot, "photos")


def test_a_search_server_has_its_own_tool_for_snapshots(on_milvus: MilvusCollections, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "snapshots")
    with pytest.raises(Unsupported, match="milvus-backup"):
        snapshots.make(on_milvus)
    assert snapshots.list() == []
