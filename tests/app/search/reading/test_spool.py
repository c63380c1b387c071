from pathlib import Path

import numpy as np
import pytest

from app.errors import UnknownCollection
from app.search.collection import Item
from app.search.embedded.library import Collections
from app.search.reading.spool import PAGE_ITEMS, open_spool, write_spool
from tests.app.search.planted import MODEL, directions, fill, ignore, spool_of


def test_a_spool_has_every_item_in_order_of_id(tmp_path: Path) -> None:
    count = 2 * PAGE_ITEMS + 3
    vectors = directions(count, 6)
    spool = spool_of(tmp_path, vectors)
    assert len(spool) == count
    assert spool.ids.take([0, count - 1]) == ["item/000000", f"item/{count - 1:06}"]
    np.testing.assert_allclose(spool.vectors_ND, vectors, atol=1e-6)
    assert not spool.hashes.any()


def test_hashes_are_bytes_and_zeros_where_there_was_no_image(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, directions(3, 6), hashes=["ab" * 32, "", "00" * 31 + "01"])
    assert [bytes(row).hex() for row in spool.hashes] == ["ab" * 32, "00" * 32, "00" * 31 + "01"]


def test_an_empty_collection_has_an_empty_spool(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, np.empty((0, 6), np.float32))
    assert (len(spool), spool.vectors_ND.shape, spool.hashes.shape) == (0, (0, 6), (0, 32))


def test_a_copy_stops_when_it_is_cancelled(tmp_path: Path) -> None:
    with Collections.open(tmp_path / "data") as collections:
        collection = collections.create("default", fingerprint=MODEL, dimensions=6)
        fill(collection, directions(3 * PAGE_ITEMS, 6))
        shares: list[float] = []
        (tmp_path / "spool").mkdir()
        write_spool(
            collection, tmp_path / "spool", report=shares.append, is_cancelled=lambda: len(shares) == 1
        )
    assert len(shares) == 1
    assert len(open_spool(tmp_path / "spool", dimensions=6)) == PAGE_ITEMS


def test_a_collection_dropped_meanwhile_is_said_to_be(tmp_path: Path) -> None:
    with Collections.open(tmp_path / "data") as collections:
        collection = collections.create("default", fingerprint=MODEL, dimensions=2)
        collection.upsert([Item(id="a", vector=directions(1, 2)[0], metadata={})], fingerprint=MODEL)
        collections.drop("default")
        (tmp_path / "spool").mkdir()
        with pytest.raises(UnknownCollection):
            write_spool(collection, tmp_path / "spool", report=ignore, is_cancelled=lambda: False)
