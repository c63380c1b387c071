"""`/collections/{name}/items/…`: many items in one request: look at them, delete them, bring them back."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import answers
from app.api.body import read_json
from app.api.openapi import answer_of, json_body_of
from app.api.schemas import Deleted, DeleteItems, FoundItems, ItemIds, Undeleted, parse
from app.api.state import StateDep, in_worker, write_to_current
from app.search.collection import Collection, Item

router = APIRouter(prefix="/collections/{name}/items", tags=["items"])

_IDS_AT_ONCE = 1_000  # as items come with their vectors: some megabytes


@router.post(
    "/get",
    summary="Look at items",
    responses={200: answer_of(FoundItems)},
    openapi_extra=json_body_of(ItemIds),
)
async def get_items(request: Request, name: str, state: StateDep) -> Response:
    """Answers with items, in the order of their ids, without embeddings."""
    asked = parse(ItemIds, await read_json(request, state))

    def find() -> dict[str, Any]:
        collection = state["catalogue"].get(name)
        found = [item for ids in _parts(asked.ids) for item in collection.get(ids)]
        return {"data": [None if item is None else item_answer(item) for item in found]}

    return answers.structured(await in_worker(state, find), answers.JSON)


@router.post(
    "/delete",
    summary="Delete items",
    responses={200: answer_of(Deleted)},
    openapi_extra=json_body_of(DeleteItems),
)
async def delete_items(request: Request, name: str, state: StateDep) -> Response:
    """Deletes items by id, or those whose metadata match; for seven days they can be brought back by id.

    When the answer is there they are gone from disk and from searches. Ids that aren't there are passed over.
    """
    asked = parse(DeleteItems, await read_json(request, state))

    def delete() -> int:
        return write_to_current(state, name, lambda collection: delete_from(collection, asked))

    return answers.structured({"deleted": await in_worker(state, delete)}, answers.JSON)


@router.post(
    "/undelete",
    summary="Bring deleted items back",
    responses={200: answer_of(Undeleted)},
    openapi_extra=json_body_of(ItemIds),
)
async def undelete_items(request: Request, name: str, state: StateDep) -> Response:
    """Brings deleted items back, for seven days after their deletion.

    Ids that were never deleted, were erased, or have a new item since are passed over.
    """
    asked = parse(ItemIds, await read_json(request, state))

    def undelete() -> int:
        return write_to_current(state, name, lambda collection: collection.undelete(asked.ids))

    return answers.structured({"undeleted": await in_worker(state, undelete)}, answers.JSON)


def delete_from(collection: Collection, asked: DeleteItems) -> int:
    """Deletes what was asked for, or counts it.

    Raises:
        InvalidFilter: The filter is malformed.
        UnknownCollection: It was dropped.
    """
    if asked.filter is not None:
        return collection.count(asked.filter) if asked.dry_run else collection.delete_where(asked.filter)
    ids = list(dict.fromkeys(asked.ids or ()))
    if not asked.dry_run:
        return collection.delete(ids)
    return sum(item is not None for part in _parts(ids) for item in collection.get(part))


def item_answer(item: Item) -> dict[str, Any]:
    """An item as answers show it, without its embedding."""
    return {"id": item.id, "metadata": item.metadata, "sha256": item.sha256, "source": item.source}


def _parts(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + _IDS_AT_ONCE] for start in range(0, len(ids), _IDS_AT_ONCE)]
