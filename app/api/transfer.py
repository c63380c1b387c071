"""`/collections/{name}/export` and `…/import`: whole collections as Parquet, streamed both ways."""

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, BinaryIO, Final, cast

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from app.api import answers
from app.api.lifecycle_schemas import ImportAnswer
from app.api.openapi import answer_of, example
from app.api.refusals import ClientLeft, UnsupportedMediaType, UploadTimeout
from app.api.state import State, StateDep, in_bulk, in_worker, timed
from app.errors import StorageError
from app.search.parquet import MEDIA_TYPE, Export
from app.search.parquet_import import Imported, import_collection

router = APIRouter(prefix="/collections/{name}", tags=["collections"])

_TAKEN: Final = (MEDIA_TYPE, "application/parquet", "application/x-parquet", "application/octet-stream")
_WRITTEN_AT_ONCE_BYTES: Final = 2**20
_FILE_BODY: Final = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/export",
    summary="Export a collection",
    responses={200: {"content": {MEDIA_TYPE: {}}}},
    openapi_extra=example("curl -o default.parquet {origin}/collections/default/export"),
)
async def export_items(
    name: str,
    state: StateDep,
    thumbnails: Annotated[bool, Query(description="Whether there is a column of thumbnails.")] = True,
) -> Response:
    """Answers with a Parquet file of all items: id, vector, metadata, sha256, source and thumbnail.

    Its metadata says which model the vectors are of. It is made as it is sent, while the collection is used:
    each item is as it was at some moment in between.
    """
    collection = await in_worker(state, state["catalogue"].get, name)
    export = Export(collection, thumbnails=thumbnails)
    first = await in_worker(state, export.next_chunk)  # what goes wrong at once still has a status

    async def chunks() -> AsyncIterator[bytes]:
        chunk = first
        while chunk is not None:
            yield chunk
            chunk = await in_worker(state, export.next_chunk)

    headers = {"Content-Disposition": f'attachment; filename="{collection.name}.parquet"'}
    return StreamingResponse(chunks(), media_type=MEDIA_TYPE, headers=headers)


@router.post(
    "/import",
    summary="Import a collection",
    responses={200: answer_of(ImportAnswer)},
    openapi_extra={"requestBody": {"required": True, "content": {MEDIA_TYPE: _FILE_BODY}}}
    | example(
        "curl --data-binary @default.parquet -H 'Content-Type: " + MEDIA_TYPE + "' "
        "{origin}/collections/default/import"
    ),
)
async def import_items(request: Request, name: str, state: StateDep) -> Response:
    """Adds what an exported file has; the collection is made if it isn't there.

    The whole file is checked before the first item is written. A file that is sent again changes nothing.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in _TAKEN:
        raise UnsupportedMediaType(f"the Content-Type is {kind[:100]!r}, and this route takes {MEDIA_TYPE}")
    with timed(state, "receive"):
        file = await _received(request, state)

    def work(stop: threading.Event) -> Imported:
        with file:
            return import_collection(state["catalogue"], name, file, stop=stop)

    with timed(state, "store"):
        imported = await in_bulk(state, request, work)
    content = {
        "collection": imported.collection,
        "created": imported.created,
        "added": imported.added,
        "updated": imported.updated,
        "unchanged": imported.unchanged,
    }
    return answers.structured(content, answers.JSON)


async def _received(request: Request, state: State) -> BinaryIO:
    """The body, in a file without a name, so that nothing is left of it however the process ends."""
    file = await in_worker(state, _nameless_file, state["settings"].data_dir)
    waiting: list[bytes] = []
    waiting_bytes = 0
    try:
        chunks = aiter(request.stream())
        while (chunk := await _next_chunk(chunks, state)) is not None:
            waiting.append(chunk)
            waiting_bytes += len(chunk)
            if waiting_bytes >= _WRITTEN_AT_ONCE_BYTES:
                await in_worker(state, _write, file, waiting)
                waiting, waiting_bytes = [], 0
        await in_worker(state, _write, file, waiting)
    except BaseException:
        file.close()
        raise
    return file


async def _next_chunk(chunks: AsyncIterator[bytes], state: State) -> bytes | None:
    timeout_s = state["settings"].upload_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await anext(chunks, None)
    except TimeoutError:
        raise UploadTimeout(f"no part of the body came for {timeout_s:g} s") from None
    except ClientDisconnect:
        raise ClientLeft("the caller closed the connection before the body was here") from None


def _nameless_file(data_dir: Path) -> BinaryIO:
    try:
        # Where collections are there is room for them; the system's folder may be in memory.
        folder = data_dir if data_dir.is_dir() else None
        return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))
    except OSError as error:
        raise StorageError(f"there is no place for the file to import: {error.strerror}") from error


def _write(file: BinaryIO, chunks: list[bytes]) -> None:
    try:
        file.writelines(chunks)
    except OSError as error:
        raise StorageError(f"the file to import could not be kept: {error.strerror}") from error
