"""`/collections/{name}/items`: add pictures, look at them, delete them.

An id may hold slashes: in a path it is percent-encoded, `a%2Fb.jpg`. See `app.api.guard.EncodedItemPaths`.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.responses import Response

from app.api import answers
from app.api.body import SentImage, Upload, images_from_json, read_upload
from app.api.embed import check_failures, embed_images, failure_answer, model_answer, on_error
from app.api.openapi import answer_of, body_of, example
from app.api.refusals import InvalidParameter, NoImages
from app.api.schemas import (
    AddAnswer,
    AddItems,
    AddParameters,
    ItemAnswer,
    ItemsAnswer,
    ListParameters,
    OnError,
    json_parameter,
    parse,
)
from app.api.state import State, StateDep, collection_of_this_model, in_worker, timed, while_connected
from app.errors import UnknownItem
from app.inference.results import ImageEmbedding, ImageFailure
from app.search.collection import Item, Json
from app.search.rows import check_id, check_words
from app.thumbnails import make_thumbnail
from dino_core.errors import ImageError
from dino_core.preprocess import ImageLimits

router = APIRouter(prefix="/collections/{name}/items", tags=["items"])

T = TypeVar("T")


def decoded_id(
    item_id: Annotated[str, Path(description="Percent-encoded: `a%2Fb.jpg` is the item `a/b.jpg`.")],
) -> str:
    """The id that a path names."""
    return unquote(item_id)


ItemId = Annotated[str, Depends(decoded_id)]


@dataclass(frozen=True)
class _Addition:
    """One picture that wants to join."""

    image: SentImage
    id: str | None
    metadata: dict[str, Json]
    source: str | None


@router.post(
    "",
    summary="Add pictures",
    responses={200: answer_of(AddAnswer)},
    openapi_extra=body_of(AddParameters, json_body=AddItems)
    | example("curl -F images=@cat.jpg -F ids=cats/1.jpg {origin}/collections/default/items"),
)
async def add_items(request: Request, name: str, state: StateDep) -> Response:
    """Embeds pictures and adds them, with thumbnails, ids and metadata.

    `added` and `updated` mean: on disk, and found by the next search. `unchanged` means that the same picture
    with the same metadata was there already, so sending a folder again costs little. Without ids, a picture's
    id is the SHA-256 of its bytes.
    """
    collection = await in_worker(state, collection_of_this_model, state, name)
    with timed(state, "receive"):
        upload = await read_upload(request, state, lists=("ids", "metadata", "sources"))
    # Off the event loop: a hundred megabytes of base64 may be in it.
    additions, choice, timeout_s = await in_worker(state, _checked_additions, upload)
    if not additions:
        raise NoImages("the request has no picture: send files in the field `images`, or JSON `items`")
    results, thumbnails = await while_connected(request, _prepare(state, additions, timeout_s))
    check_failures(results, choice)
    items = {
        index: _item(additions[index], result, thumbnails[index])
        for index, result in enumerate(results)
        if isinstance(result, ImageEmbedding)
    }
    with timed(state, "store"):
        statuses = await in_worker(
            state, collection.upsert, list(items.values()), fingerprint=state["engine"].model.fingerprint
        )
    data = [
        failure_answer(index, result)
        for index, result in enumerate(results)
        if isinstance(result, ImageFailure)
    ]
    data += [
        {"index": index, "id": item.id, "status": status}
        for (index, item), status in zip(items.items(), statuses, strict=True)
    ]
    content = {
        "model": model_answer(state["engine"].model),
        "collection": name,
        "data": sorted(data, key=lambda answer: int(answer["index"])),
    }
    return answers.structured(content, answers.JSON)


@router.get("", summary="List items", responses={200: answer_of(ItemsAnswer)})
async def list_items(name: str, state: StateDep, parameters: Annotated[ListParameters, Query()]) -> Response:
    """Lists items in order of id, a page at a time: all, or those whose metadata match a filter."""
    filter = None if parameters.filter is None else json_parameter("filter", parameters.filter)

    def page() -> dict[str, Any]:
        collection = state["catalogue"].get(name)
        found = collection.scroll(cursor=parameters.cursor, limit=parameters.limit, filter=filter)
        return {"data": [_item_answer(item) for item in found.items], "next_cursor": found.next_cursor}

    return answers.structured(await in_worker(state, page), answers.JSON)


@router.get(
    "/{item_id:path}/thumbnail",
    summary="See an item",
    responses={200: {"content": {"image/webp": {}}}},
)
async def read_thumbnail(request: Request, name: str, item_id: ItemId, state: StateDep) -> Response:
    """Answers with a small WebP."""
    webp = await in_worker(state, lambda: state["catalogue"].get(name).thumbnail(item_id))
    if webp is None:
        raise UnknownItem(f"collection {name!r} has no item {item_id!r}, or the item has no thumbnail")
    headers = {
        "ETag": f'"{hashlib.sha256(webp).hexdigest()[:32]}"',
        # Asked again each time, answered with 304 mostly: an item's picture may change.
        "Cache-Control": "private, no-cache",
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(webp, media_type="image/webp", headers=headers)


@router.get("/{item_id:path}", summary="Look at an item", responses={200: answer_of(ItemAnswer)})
async def read_item(name: str, item_id: ItemId, state: StateDep) -> Response:
    """Answers with an item's metadata and embedding."""
    (item,) = await in_worker(state, lambda: state["catalogue"].get(name).get([item_id]))
    if item is None:
        raise UnknownItem(f"collection {name!r} has no item {item_id!r}")
    return answers.structured(_item_answer(item) | {"embedding": item.vector}, answers.JSON)


