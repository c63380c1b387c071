"""`/collections/{name}/items`: add pictures, look at them, delete them.

An id may hold slashes: in a path it is percent-encoded, `a%2Fb.jpg`. See `app.api.guard.EncodedItemPaths`.
"""

import hashlib
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, Path, Query, Request
from starlette.responses import Response

from app.adding import make_items
from app.api import answers
from app.api.body import read_upload
from app.api.embed import check_failures, failure_answer, model_answer
from app.api.guard import is_line_stream
from app.api.item_stream import item_stream
from app.api.joining import checked_additions, joining_of
from app.api.many_items import item_answer
from app.api.openapi import answer_of, body_of, example
from app.api.refusals import NoImages
from app.api.schemas import (
    AddAnswer,
    AddItems,
    AddParameters,
    ItemAnswer,
    ItemsAnswer,
    ListParameters,
    NewItem,
    StreamParameters,
    json_parameter,
    parse,
)
from app.api.state import StateDep, in_worker, timed, while_connected, write_to_current
from app.api.urgency import urgency
from app.errors import UnknownItem
from app.inference.results import ImageFailure
from app.search.collection import Item
from dino_core.preprocess import ImageLimits

router = APIRouter(prefix="/collections/{name}/items", tags=["items"])


def decoded_id(
    item_id: Annotated[str, Path(description="Percent-encoded: `a%2Fb.jpg` is the item `a/b.jpg`.")],
) -> str:
    """The id that a path names."""
    return unquote(item_id)


ItemId = Annotated[str, Depends(decoded_id)]


@router.post(
    "",
    summary="Add pictures",
    responses={200: answer_of(AddAnswer)},
    openapi_extra=body_of(AddParameters, json_body=AddItems, line=NewItem)
    | example("curl -F images=@cat.jpg -F ids=cats/1.jpg {origin}/collections/default/items"),
)
async def add_items(request: Request, name: str, state: StateDep) -> Response:
    """Embeds pictures and adds them, with thumbnails, ids and metadata; or adds embeddings made elsewhere.

    `added` and `updated` mean: on disk, and found by the next search. `unchanged` means that the same picture
    with the same metadata was there already; it was not embedded again, so sending a folder again costs
    little. Without ids, a picture's id is the SHA-256 of its bytes.

    As `application/x-ndjson` the body may have any number of lines, each one of the JSON body's `items`. Read
    the answer while you send: it has a line for each, `index` is the number of its line, and nothing more is
    read while answers are not taken. `curl -T items.ndjson` does so.
    """
    joining = await in_worker(state, joining_of, state, name, request)
    if is_line_stream(request.scope):
        parse(StreamParameters, dict(request.query_params))
        return item_stream(state, joining)
    with timed(state, "receive"):
        upload = await read_upload(request, state, lists=("ids", "metadata", "sources"))
    # Off the event loop: a hundred megabytes of base64 may be in it.
    additions, choice, said = await in_worker(state, checked_additions, state, upload, joining)
    if not additions:
        raise NoImages("the request has no picture: send files in the field `images`, or JSON `items`")
    collection, engine = joining.collection, joining.model.engine
    urgent = urgency(state, priority=said.priority, timeout_s=said.timeout)
    with timed(state, "embed"):
        made = await while_connected(
            request,
            make_items(
                additions,
                collection=collection,
                embed=lambda images: engine.embed(images, lane=urgent.lane, deadline_s=urgent.deadline_s),
                workers=state["workers"],
                limits=ImageLimits(max_pixels=state["settings"].max_image_pixels),
                fetcher=state["fetcher"],
            ),
        )
    check_failures(made, choice)
    items = {index: item for index, item in enumerate(made) if isinstance(item, Item)}
    with timed(state, "store"):
        statuses = await in_worker(
            state,
            write_to_current,
            state,
            name,
            lambda now: now.upsert(list(items.values()), fingerprint=collection.fingerprint),
        )
    data = [failure_answer(index, item) for index, item in enumerate(made) if isinstance(item, ImageFailure)]
    data += [
        {"index": index, "id": item.id, "status": status}
        for (index, item), status in zip(items.items(), statuses, strict=True)
    ]
    content = {
        "model": model_answer(joining.model.info),
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
        return {"data": [item_answer(item) for item in found.items], "next_cursor": found.next_cursor}

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
    return answers.structured(item_answer(item) | {"embedding": item.vector}, answers.JSON)


@router.delete("/{item_id:path}", status_code=204, summary="Delete an item")
async def delete_item(name: str, item_id: ItemId, state: StateDep) -> Response:
    """Deletes an item; when the answer is there it is gone from disk and from searches."""
    deleted = await in_worker(
        state, write_to_current, state, name, lambda collection: collection.delete([item_id])
    )
    if not deleted:
        raise UnknownItem(f"collection {name!r} has no item {item_id!r}")
    return Response(status_code=204)
