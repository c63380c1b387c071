"""`POST /collections/{name}/items` as NDJSON: a line in, a line out, for as many lines as there are.

    body ─► LineReader ─► batch ─► parse, embed (some batches at once) ─► write, in order ─► results

Memory is bounded by the batches under way, not by the body: where results are not taken, or the model is
busy, nothing more is read. Each line succeeds or fails for itself, and a result line is sent when its item is
on disk.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.adding import Addition, embed_patiently, make_items
from app.api.embed import failure_answer
from app.api.guard import LINES_MEDIA_TYPE
from app.api.joining import Joining, addition_of
from app.api.lines import Line, LineBounds, LineReader, OverlongLine
from app.api.problems import item_error
from app.api.refusals import InvalidJson
from app.api.schemas import NewItem, parse
from app.api.state import State, in_worker, write_to_current
from app.errors import ServiceError, TooLarge
from app.inference.results import ImageFailure
from app.search.collection import Item
from dino_core.preprocess import ImageLimits

_BATCH_LINES: Final = 64
_BATCH_BYTES: Final = 32 * 2**20
_BATCHES_UNDER_WAY: Final = 3  # one is written, one embedded, one decoded
_WORDS_BYTES: Final = 64 * 2**10  # of a line, beside its image: id, metadata and source, four times over


class ItemStream(Response):
    """The answer to a stream of items, which reads it while it is sent.

    Not Starlette's StreamingResponse, which would take pieces of the body for news of the caller's leaving.

    Args:
        state: Of the service.
        joining: The collection, and what may join it.
    """

    media_type = LINES_MEDIA_TYPE

    def __init__(self, state: State, joining: Joining) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})  # proxies shall pass lines on as they come
        del self.headers["content-length"]
        settings = state["settings"]
        self._state = state
        self._joining = joining
        self._bounds = LineBounds(
            line_bytes=settings.max_image_bytes * 4 // 3 + _WORDS_BYTES,  # base64
            batch_lines=min(_BATCH_LINES, settings.max_client_batch_size),
            batch_bytes=_BATCH_BYTES,
            idle_s=settings.upload_timeout_s,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers until the body has ended or the caller has left."""
        reader = LineReader(receive, self._bounds)
        reading = asyncio.ensure_future(reader.run())
        writing = asyncio.ensure_future(self._write(reader, send))
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            reading.cancel()
            writing.cancel()
            # Both have ended before the request has; who left has no use for how.
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def _write(self, reader: LineReader, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._results(reader)) as results:
            async for part in results:
                message: Message = {"type": "http.response.body", "body": part, "more_body": True}
                try:
                    async with asyncio.timeout(self._bounds.idle_s):
                        await send(message)
                except TimeoutError:
                    return  # nobody takes the results: the server closes the connection
        if reader.timeout is not None:
            last = orjson.dumps({"error": item_error(reader.timeout)}) + b"\n"
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _results(self, reader: LineReader) -> AsyncGenerator[bytes, None]:
        """Result lines of one batch after the other, in the order of the lines."""
        under_way: deque[asyncio.Task[list[_Made]]] = deque()
        reading: asyncio.Task[list[tuple[int, Line]] | None] | None = None
        try:
            while True:
                if reading is None and len(under_way) < _BATCHES_UNDER_WAY:
                    reading = asyncio.create_task(reader.next_batch())
                await asyncio.wait(
                    {*([reading] if reading else ()), *list(under_way)[:1]},
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if under_way and under_way[0].done():
                    yield await self._written(under_way.popleft().result())
                if reading is not None and reading.done():
                    if (batch := reading.result()) is None:
                        break
                    under_way.append(asyncio.create_task(self._make(batch)))
                    reading = None
            while under_way:
                yield await self._written(await under_way.popleft())
        finally:
            for task in [*under_way, *([reading] if reading else ())]:
                task.cancel()
            await asyncio.gather(*under_way, *([reading] if reading else ()), return_exceptions=True)

    async def _make(self, batch: Sequence[tuple[int, Line]]) -> "list[_Made]":
        """Items of a batch, or what each line's error is."""
        state, engine = self._state, self._joining.model.engine
        parsed = await in_worker(state, lambda: [self._parsed(number, line) for number, line in batch])
        additions = [addition for _, addition in parsed if isinstance(addition, Addition)]
        try:
            items = iter(
                await make_items(
                    additions,
                    collection=self._joining.collection,
                    embed=lambda images: embed_patiently(engine, images),
                    workers=state["workers"],
                    limits=ImageLimits(max_pixels=state["settings"].max_image_pixels),
                )
            )
        except ServiceError as error:
            return [
                (number, error if isinstance(addition, Addition) else addition) for number, addition in parsed
            ]
        return [
            (number, next(items) if isinstance(addition, Addition) else addition)
            for number, addition in parsed
        ]

    def _parsed(self, number: int, line: Line) -> tuple[int, Addition | ServiceError]:
        try:
            if isinstance(line, OverlongLine):
                limit = self._bounds.line_bytes
                raise TooLarge(
                    f"the line has {line.size_bytes:,} bytes, at most {limit:,} are taken",
                    limit=limit,
                    actual=line.size_bytes,
                )
            item = parse(NewItem, _members(line))
            return number, addition_of(item, self._joining, where=f"line {number}", pointer="/image")
        except ServiceError as error:
            return number, error

    async def _written(self, made: "list[_Made]") -> bytes:
        """Writes a batch's items, and gives its result lines."""
        items = [item for _, item in made if isinstance(item, Item)]
        fingerprint = self._joining.collection.fingerprint
        try:
            statuses: list[Any] = []
            if items:
                statuses = await in_worker(
                    self._state,
                    write_to_current,
                    self._state,
                    self._joining.name,
                    lambda collection: collection.upsert(items, fingerprint=fingerprint),
                )
        except ServiceError as error:
            statuses = [error] * len(items)
        status = iter(statuses)
        answers = [
            _answer(number, item, next(status) if isinstance(item, Item) else None) for number, item in made
        ]
        return b"".join(orjson.dumps(answer) + b"\n" for answer in answers)


_Made = tuple[int, Item | ImageFailure | ServiceError]


def _members(line: bytes) -> dict[str, Any]:
    try:
        members = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise InvalidJson("the line is not valid JSON") from None
    if not isinstance(members, dict):
        raise InvalidJson("the line is JSON, and not an object: send {…}")
    return members


def _answer(number: int, item: Item | ImageFailure | ServiceError, status: object) -> dict[str, Any]:
    if isinstance(item, ImageFailure):
        return failure_answer(number, item)
    error = item if isinstance(item, ServiceError) else status
    if isinstance(error, ServiceError):
        return {"index": number, "error": item_error(error)}
    assert isinstance(item, Item), "a line has neither an item nor an error: this is a bug"
    return {"index": number, "id": item.id, "status": status}
