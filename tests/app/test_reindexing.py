"""A collection of one model made anew with another: two real bundles, a real engine, real collections."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from app.errors import NothingToReindex, StorageError, UnknownCollection
from app.inference.blocking import BlockingEngine, Stopped, blocking_engine
from app.inference.results import ImageEmbedding, ImageFailure
from app.reindexing import Embed, Progress, Reindex, read_source
from app.search.collection import Catalogue, Collection, Item
from app.search.embedded.library import Collections
from app.thumbnails import make_thumbnail
from dino_core.bundle import load_bundle
from tests.app.running import picture, write_tiny_bundle
from tests.app.search.samples import milvus_collections

OLD = "sha256:old"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingEngine]:
    bundle = load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("models") / "new", seed=1))
    with blocking_engine(bundle) as running:
        yield running


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Collections]:
    with Collections.open(tmp_path / "data") as collections:
        yield collections


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def item(photos: Path, number: int, *, version: int = 0, thumbnail: bool = True) -> Item:
    """A picture on disk, as `index add` keeps it, with a vector of the old model, which had 7 dimensions."""
    data = picture(1_000 * version + number)
    path = photos / f"{number:04}-{version}.jpg"
    path.write_bytes(data)
    return Item(
        id=f"{number:04}",
        vector=np.random.default_rng(number).standard_normal(7).astype(np.float32),
        metadata={"number": number, "version": version},
        sha256=hashlib.sha256(data).hexdigest(),
        source=str(path),
        thumbnail=make_thumbnail(data) if thumbnail else None,
    )


def old_collection(catalogue: Catalogue, items: Sequence[Item]) -> Collection:
    collection = catalogue.create("photos", fingerprint=OLD, dimensions=7)
    collection.upsert(items, fingerprint=OLD)
    return collection


def reindex(catalogue: Catalogue, engine: BlockingEngine, embed: Embed | None = None) -> Reindex:
    return Reindex(
        catalogue,
        "photos",
        engine.model,
        embed or engine.embed,
        batch_images=lambda: 4,
        max_image_bytes=10**6,
    )


def embedded(engine: BlockingEngine, data: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    (result,) = engine.embed([data], threading.Event())
    assert isinstance(result, ImageEmbedding)
    return result.embedding


def all_items(collection: Collection) -> dict[str, Item]:
    return {found.id: found for found in collection.scroll(cursor=None, limit=1_000).items}


def assert_made(catalogue: Catalogue, engine: BlockingEngine, expected: Sequence[Item]) -> None:
    new = catalogue.get("photos")
    assert (new.fingerprint, new.dimensions) == (engine.model.fingerprint, engine.model.dimensions)
    found = all_items(new)
    assert sorted(found) == sorted(one.id for one in expected)
    for one in expected:
        assert one.source is not None
        made = found[one.id]
        assert (made.metadata, made.sha256, made.source) == (one.metadata, one.sha256, one.source)
        assert float(made.vector @ embedded(engine, Path(one.source).read_bytes())) > 0.9999
        assert new.thumbnail(one.id) is not None


def test_every_item_is_made_from_its_source_and_the_name_leads_to_it_at_once(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    items = [item(photos, number, thumbnail=number % 2 == 0) for number in range(30)]
    old = old_collection(catalogue, items)
    catalogue.set_alias("best", "photos")
    running = reindex(catalogue, engine)
    assert (running.progress.state, running.progress.of) == ("running", 30)
    assert catalogue.get("photos") is old
    ended = running.run()
    assert (ended.state, ended.done, ended.of, ended.failed) == ("done", 30, 30, 0)
    assert (ended.from_source, ended.from_thumbnails, ended.warnings, ended.error) == (30, 0, [], None)
    assert (ended.from_fingerprint, ended.to_fingerprint) == (OLD, engine.model.fingerprint)
    assert_made(catalogue, engine, items)
    assert catalogue.get("best").fingerprint == engine.model.fingerprint
    assert ended.previous is not None
    assert catalogue.get(ended.previous).count() == 30
    with pytest.raises(NothingToReindex, match="already"):
        reindex(catalogue, engine)


def test_what_has_no_source_any_more_is_made_from_its_thumbnail_and_that_is_said(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    items = [item(photos, number) for number in range(8)]
    Path(items[1].source or "").unlink()
    Path(items[2].source or "").write_bytes(picture(77))  # another picture is there now
    without_hash = Item(
        id="v", vector=items[0].vector, metadata={}, source=items[3].source, thumbnail=items[5].thumbnail
    )
    old_collection(catalogue, [*items, without_hash])
    ended = reindex(catalogue, engine).run()
    assert (ended.state, ended.from_source, ended.from_thumbnails) == ("done", 6, 3)
    (warning,) = ended.warnings
    assert warning.startswith("made from thumbnails: 3, ")
    made = all_items(catalogue.get("photos"))
    for one in (items[1], items[2]):
        assert one.thumbnail is not None
        assert float(made[one.id].vector @ embedded(engine, one.thumbnail)) > 0.9999
        assert (made[one.id].sha256, made[one.id].source) == (one.sha256, one.source)
    assert float(made["v"].vector @ made["0005"].vector) > 0.9  # its source can't be trusted


def test_items_without_a_picture_are_named_and_keep_it_from_switching(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    items = [item(photos, number, thumbnail=False) for number in range(6)]
    Path(items[1].source or "").unlink()
    bare = Item(id="v", vector=items[0].vector, metadata={})
    broken = Item(id="w", vector=items[0].vector, metadata={}, thumbnail=b"no picture")
    far = Item(
        id="x", vector=items[0].vector, metadata={}, sha256="0" * 64, source="http://127.0.0.1:9/a.jpg"
    )
    old = old_collection(catalogue, [*items, bare, broken, far])
    ended = reindex(catalogue, engine).run()
    assert (ended.state, ended.done, ended.failed, ended.error) == ("failed", 5, 4, None)
    assert {failed.id: failed.code for failed in ended.failures} == {
        "0001": "no_picture",
        "v": "no_picture",
        "w": "unsupported_format",
        "x": "no_picture",
    }
    assert "can be embedded: 4 (see failures)" in ended.warnings[0]
    assert catalogue.get("photos") is old
    again = reindex(catalogue, engine).run(skip_failed=True)
    assert (again.state, again.from_source, again.failed) == ("done", 0, 4)
    assert_made(catalogue, engine, [one for one in items if one.id != "0001"])
    assert again.previous is not None
    assert catalogue.get(again.previous).count() == 9


def test_what_is_written_meanwhile_joins(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    items = [item(photos, number) for number in range(40)]
    old = old_collection(catalogue, items)
    calls = 0

    def embed(images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
        nonlocal calls
        calls += 1
        if calls == 3:
            old.delete(["0000", "0039"])  # one that is made, one that isn't
            old.upsert([item(photos, 1, version=1), item(photos, 38, version=1)], fingerprint=OLD)
            old.upsert([item(photos, number) for number in (50, 51)], fingerprint=OLD)
        if calls == 11:  # in the second pass
            old.delete(["0050"])
        return engine.embed(images, stop)

    ended = reindex(catalogue, engine, embed).run()
    assert ended.state == "done"
    expected = [one for one in items if one.id not in {"0000", "0001", "0038", "0039"}]
    expected += [item(photos, 1, version=1), item(photos, 38, version=1), item(photos, 51)]
    assert_made(catalogue, engine, expected)
    assert ended.done == ended.of == len(expected)


def test_a_search_servers_collection_is_made_anew_as_well(
    engine: BlockingEngine, photos: Path, milvus_url: str
) -> None:
    items = [item(photos, number) for number in range(20)]
    with milvus_collections(milvus_url) as on_a_server:
        old = old_collection(on_a_server, items)
        calls = 0

        def embed(images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
            nonlocal calls
            calls += 1
            if calls == 3:
                old.delete(["0000", "0019"])
                old.upsert([item(photos, 1, version=1)], fingerprint=OLD)
            return engine.embed(images, stop)

        ended = reindex(on_a_server, engine, embed).run()
        assert (ended.state, ended.done, ended.of) == ("done", 18, 18)
        expected = [one for one in items if one.id not in {"0000", "0001", "0019"}]
        assert_made(on_a_server, engine, [*expected, item(photos, 1, version=1)])
        assert ended.previous is not None
        assert on_a_server.get(ended.previous).count() == 18


def test_another_thumbnail_of_an_item_without_a_hash_is_noticed(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    def vector_only(seed: int) -> Item:
        return Item(
            id="v",
            vector=np.random.default_rng(seed).standard_normal(7).astype(np.float32),
            metadata={},
            thumbnail=make_thumbnail(picture(seed)),
        )

    old = old_collection(catalogue, [vector_only(1)])
    calls = 0

    def embed(images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
        nonlocal calls
        calls += 1
        if calls == 1:
            old.upsert([vector_only(2)], fingerprint=OLD)
        return engine.embed(images, stop)

    assert reindex(catalogue, engine, embed).run().state == "done"
    thumbnail = make_thumbnail(picture(2))
    (made,) = all_items(catalogue.get("photos")).values()
    assert float(made.vector @ embedded(engine, thumbnail)) > 0.9999


def test_one_that_was_stopped_goes_on_and_makes_nothing_twice(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    items = [item(photos, number) for number in range(40)]
    old = old_collection(catalogue, items)
    images_seen = 0
    first: list[Reindex] = []

    def embed(images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
        nonlocal images_seen
        images_seen += len(images)
        results = engine.embed(images, stop)
        if images_seen >= 16:
            first[0].stop()
        return results

    first.append(reindex(catalogue, engine, embed))
    stopped = first[0].run()
    assert stopped.state == "stopped"
    assert 12 <= stopped.done < 40
    assert catalogue.get("photos") is old
    (info,) = catalogue.list()
    assert info.successor is not None
    assert info.successor.items == stopped.from_source
    again = reindex(catalogue, engine).run()
    assert (again.state, again.from_source) == ("done", 40 - stopped.from_source)
    assert_made(catalogue, engine, items)


def test_an_item_that_lost_its_picture_since_it_was_made_is_not_left_in_its_old_form(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    items = [item(photos, number, thumbnail=False) for number in range(4)]
    old = old_collection(catalogue, items)
    Path(items[3].source or "").unlink()
    assert reindex(catalogue, engine).run().failed == 1
    changed = item(photos, 0, version=1, thumbnail=False)
    old.upsert([changed], fingerprint=OLD)
    Path(changed.source or "").unlink()
    ended = reindex(catalogue, engine).run(skip_failed=True)
    assert (ended.state, ended.failed) == ("done", 2)
    assert sorted(all_items(catalogue.get("photos"))) == ["0001", "0002"]


def test_a_collection_that_is_dropped_meanwhile_ends_it_with_a_sentence(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    old_collection(catalogue, [item(photos, number) for number in range(8)])

    def embed(images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
        if catalogue.list():
            catalogue.drop("photos")
        return engine.embed(images, stop)

    running = reindex(catalogue, engine, embed)
    with pytest.raises((UnknownCollection, StorageError)):
        running.run()
    assert running.progress.state == "failed"
    assert running.progress.error is not None
    assert "'photos'" in running.progress.error


def test_the_time_that_is_left_is_told_from_the_rate(
    catalogue: Collections, engine: BlockingEngine, photos: Path
) -> None:
    old_collection(catalogue, [item(photos, number) for number in range(24)])
    seen: list[Progress] = []

    def embed(images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
        seen.append(running.progress)
        return engine.embed(images, stop)

    running = reindex(catalogue, engine, embed)
    assert running.run().eta_s is None
    assert seen[0].eta_s is None
    later = seen[-1]
    assert later.eta_s == pytest.approx((later.of - later.done) / later.images_per_s)


# Sources


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    (tmp_path / "kept.jpg").write_bytes(b"picture")
    return tmp_path / "kept.jpg"


SHA256 = hashlib.sha256(b"picture").hexdigest()


def test_a_source_with_the_bytes_of_then_is_read(kept: Path) -> None:
    assert read_source(str(kept), sha256=SHA256, max_bytes=7) == b"picture"
    (kept.parent / "link.jpg").symlink_to(kept)
    assert read_source(str(kept.parent / "link.jpg"), sha256=SHA256, max_bytes=7) == b"picture"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


def unreadable(folder: Path) -> str:
    (folder / "kept.jpg").rename(folder / "loop")
    (folder / "kept.jpg").symlink_to(folder / "kept.jpg")
    return str(folder / "kept.jpg")


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda folder: str(folder / "nowhere.jpg"), id="missing"),
        pytest.param(str, id="a folder"),
        pytest.param(pipe, id="a pipe, which would hang"),
        pytest.param(unreadable, id="a link to itself"),
        pytest.param(lambda _: "/dev/zero", id="a device without an end"),
        pytest.param(lambda _: "kept.jpg", id="relative"),
        pytest.param(lambda folder: f"file://{folder}/kept.jpg", id="a file's address"),
        pytest.param(lambda _: "http://127.0.0.1:9/kept.jpg", id="an address"),
        pytest.param(lambda folder: f"{folder}/kept.jpg\x00", id="NUL"),
        pytest.param(lambda folder: f"{folder}/{'x' * 4_000}", id="a name that is too long"),
        pytest.param(lambda folder: f"{folder}/\ud800", id="half a character"),
    ],
)
def test_a_source_that_is_no_such_file_is_none(kept: Path, source: Callable[[Path], str]) -> None:
    assert read_source(source(kept.parent), sha256=SHA256, max_bytes=100) is None


def test_a_file_with_other_bytes_or_too_many_is_not_given_away(kept: Path) -> None:
    assert read_source(str(kept), sha256="0" * 64, max_bytes=100) is None
    assert read_source(str(kept), sha256=SHA256, max_bytes=6) is None
    assert read_source("/etc/passwd", sha256=SHA256, max_bytes=10**6) is None


def test_a_wait_for_the_engine_ends_when_it_is_told(engine: BlockingEngine) -> None:
    stop = threading.Event()
    stop.set()
    pictures = [picture(seed) for seed in range(200)]
    with pytest.raises(Stopped):
        engine.embed(pictures, stop)
