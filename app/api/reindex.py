"""`/collections/{name}/reindex`: a collection's embeddings made anew with the model that is served."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import answers
from app.api.body import read_json
from app.api.lifecycle_schemas import ReindexAnswer, ReindexParameters
from app.api.openapi import answer_of, example, json_body_of
from app.api.schemas import parse
from app.api.state import StateDep, in_worker
from app.reindexing import Progress

router = APIRouter(prefix="/collections/{name}/reindex", tags=["collections"])


@router.post(
    "",
    status_code=202,
    summary="Reindex a collection",
    responses={202: answer_of(ReindexAnswer)},
    openapi_extra=json_body_of(ReindexParameters)
    | example("curl -X POST {origin}/collections/default/reindex"),
)
async def begin_reindex(request: Request, name: str, state: StateDep) -> Response:
    """Begins to embed all items of a collection with a model that is served, or goes on with it.

    Each item is made from its source, if that is a file here with the same bytes as then, or from its
    thumbnail, which is counted and warned of. Nothing is searched until all are there; then the collection's
    name and aliases lead to the new embeddings, at once. The old ones stay under another name.
    """
    parameters = ReindexParameters()
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        parameters = parse(ReindexParameters, await read_json(request, state))
    progress = await in_worker(
        state, state["reindex_jobs"].begin, name, model=parameters.model, skip_failed=parameters.skip_failed
    )
    answer = answers.structured(_answer(progress), answers.JSON)
    answer.status_code = 202
    answer.headers["Location"] = f"/collections/{progress.collection}/reindex"
    return answer


@router.get("", summary="Look at a reindexing", responses={200: answer_of(ReindexAnswer)})
async def read_reindex(name: str, state: StateDep) -> Response:
    """Says how far it is. `interrupted`: the service ended meanwhile; begin again, and it goes on."""
    progress = await in_worker(state, state["reindex_jobs"].progress, name)
    return answers.structured(_answer(progress), answers.JSON)


@router.delete("", summary="Cancel a reindexing", responses={200: answer_of(ReindexAnswer)})
async def cancel_reindex(name: str, state: StateDep) -> Response:
    """Stops it and deletes what it made. The collection is as it was."""
    progress = await in_worker(state, state["reindex_jobs"].cancel, name)
    return answers.structured(_answer(progress), answers.JSON)


def _answer(progress: Progress) -> dict[str, Any]:
    return {
        "collection": progress.collection,
        "state": progress.state,
        "from_fingerprint": progress.from_fingerprint,
        "to_fingerprint": progress.to_fingerprint,
        "done": progress.done,
        "of": progress.of,
        "from_source": progress.from_source,
        "from_thumbnails": progress.from_thumbnails,
        "failed": progress.failed,
        "failures": [
            {"id": failed.id, "code": failed.code, "title": failed.title} for failed in progress.failures
        ],
        "images_per_s": round(progress.images_per_s, 2),
        "eta_s": None if progress.eta_s is None else round(progress.eta_s, 1),
        "warnings": progress.warnings,
        "previous": progress.previous,
        "error": progress.error,
    }
