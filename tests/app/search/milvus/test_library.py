"""Collections on a real Milvus server: what is its own, beside the contract of every engine."""

import logging
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from app.errors import (
    CollectionExists,
    InvalidCollection,
    InvalidItem,
    ServiceError,
    StorageError,
    UnknownCollection,
    Unsupported,
)
from app.search.bounds import Bounds
from app.search.collection import Item
from app.search.milvus import search as milvus_search
from app.search.milvus import table as milvus_table
from app.search.milvus.library import MilvusCollections
from app.search.milvus.rows import MAX_THUMBNAIL_BYTES
from app.search.milvus.search import Wanted, compare_all, cosines, nearest
from tests.app.milvus_server import running_milvus
from tests.app.search.samples import MODEL, D, ids_found, items, milvus_collections, vectors

EVERYTHING = Bounds(None, None)


def space_of(collections: MilvusCollections) -> str:
    return collections._names._space


def test_what_one_service_writes_another_finds(on_milvus: MilvusCollections, milvus_url: str) -> None:
    first = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    with MilvusCollections.open(milvus_url, space=space_of(on_milvus)) as elsewhere:
        second = elsewhere.get("pictures")
        batch = items(50)
        for n, item in enumerate(batch):
            writer, reader = (first, second) if n % 2 else (second, first)
            assert writer.upsert([item], fingerprint=MODEL) == ["added"]
            assert reader.upsert([item], fingerprint=MODEL) == ["unchanged"]
            assert ids_found(reader, item.vector, k=1) == [item.id]
            assert reader.count() == n + 1
        seq = second.seq
        assert first.delete(["album/0000"]) == 1
        assert second.seq != seq
        assert second.get(["album/0000"]) == [None]
        assert second.undelete(["album/0000"]) == 1
        assert first.count() == 50
        elsewhere.set_alias("current", "pictures")
        assert on_milvus.get("current").count() == 50
        elsewhere.drop("pictures")
        with pytest.raises(UnknownCollection):
            first.search(vectors(1), k=1)
        with pytest.raises(UnknownCollection):
            on_milvus.get("current")


