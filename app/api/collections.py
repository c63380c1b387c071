"""`/collections`: make, list, look at and delete collections."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import answers
from app.api.body import read_json
from app.api.embed import model_answer
from app.api.openapi import answer_of, json_body_of
from app.api.schemas import CollectionAnswer, CollectionsAnswer, NewCollection, parse
from app.api.state import State, StateDep, in_worker
from app.search.collection import CollectionInfo

router = APIRouter(prefix="/collections", tags=["collections"])


@router.get("", summary="List collections", responses={200: answer_of(CollectionsAnswer)})
async def list_collections(state: StateDep) -> Response:
    """Lists all collections, in order of name, also those of other models."""
    infos = await in_worker(state, state["catalogue"].list)
    content = {
        "model": model_answer(state["engine"].model),
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
    """Makes an empty collection for embeddings of the model that is served."""
    new = parse(NewCollection, await read_json(request, state))
    model = state["engine"].model
    await in_worker(
        state,
        state["catalogue"].create,
        new.name,
        fingerprint=model.fingerprint,
        dimensions=model.dimensions,
    )
    answer = answers.structured(await _described(new.name, state), answers.JSON)
    answer.status_code = 201
    answer.headers["Location"] = f"/collections/{new.name}"
    return answer


@router.get("/{name}", summary="Look at a collection", responses={200: answer_of(CollectionAnswer)})
async def read_collection(name: str, state: StateDep) -> Response:
    """Says whose embeddings a collection holds, and how many."""
    return answers.structured(await _described(name, state), answers.JSON)


@router.delete("/{name}", status_code=204, summary="Delete a collection")
async def delete_collection(name: str, state: StateDep) -> Response:
    """Deletes a collection with all its items. There is no way back."""
    await in_worker(state, state["catalogue"].drop, name)
    return Response(status_code=204)


async def _described(name: str, state: State) -> dict[str, Any]:
    def describe() -> CollectionInfo:
        collection = state["catalogue"].get(name)
        return CollectionInfo(
            name=collection.name,
            fingerprint=collection.fingerprint,
            dimensions=collection.dimensions,
            items=collection.count(),
            created_at=0.0,
        )

    return _collection_answer(await in_worker(state, describe), state)


def _collection_answer(info: CollectionInfo, state: State) -> dict[str, Any]:
    return {
        "name": info.name,
        "fingerprint": info.fingerprint,
        "dimensions": info.dimensions,
        "items": info.items,
        "metric": "cosine",
        "searchable": info.fingerprint == state["engine"].model.fingerprint,
    }
