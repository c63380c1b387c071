"""`/snapshots`: copies of all collections, made, fetched and restored while everything goes on."""

import threading
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from app.api import answers
from app.api.body import read_json
from app.api.lifecycle_schemas import Restore, RestoreAnswer, SnapshotAnswer, SnapshotsAnswer
from app.api.openapi import answer_of, example, json_body_of
from app.api.schemas import parse
from app.api.state import StateDep, in_bulk, in_worker
from app.search.embedded.restoring import Restored, restore_collection
from app.search.embedded.snapshot_files import SnapshotInfo

router = APIRouter(prefix="/snapshots", tags=["snapshots"])

_MEDIA_TYPE = "application/vnd.sqlite3"


@router.post(
    "",
    status_code=201,
    summary="Make a snapshot",
    responses={201: answer_of(SnapshotAnswer)},
    openapi_extra=example("curl -X POST {origin}/snapshots"),
)
async def make_snapshot(request: Request, state: StateDep) -> Response:
    """Copies all collections, as they are at one moment, into a file below the data directory."""
    info = await in_bulk(state, request, lambda _: state["snapshots"].make(state["catalogue"]))
    answer = answers.structured(_answer(info), answers.JSON)
    answer.status_code = 201
    answer.headers["Location"] = f"/snapshots/{info.name}"
    return answer


@router.get("", summary="List snapshots", responses={200: answer_of(SnapshotsAnswer)})
async def list_snapshots(state: StateDep) -> Response:
    """Lists all snapshots, the oldest first, and what is in them."""
    infos = await in_worker(state, state["snapshots"].list)
    return answers.structured({"data": [_answer(info) for info in infos]}, answers.JSON)


@router.get("/{name}", summary="Fetch a snapshot", responses={200: {"content": {_MEDIA_TYPE: {}}}})
async def fetch_snapshot(name: str, state: StateDep) -> Response:
    """Answers with the file: a SQLite database, which `dino-serve index restore` takes."""
    path = await in_worker(state, state["snapshots"].path, name)
    return FileResponse(path, media_type=_MEDIA_TYPE, filename=path.name)


@router.delete("/{name}", status_code=204, summary="Delete a snapshot")
async def delete_snapshot(name: str, state: StateDep) -> Response:
    """Deletes a snapshot; the collections are another matter."""
    await in_worker(state, state["snapshots"].delete, name)
    return Response(status_code=204)


@router.post(
    "/{name}/restore",
    summary="Restore a collection",
    responses={200: answer_of(RestoreAnswer)},
    openapi_extra=json_body_of(Restore),
)
async def restore(request: Request, name: str, state: StateDep) -> Response:
    """Reads a collection from a snapshot and puts it in place of the one that has its name, at once.

    The one before stays under another name. With `as` it becomes a new collection instead.
    """
    wanted = parse(Restore, await read_json(request, state))
    path = await in_worker(state, state["snapshots"].path, name)

    def work(stop: threading.Event) -> Restored:
        with state["reindex_jobs"].rebuilding(wanted.as_ or wanted.collection):
            return restore_collection(
                state["catalogue"], path, wanted.collection, as_name=wanted.as_, stop=stop
            )

    restored = await in_bulk(state, request, work)
    content = {
        "collection": restored.collection,
        "fingerprint": restored.fingerprint,
        "items": restored.items,
        "previous": restored.previous,
    }
    return answers.structured(content, answers.JSON)


def _answer(info: SnapshotInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "bytes": info.size_bytes,
        "created_at": info.created_at,
        "collections": [
            {
                "name": one.name,
                "fingerprint": one.fingerprint,
                "dimensions": one.dimensions,
                "items": one.items,
            }
            for one in info.collections
        ],
        "problem": info.problem,
    }
