"""`POST /similar`: the nearest items of a collection, by image, by item or by embedding.

Dimension key: Q queries · D embedding
"""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from app.api import answers
from app.api.body import Upload, read_upload
from app.api.embed import check_failures, embed_images, failure_answer, model_answer, on_error
from app.api.openapi import answer_of, body_of, example
from app.api.refusals import InvalidParameter, NoImages
from app.api.schemas import SimilarAnswer, SimilarParameters, parse
from app.api.state import State, StateDep, collection_of_this_model, in_worker, timed, while_connected
from app.errors import UnknownItem
from app.inference.results import ImageFailure
from app.search.collection import Collection, Neighbour

router = APIRouter(tags=["search"])


@router.post(
    "/similar",
    summary="Find similar pictures",
    responses={200: answer_of(SimilarAnswer, answers.JSON, answers.MSGPACK)},
    openapi_extra=body_of(SimilarParameters) | example("curl -F images=@cat.jpg '{origin}/similar?k=5'"),
)
async def similar(request: Request, state: StateDep) -> Response:
    """Finds the nearest items to images, to an item by its `id`, or to an `embedding`.

    A score is the cosine similarity: 1 is the same direction, 0 is unrelated. Each image has its neighbours
    or its own error, best first; equal scores are in order of id.
    """
    media_type = answers.negotiate(request, answers.JSON, answers.MSGPACK)
    with timed(state, "receive"):
        upload = await read_upload(request, state)
    parameters = parse(SimilarParameters, upload.parameters)
    _require_one_query(upload, parameters)
    collection = await in_worker(state, collection_of_this_model, state, parameters.collection)
    data = await while_connected(request, _search(state, upload, parameters, collection))
    count = await in_worker(state, collection.count)
    content = {
        "model": model_answer(state["engine"].model),
        "collection": {
            "name": collection.name,
            "fingerprint": collection.fingerprint,
            "items": count,
            "metric": "cosine",
        },
        "data": data,
    }
    return answers.structured(content, media_type)


def _require_one_query(upload: Upload, parameters: SimilarParameters) -> None:
    given = [
        name
        for name, value in (
            ("images", upload.images or None),
            ("id", parameters.id),
            ("embedding", parameters.embedding),
        )
        if value is not None
    ]
    if not given:
        raise NoImages("there is nothing to search by: send images, or `id`, or `embedding`")
    if len(given) > 1:
        raise InvalidParameter(
            f"give one of images, id and embedding, not {' and '.join(given)}", parameter=given[1]
        )


async def _search(
    state: State, upload: Upload, parameters: SimilarParameters, collection: Collection
) -> list[dict[str, Any]]:
    with timed(state, "embed"):
        queries = await _queries(state, upload, parameters, collection)
    found_at = [index for index, query in enumerate(queries) if not isinstance(query, ImageFailure)]
    data = [
        failure_answer(index, query) for index, query in enumerate(queries) if isinstance(query, ImageFailure)
    ]
    if found_at:
        vectors_QD = np.stack([query for query in queries if not isinstance(query, ImageFailure)])
        with timed(state, "search"):
            found = await in_worker(state, _neighbours, collection, vectors_QD, parameters)
        data += [
            {"index": index, "neighbours": neighbours}
            for index, neighbours in zip(found_at, found, strict=True)
        ]
    return sorted(data, key=lambda answer: int(answer["index"]))


async def _queries(
    state: State, upload: Upload, parameters: SimilarParameters, collection: Collection
) -> list[NDArray[np.float32] | ImageFailure]:
    if parameters.embedding is not None:
        return [np.asarray(parameters.embedding, np.float32)]
    if parameters.id is not None:
        (item,) = await in_worker(state, collection.get, [parameters.id])
        if item is None:
            raise UnknownItem(f"collection {collection.name!r} has no item {parameters.id!r}")
        return [item.vector]
    results = await embed_images(state, upload.images, timeout_s=parameters.timeout)
    check_failures(results, on_error(parameters.on_error, upload))
    return [result if isinstance(result, ImageFailure) else result.embedding for result in results]


def _neighbours(
    collection: Collection, vectors_QD: NDArray[np.float32], parameters: SimilarParameters
) -> list[list[dict[str, Any]]]:
    """Searches; blocks."""
    found = collection.search(
        vectors_QD,
        k=parameters.k,
        offset=parameters.offset,
        threshold=parameters.threshold,
        filter=parameters.filter,
        exclude_ids=() if parameters.id is None else (parameters.id,),
    )
    return [_neighbours_answer(collection, neighbours, parameters) for neighbours in found]


def _neighbours_answer(
    collection: Collection, neighbours: list[Neighbour], parameters: SimilarParameters
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"id": found.id, "score": round(found.score, 6)} for found in neighbours]
    if "metadata" in parameters.include:
        for row, found in zip(rows, neighbours, strict=True):
            row["metadata"] = found.metadata
    if "embedding" in parameters.include:
        items = collection.get([found.id for found in neighbours])
        for row, item in zip(rows, items, strict=True):
            row["embedding"] = None if item is None else item.vector  # None: deleted since the search
    return rows