def test_of_two_services_that_take_a_name_at_once_one_gets_it(
    on_milvus: MilvusCollections, milvus_url: str
) -> None:
    outcomes: list[str] = []

    def take(collections: MilvusCollections) -> None:
        try:
            collections.create("default", fingerprint=MODEL, dimensions=D)
            outcomes.append("made")
        except CollectionExists:
            outcomes.append("exists")

    with MilvusCollections.open(milvus_url, space=space_of(on_milvus)) as elsewhere:
        threads = [threading.Thread(target=take, args=(who,)) for who in (on_milvus, elsewhere) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(outcomes) == ["exists"] * 5 + ["made"]
    assert [info.name for info in on_milvus.list()] == ["default"]


def test_collections_of_others_are_left_alone(on_milvus: MilvusCollections) -> None:
    server = on_milvus._server
    foreign = f"{space_of(on_milvus)}_photos"
    schema = server.pymilvus.MilvusClient.create_schema(auto_id=True)
    schema.add_field("id", server.pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("v", server.pymilvus.DataType.FLOAT_VECTOR, dim=2)
    server.call("create_collection", foreign, schema=schema)
    try:
        on_milvus.create("photos", fingerprint=MODEL, dimensions=D)
        assert [info.name for info in on_milvus.list()] == ["photos"]
        on_milvus.drop("photos")
        assert foreign in server.call("list_collections")
    finally:
        server.call("drop_collection", foreign)


def test_two_spaces_do_not_see_each_other(on_milvus: MilvusCollections, milvus_url: str) -> None:
    on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    with milvus_collections(milvus_url) as other:
        assert other.list() == []
        other.create("pictures", fingerprint="another", dimensions=D)
    assert on_milvus.get("pictures").fingerprint == MODEL


def test_dropping_leaves_nothing_behind(on_milvus: MilvusCollections) -> None:
    on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    on_milvus.set_alias("current", "pictures")
    on_milvus.begin_successor("pictures", fingerprint="new", dimensions=D)
    retired = on_milvus.finish_successor("pictures")
    on_milvus.begin_successor("pictures", fingerprint="newer", dimensions=D)
    on_milvus.drop("pictures")
    assert on_milvus.get(retired).fingerprint == MODEL
    on_milvus.drop(retired)
    left = [n for n in on_milvus._server.call("list_collections") if n.startswith(space_of(on_milvus))]
    assert left == []


def test_a_finish_that_was_cut_short_after_its_moment_is_finished(on_milvus: MilvusCollections) -> None:
    on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    on_milvus.begin_successor("pictures", fingerprint="new", dimensions=D)
    stand = on_milvus._named("pictures")
    successor = on_milvus._must_have_successor(stand)
    on_milvus._server.call("alter_alias", successor.server_name, on_milvus._names.current(stand.token))
    assert on_milvus.get("pictures").fingerprint == "new"
    assert on_milvus.list()[0].successor is None
    with pytest.raises(UnknownCollection, match="no successor"):
        on_milvus.finish_successor("pictures")
    again = on_milvus.begin_successor("pictures", fingerprint="newer", dimensions=D)
    assert (again.fingerprint, again.count()) == ("newer", 0)


def test_snapshots_are_the_servers_own_business(on_milvus: MilvusCollections, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="milvus-backup"):
        on_milvus.snapshot(tmp_path / "copy")


def test_dimensions_have_the_servers_own_bound(on_milvus: MilvusCollections) -> None:
    with pytest.raises(InvalidCollection, match="1 to 32768"):
        on_milvus.create("wide", fingerprint=MODEL, dimensions=32_769)
    on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    with pytest.raises(InvalidCollection, match="1 to 32768"):
        on_milvus.begin_successor("pictures", fingerprint="wide", dimensions=40_000)


def test_one_dimension_is_enough(on_milvus: MilvusCollections) -> None:
    narrow = on_milvus.create("narrow", fingerprint=MODEL, dimensions=1)
    narrow.upsert(
        [
            Item(id=i, vector=np.array([v], dtype=np.float32), metadata={})
            for i, v in (("a", 3.0), ("b", -0.5))
        ],
        fingerprint=MODEL,
    )
    (found,) = narrow.search(np.array([[9.0]]), k=5)
    assert [(n.id, n.score) for n in found] == [("a", 1.0), ("b", -1.0)]


def test_a_thumbnail_is_kept_up_to_what_milvus_keeps_and_left_out_above(
    on_milvus: MilvusCollections, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    fits, too_large = bytes(MAX_THUMBNAIL_BYTES), bytes(MAX_THUMBNAIL_BYTES + 1)
    (vector,) = vectors(1)
    batch = [
        Item(id=item_id, vector=vector, metadata={}, sha256="a" * 64, thumbnail=thumbnail)
        for item_id, thumbnail in (("a", fits), ("b", too_large))
    ]
    with caplog.at_level(logging.WARNING):
        assert pictures.upsert(batch, fingerprint=MODEL) == ["added", "added"]
    assert caplog.text.count("the thumbnail of 'b' is larger than the 49149 bytes") == 1
    assert pictures.thumbnail("a") == fits
    assert pictures.thumbnail("b") is None
    assert pictures.upsert(batch, fingerprint=MODEL) == ["unchanged", "unchanged"]


def test_metadata_whose_copy_for_filters_is_too_large_is_refused(on_milvus: MilvusCollections) -> None:
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    metadata = {"-" * (10 + n): [n] for n in range(150)}
    with pytest.raises(InvalidItem, match="item 0 takes"):
        pictures.upsert([Item(id="a", vector=vectors(1)[0], metadata=metadata)], fingerprint=MODEL)  # type: ignore[arg-type]
    assert pictures.count() == 0


def test_what_nobody_can_undelete_is_erased(
    on_milvus: MilvusCollections, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    pictures.upsert(items(5), fingerprint=MODEL)
    pictures.delete(["album/0000", "album/0001"])
    assert pictures._table.count("deleted_ms > 0") == 2
    pictures._table._erase_at = 0.0
    monkeypatch.setattr(milvus_table, "GRACE_S", -1.0)  # as if a week had passed
    pictures.delete(["album/0002"])
    assert pictures._table.count("deleted_ms > 0") == 0
    assert pictures.count() == 2
    assert pictures.undelete(["album/0000"]) == 0


def test_large_batches_are_written_in_several_requests(
    on_milvus: MilvusCollections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_table, "REQUEST_BYTES", 20_000)
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    batch = items(100)
    assert pictures.upsert(batch, fingerprint=MODEL) == ["added"] * 100
    assert pictures.count() == 100
    assert pictures.delete([item.id for item in batch]) == 100
    assert pictures.undelete([item.id for item in batch]) == 100
    assert len(pictures.scroll(cursor=None, limit=1_000).items) == 100


def test_ties_beyond_the_answer_are_in_order_of_id_and_comparing_all_agrees(
    on_milvus: MilvusCollections,
) -> None:
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    first, second = vectors(2)
    order = np.random.default_rng(0).permutation(600)
    batch = [Item(id=f"{i:04}", vector=first if i % 3 else second, metadata={}) for i in order.tolist()]
    pictures.upsert(batch, fingerprint=MODEL)
    query_QD = (first / np.linalg.norm(first))[None]
    wanted = Wanted(count=7, where=milvus_table.LIVE, bounds=EVERYTHING)
    expected = [f"{i:04}" for i in range(600) if i % 3][:7]
    for search in (nearest, compare_all):
        (hits,) = search(pictures._table, query_QD, wanted)
        assert [(hit.row["id"], hit.score) for hit in hits] == [(item_id, 1.0) for item_id in expected]


def test_more_ties_than_a_server_answers_with_are_compared_one_by_one(
    on_milvus: MilvusCollections, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milvus_search, "WINDOW", 50)
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    (vector,) = vectors(1)
    pictures.upsert([Item(id=f"{i:04}", vector=vector, metadata={}) for i in range(200)], fingerprint=MODEL)
    assert ids_found(pictures, vector, k=30) == [f"{i:04}" for i in range(30)]


def test_a_sealed_index_finds_nearly_all_and_exact_search_finds_all(on_milvus: MilvusCollections) -> None:
    dimensions, count = 64, 6_000
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=dimensions)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, dimensions))
    made = (centres[rng.integers(60, size=count)] + 0.4 * rng.normal(size=(count, dimensions))).astype(
        np.float32
    )
    for start in range(0, count, 1_000):
        batch = [
            Item(id=f"{i:05}", vector=made[i], metadata={"tenth": i % 10})
            for i in range(start, start + 1_000)
        ]
        pictures.upsert(batch, fingerprint=MODEL)
    on_milvus._server.call("flush", pictures._table.generation.server_name)
    deadline = time.monotonic() + 60
    while pictures.stats().indexed < count and time.monotonic() < deadline:
        time.sleep(0.2)
    assert pictures.stats().indexed == count
    assert pictures.explain().method == "milvus:HNSW"
    assert pictures.explain(exact=True).method == "exact"
    found, shared = 0, 0
    for query in made[:20]:
        order = np.argsort(-cosines(query, made), kind="stable")
        truth = [f"{i:05}" for i in order[:10]]
        assert ids_found(pictures, query, exact=True) == truth
        shared += len({*truth} & {*ids_found(pictures, query)})
        tenth = [f"{i:05}" for i in order if i % 10 == 3][:10]
        found += len({*tenth} & {*ids_found(pictures, query, filter={"field": "tenth", "eq": 3})})
    assert shared >= 0.97 * 200
    assert found >= 0.97 * 200


def test_a_server_that_is_not_there_is_named_without_its_token(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(
            StorageError, match=f"no Milvus server answers at http://127.0.0.1:{port}: start it"
        ):
            MilvusCollections.open(f"http://127.0.0.1:{port}", token="root:secret")
    assert "secret" not in caplog.text


def test_without_the_package_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(StorageError, match=r"pip install 'dinoserve\[milvus\]'"):
        MilvusCollections.open("http://127.0.0.1:1")


def test_a_collection_that_somebody_released_is_loaded_again(on_milvus: MilvusCollections) -> None:
    pictures = on_milvus.create("pictures", fingerprint=MODEL, dimensions=D)
    batch = items(5)
    pictures.upsert(batch, fingerprint=MODEL)
    on_milvus._server.call("release_collection", pictures._table.generation.server_name)
    assert ids_found(pictures, batch[0].vector, k=1) == ["album/0000"]
    assert pictures.count() == 5


@pytest.mark.slow
def test_a_killed_server_is_said_to_be_gone_and_has_everything_when_it_is_back(tmp_path: Path) -> None:
    with running_milvus(tmp_path / "server") as server:
        collections = MilvusCollections.open(server.url)
        pictures = collections.create("pictures", fingerprint=MODEL, dimensions=D)
        batch = items(100)
        pictures.upsert(batch, fingerprint=MODEL)
        pictures.delete(["album/0001"])
        server.kill()
        started = time.monotonic()
        for call in (
            lambda: pictures.search(vectors(1), k=1),
            lambda: pictures.upsert(items(1), fingerprint=MODEL),
            lambda: collections.get("pictures"),
        ):
            with pytest.raises(StorageError, match=f"no Milvus server answers at {server.url}"):
                call()
        assert time.monotonic() - started < 60
    with running_milvus(tmp_path / "server", port=server.port), collections:
        deadline = time.monotonic() + 120
        while True:
            try:
                assert pictures.count() == 99
                break
            except ServiceError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        for item in batch[2:]:
            assert ids_found(pictures, item.vector, k=1) == [item.id]
        assert pictures.undelete(["album/0001"]) == 1
        assert collections.get("pictures").count() == 100
