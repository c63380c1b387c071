"""`/collections`: make, list, look at, count and delete collections."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import answers
from app.api.body import read_json
from app.api.embed import model_answer
from app.api.openapi import answer_of, example, json_body_of
from app.api.schemas import (
    CollectionAnswer,
    CollectionsAnswer,
    CountAnswer,
    CountItems,
    DescribedCollectionAnswer,
    NewCollection,
    parse,
)
from app.api.state import State, StateDep, in_worker, served_model
from app.errors import UnknownCollection
from app.search.collection import CollectionInfo, CollectionStats

router = APIRouter(prefix="/collections", tags=["collections"])


@router.get("", summary="List collections", responses={200: answer_of(CollectionsAnswer)})
async def list_collections(state: StateDep) -> Response:
    """Lists all collections, in order of name, also those of other models."""
    infos = await in_worker(state, state["catalogue"].list)
    content = {
        "model": model_answer(state["models"].get().info),
        "data": [_collection_answer(info, state) for info in infos],
    }
    return answers.structured(content, answers.JSON)


@router.post(
    "",
    status_code=201,
    summary="Make a collection",
    responses={201: answer_of(CollectionAnswer)},
    openapi_extra=json_body_of(NewCollection),
)
async def create_collection(request: Request, state: StateDep) -> Response:
    """Makes an empty collection for the embeddings of a model that is served."""
    new = parse(NewCollection, await read_json(request, state))
    model = served_model(state, new.model).info
    await in_worker(
        state,
        state["catalogue"].create,
        new.name,
        fingerprint=model.fingerprint,
        dimensions=model.dimensions,
    )
    answer = answers.structured(await in_worker(state, _described, new.name, state), answers.JSON)
    answer.status_code = 201
    answer.headers["Location"] = f"/collections/{new.name}"
    return answer


@router.get("/{name}", summary="Look at a collection", responses={200: answer_of(DescribedCollectionAnswer)})
async def read_collection(name: str, state: StateDep) -> Response:
    """Says whose embeddings a collection holds, how many, and what keeping and searching them takes.

    An alias answers with the collection that it leads to.
    """

    def describe() -> dict[str, Any]:
        return _described(name, state) | {"stats": _stats_answer(state["catalogue"].get(name).stats())}

    return answers.structured(await in_worker(state, describe), answers.JSON)


@router.post(
    "/{name}/count",
    summary="Count items",
    responses={200: answer_of(CountAnswer)},
    openapi_extra=json_body_of(CountItems)
    | example(
        """curl {origin}/collections/default/count --json '{"filter": {"field": "album", "eq": "sea"}}'"""
    ),
)
async def count_items(request: Request, name: str, state: StateDep) -> Response:
    """Counts the items of a collection, or those whose metadata match a filter."""
    asked = parse(CountItems, await read_json(request, state))
    count = await in_worker(state, lambda: state["catalogue"].get(name).count(asked.filter))
    return answers.structured({"count": count}, answers.JSON)


@router.delete("/{name}", status_code=204, summary="Delete a collection")
async def delete_collection(name: str, state: StateDep) -> Response:
    """Deletes a collection with all its items. There is no way back."""
    await in_worker(state, state["catalogue"].drop, name)
    return Response(status_code=204)


def _described(name: str, state: State) -> dict[str, Any]:
    """One collection as a listing has it; blocks."""
    own_name = state["catalogue"].get(name).name
    for info in state["catalogue"].list():
        if info.name == own_name:
            return _collection_answer(info, state)
    raise UnknownCollection(f"the collection {name[:64]!r} was deleted")


def _collection_answer(info: CollectionInfo, state: State) -> dict[str, Any]:
    return {
        "name": info.name,
        "fingerprint": info.fingerprint,
        "dimensions": info.dimensions,
        "items": info.items,
        "metric": "cosine",
        "searchable": info.fingerprint in state["models"].fingerprints,
        "aliases": info.aliases,
        "successor": None if info.successor is None else asdict(info.successor),
        "created_at": info.created_at,
    }


def _stats_answer(stats: CollectionStats) -> dict[str, Any]:
    return {
        "deleted": stats.deleted,
        "method": stats.method,
        "indexed": stats.indexed,
        "recall": stats.recall,
        "memory_bytes": stats.memory_bytes,
        "disk_bytes": stats.disk_bytes,
    }
