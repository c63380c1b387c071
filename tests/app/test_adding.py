"""Pictures to items, with a real engine of colours and a real collection."""

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from app.adding import Addition, embed_patiently, make_items
from app.inference.config import InferenceConfig
from app.inference.engine import Engine
from app.inference.results import ImageEmbedding, ImageFailure
from app.search.collection import Collection, Item
from app.search.embedded.library import Collections
from dino_core.preprocess import ImageLimits
from tests.app.inference.colours import ColourEmbedder, picture

T = TypeVar("T")
MODEL = "sha256:colours"


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collections.open(tmp_path / "data") as catalogue:
        yield catalogue.create("colours", fingerprint=MODEL, dimensions=3)


def with_engine(engine: Engine, work: "Coroutine[object, object, T]") -> T:
    async def run() -> T:
        await engine.start()
        try:
            return await asyncio.wait_for(work, 20)
        finally:
            await engine.stop()

    return asyncio.run(run())


def made(collection: Collection, *additions: Addition) -> tuple[list[Item | ImageFailure], int]:
    """Items, and how many pictures were embedded for them."""
    embedder = ColourEmbedder()
    engine = Engine(embedder, InferenceConfig(cache_rows=0))
    with ThreadPoolExecutor(2) as workers:
        items = with_engine(
            engine,
            make_items(
                additions,
                collection=collection,
                embed=lambda images: embed_patiently(engine, images),
                workers=workers,
                limits=ImageLimits(),
            ),
        )
    collection.upsert([item for item in items if isinstance(item, Item)], fingerprint=MODEL)
    return items, sum(len(batch) for batch in embedder.batches)


def addition(item_id: str | None, content: bytes, **metadata: str) -> Addition:
    return Addition(id=item_id, content=content, metadata=dict(metadata), source=None)


def test_what_the_collection_has_is_not_embedded_again(collection: Collection) -> None:
    red, blue = picture((200, 0, 0)), picture((0, 0, 200))
    both = [addition("red", red), addition(None, blue)]
    assert made(collection, *both)[1] == 2
    assert made(collection, *both)[1] == 0
    assert made(collection, addition("red", blue))[1] == 1  # another picture under the same id
    assert made(collection, addition("other", red))[1] == 1  # the same under another


def test_new_metadata_cost_no_embedding_and_keep_the_thumbnail(collection: Collection) -> None:
    red = picture((200, 0, 0))
    made(collection, addition("red", red, kind="colour"))
    thumbnail = collection.thumbnail("red")
    assert thumbnail is not None
    (item,), embedded = made(collection, addition("red", red, kind="paint"))
    assert embedded == 0
    assert isinstance(item, Item)
    assert collection.thumbnail("red") == thumbnail
    (stored,) = collection.get(["red"])
    assert stored is not None
    assert stored.metadata == {"kind": "paint"}
    np.testing.assert_allclose(stored.vector, [1, 0, 0], atol=0.02)


def test_failures_stay_in_their_places(collection: Collection) -> None:
    failed = ImageFailure("invalid_base64", "no")
    items, _ = made(
        collection,
        Addition(id="x", content=failed, metadata={}, source=None),
        addition("red", picture((200, 0, 0))),
        addition("text", b"no picture"),
        Addition(id="v", content=np.ones(3, np.float32), metadata={}, source="s"),
    )
    assert items[0] is failed
    assert [type(item) is Item for item in items] == [False, True, False, True]
    assert isinstance(items[3], Item)
    assert (items[3].sha256, items[3].source, items[3].thumbnail) == ("", "s", None)


def test_who_waits_is_served_when_there_is_room_and_in_parts(collection: Collection) -> None:
    embedder = ColourEmbedder()
    config = InferenceConfig(
        max_images_per_request=4, max_images_in_flight=4, max_pixels_in_flight=2_000, cache_rows=0,
        limits=ImageLimits(max_pixels=1_000),
    )  # fmt: skip
    engine = Engine(embedder, config)
    colours = [(20 * number, 0, 0) for number in range(1, 11)]

    async def work() -> list[list[ImageEmbedding | ImageFailure]]:
        images = [picture(colour) for colour in colours]
        return await asyncio.gather(*(embed_patiently(engine, images) for _ in range(3)))

    for results in with_engine(engine, work()):
        assert all(isinstance(result, ImageEmbedding) for result in results)
        reds = [result.embedding[0] for result in results if isinstance(result, ImageEmbedding)]
        np.testing.assert_allclose(reds, [colour[0] for colour in colours], atol=2)