@router.delete("/{item_id:path}", status_code=204, summary="Delete an item")
async def delete_item(name: str, item_id: ItemId, state: StateDep) -> Response:
    """Deletes an item; when the answer is there it is gone from disk and from searches."""
    deleted = await in_worker(state, lambda: state["catalogue"].get(name).delete([item_id]))
    if not deleted:
        raise UnknownItem(f"collection {name!r} has no item {item_id!r}")
    return Response(status_code=204)


def _checked_additions(upload: Upload) -> tuple[list[_Addition], OnError, float | None]:
    """What the request says, refused by its place there, and before anything is embedded."""
    additions, choice, timeout_s = _additions(upload)
    for index, addition in enumerate(additions):
        if addition.id is not None:
            check_id(addition.id, where=f"item {index}")
        check_words(metadata=addition.metadata, source=addition.source, where=f"item {index}")
    return additions, choice, timeout_s


def _additions(upload: Upload) -> tuple[list[_Addition], OnError, float | None]:
    if upload.in_body:
        said = parse(AddItems, upload.parameters)
        images = images_from_json([item.image for item in said.items], pointer="/items")
        return (
            [
                _Addition(image, item.id, item.metadata, item.source)
                for image, item in zip(images, said.items, strict=True)
            ],
            on_error(said.on_error, upload),
            said.timeout,
        )
    form = parse(AddParameters, upload.parameters)
    count = len(upload.images)
    ids = _one_each("ids", form.ids, count)
    sources = _one_each("sources", form.sources, count)
    filenames: list[dict[str, Json]] = [
        {"filename": filename} if filename else {} for filename in upload.filenames
    ]
    metadata = _one_each("metadata", form.metadata or filenames, count)
    additions = [
        _Addition(image, item_id, described or {}, source)
        for image, item_id, described, source in zip(upload.images, ids, metadata, sources, strict=True)
    ]
    return additions, on_error(form.on_error, upload), form.timeout


def _one_each(name: str, values: Sequence[T], count: int) -> Sequence[T | None]:
    if not values:
        return [None] * count
    if len(values) != count:
        raise InvalidParameter(
            f"there are {count} images and {len(values)} {name}: give one for each image, in "
            "their order, or none",
            parameter=name,
        )
    return values


async def _prepare(
    state: State, additions: Sequence[_Addition], timeout_s: float | None
) -> tuple[list[ImageEmbedding | ImageFailure], list[bytes | None]]:
    """Embeddings and thumbnails."""
    with timed(state, "embed"):
        results = await embed_images(state, [addition.image for addition in additions], timeout_s=timeout_s)
    limits = ImageLimits(max_pixels=state["settings"].max_image_pixels)
    with timed(state, "thumbnails"):
        thumbnails = await asyncio.gather(
            *(
                in_worker(state, _thumbnail, addition.image, limits)
                for addition, result in zip(additions, results, strict=True)
                if isinstance(result, ImageEmbedding)
            )
        )
    made = iter(thumbnails)
    return results, [next(made) if isinstance(result, ImageEmbedding) else None for result in results]


def _thumbnail(image: SentImage, limits: ImageLimits) -> bytes | None:
    assert isinstance(image, bytes), "what has an embedding was a file"
    try:
        return make_thumbnail(image, limits=limits)
    except ImageError:
        return None  # it was decoded a moment ago; an item without a thumbnail is better than none


def _item(addition: _Addition, result: ImageEmbedding, thumbnail: bytes | None) -> Item:
    return Item(
        id=addition.id if addition.id is not None else result.sha256,
        vector=result.embedding,
        metadata=addition.metadata,
        sha256=result.sha256,
        source=addition.source,
        thumbnail=thumbnail,
    )


def _item_answer(item: Item) -> dict[str, Any]:
    return {"id": item.id, "metadata": item.metadata, "sha256": item.sha256, "source": item.source}
