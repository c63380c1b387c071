"""Pictures to items: what a collection has already is not embedded again, the rest gets vector and thumbnail.

The service's routes and `index add` without a service both come through here. No HTTP; what writes the items
is the caller's `Collection.upsert`.

Dimension key: D embedding
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from app.errors import Overloaded, TooLarge
from app.fetching import URL_NOT_TAKEN, Fetcher, ImageAddress
from app.inference.engine import Engine
from app.inference.features import Reading
from app.inference.results import ImageEmbedding, ImageFailure
from app.search.collection import Collection, Item, Json, Vector
from app.thumbnails import make_thumbnail
from dino_core.errors import ImageError
from dino_core.preprocess import ImageLimits

Embed: TypeAlias = Callable[[list[bytes]], Awaitable[list[ImageEmbedding | ImageFailure]]]

LONGEST_DEADLINE_S: Final = 600.0  # for those who wait: a batch behind a queue of many


@dataclass(frozen=True, kw_only=True)
class Addition:
    """One item that wants to join: a picture, or an embedding that was made elsewhere.

    Attributes:
        id: None: the SHA-256 of the picture's bytes.
        content: The picture's file or address, float32 [D], or why what was sent is none of these.
    """

    id: str | None
    content: bytes | ImageAddress | Vector | ImageFailure
    metadata: dict[str, Json]
    source: str | None


async def make_items(
    additions: Sequence[Addition],
    *,
    collection: Collection,
    embed: Embed,
    workers: ThreadPoolExecutor,
    limits: ImageLimits,
    fetcher: Fetcher | None = None,
) -> list[Item | ImageFailure]:
    """Makes items to write.

    A picture that the collection has under its id, by its hash, keeps its vector and its thumbnail, so that
    sending it again costs little, and new metadata cost no embedding.

    Args:
        additions: Checked; embeddings have the collection's dimensions and model.
        collection: That they shall join; nothing is written.
        embed: Embeds files; what it raises is raised.
        workers: For disk and codecs.
        limits: What a thumbnail may ask of the decoder.
        fetcher: Of pictures that are named by URL; None: such fail.

    Returns:
        For each addition, in order, an item or why there is none.
    """
    loop = asyncio.get_running_loop()
    additions = await _with_files(additions, fetcher)
    made = await loop.run_in_executor(workers, _without_embedding, additions, collection)
    # As (place, file) pairs: those that are neither there already nor vectors nor failures.
    files = [
        (place, addition.content)
        for place, (addition, item) in enumerate(zip(additions, made, strict=True))
        if item is None and isinstance(addition.content, bytes)
    ]
    results = await embed([data for _, data in files]) if files else []
    thumbnails = await asyncio.gather(
        *(
            loop.run_in_executor(workers, _thumbnail, data, limits)
            for (_, data), result in zip(files, results, strict=True)
            if isinstance(result, ImageEmbedding)
        )
    )
    next_thumbnail = iter(thumbnails)
    for (place, _), result in zip(files, results, strict=True):
        made[place] = (
            result
            if isinstance(result, ImageFailure)
            else _item(additions[place], result, next(next_thumbnail))
        )
    return [item for item in made if item is not None]


async def embed_patiently(
    engine: Engine,
    images: list[bytes],
    *,
    reading: Reading | None = None,
    deadline_s: float = LONGEST_DEADLINE_S,
) -> list[ImageEmbedding | ImageFailure]:
    """Embeds files for a caller who waits: later where the engine is busy, by halves where they are too many.

    They go in the bulk lane: nobody waits for one of them alone.

    Args:
        engine: Started.
        images: Whole files.
        reading: As for `Engine.embed`.
        deadline_s: For one answer of the engine.

    Raises:
        NotReady: It stops, or its device is lost.
        DeadlineExceeded: It took longer than anybody waits.
    """
    while True:
        try:
            return await engine.embed(images, reading=reading, lane="bulk", deadline_s=deadline_s)
        except Overloaded as busy:
            await asyncio.sleep(busy.retry_after_s)
        except TooLarge as error:
            if len(images) == 1:
                return [ImageFailure(error.code, error.title, limit=error.limit, actual=error.actual)]
            half = len(images) // 2
            first = await embed_patiently(engine, images[:half], reading=reading, deadline_s=deadline_s)
            second = await embed_patiently(engine, images[half:], reading=reading, deadline_s=deadline_s)
            return first + second


async def _with_files(additions: Sequence[Addition], fetcher: Fetcher | None) -> Sequence[Addition]:
    addresses = [one.content for one in additions if isinstance(one.content, ImageAddress)]
    if not addresses:
        return additions
    found = iter([URL_NOT_TAKEN] * len(addresses) if fetcher is None else await fetcher.fetch_all(addresses))
    return [
        replace(one, content=next(found)) if isinstance(one.content, ImageAddress) else one
        for one in additions
    ]


def _without_embedding(
    additions: Sequence[Addition], collection: Collection
) -> list[Item | ImageFailure | None]:
    """What can be made without the model; None for pictures that have to be embedded."""
    hashes = [_sha256(addition.content) for addition in additions]
    ids = [addition.id or sha256 for addition, sha256 in zip(additions, hashes, strict=True)]
    there = collection.get(ids)
    return [
        _kept(addition, item, sha256, collection)
        for addition, item, sha256 in zip(additions, there, hashes, strict=True)
    ]


def _kept(
    addition: Addition, there: Item | None, sha256: str, collection: Collection
) -> Item | ImageFailure | None:
    if isinstance(addition.content, ImageFailure):
        return addition.content
    assert not isinstance(addition.content, ImageAddress), "an image was not fetched: this is a bug"
    if not isinstance(addition.content, bytes):
        assert addition.id is not None, "an embedding was let in without an id: this is a bug"
        return Item(
            id=addition.id, vector=addition.content, metadata=addition.metadata, source=addition.source
        )
    if there is None or there.sha256 != sha256:
        return None
    return replace(
        there,
        metadata=addition.metadata,
        source=addition.source,
        thumbnail=collection.thumbnail(there.id),
    )


def _sha256(content: object) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else ""


def _thumbnail(data: bytes, limits: ImageLimits) -> bytes | None:
    try:
        return make_thumbnail(data, limits=limits)
    except ImageError:
        return None  # it was decoded a moment ago; an item without a thumbnail is better than none


def _item(addition: Addition, result: ImageEmbedding, thumbnail: bytes | None) -> Item:
    return Item(
        id=addition.id if addition.id is not None else result.sha256,
        vector=result.embedding,
        metadata=addition.metadata,
        sha256=result.sha256,
        source=addition.source,
        thumbnail=thumbnail,
    )
