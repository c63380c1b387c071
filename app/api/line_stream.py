"""The answer to a body of lines: a line out for each line in, in order, while the body still arrives.

    body ─► LineReader ─► batch ─► make (some batches at once) ─► finish, in order ─► result lines

Memory is bounded by the batches under way, not by the body: where results are not taken, or the model is
busy, nothing more is read, and TCP slows the caller down.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.body import json_object
from app.api.guard import LINES_MEDIA_TYPE
from app.api.lines import Line, LineBounds, LineReader, OverlongLine
from app.api.problems import item_error
from app.errors import TooLarge
from app.settings import Settings

_BATCH_LINES: Final = 64
_BATCH_BYTES: Final = 32 * 2**20
_BATCHES_UNDER_WAY: Final = 3  # one is finished, one embedded, one decoded
_WORDS_BYTES: Final = 64 * 2**10  # of a line, beside its image: id, metadata and source, four times over

Made = TypeVar("Made")
Batch = Sequence[tuple[int, Line]]


class LineStream(Response, Generic[Made]):
    """Answers lines with lines.

    Not Starlette's StreamingResponse, which would take pieces of the body for news of the caller's leaving.

    Args:
        bounds: Of memory and patience, see `line_bounds`.
        make: Works on a batch of numbered lines; several run at once. What is wrong with a line is for its
            result to say: an exception ends the whole stream.
        finish: Makes the result lines of what `make` gave, batch after batch, in order.
    """

    media_type = LINES_MEDIA_TYPE

    def __init__(
        self,
        bounds: LineBounds,
        *,
        make: Callable[[Batch], Awaitable[Made]],
        finish: Callable[[Made], Awaitable[bytes]],
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})  # proxies shall pass lines on as they come
        del self.headers["content-length"]
        self._bounds = bounds
        self._make = make
        self._finish = finish

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
            last = json_lines([{"error": item_error(reader.timeout)}])
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _results(self, reader: LineReader) -> AsyncGenerator[bytes, None]:
        """Result lines of one batch after the other, in the order of the lines."""
        under_way: deque[asyncio.Task[Made]] = deque()
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
                    yield await self._finish(under_way.popleft().result())
                if reading is not None and reading.done():
                    if (batch := reading.result()) is None:
                        break
                    under_way.append(asyncio.ensure_future(self._make(batch)))
                    reading = None
            while under_way:
                yield await self._finish(await under_way.popleft())
        finally:
            for task in [*under_way, *([reading] if reading else ())]:
                task.cancel()
            await asyncio.gather(*under_way, *([reading] if reading else ()), return_exceptions=True)


def line_bounds(settings: Settings, *, result_bytes: int = 0) -> LineBounds:
    """Bounds of a stream: a line may hold the largest image, in base64.

    Args:
        settings: Of the service.
        result_bytes: Of a line of the answer, where it may be large: batches then have fewer lines.
    """
    most_lines = min(_BATCH_LINES, settings.max_client_batch_size)
    return LineBounds(
        line_bytes=settings.max_image_bytes * 4 // 3 + _WORDS_BYTES,
        batch_lines=max(1, min(most_lines, _BATCH_BYTES // max(1, result_bytes))),
        batch_bytes=_BATCH_BYTES,
        idle_s=settings.upload_timeout_s,
    )


def line_members(line: Line, bounds: LineBounds) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        TooLarge: The line is longer than any may be.
        InvalidJson: It is no JSON object.
    """
    if isinstance(line, OverlongLine):
        limit = bounds.line_bytes
        raise TooLarge(
            f"the line has {line.size_bytes:,} bytes, at most {limit:,} are taken",
            limit=limit,
            actual=line.size_bytes,
        )
    return json_object(line, what="line")


def json_lines(answers: Iterable[Mapping[str, Any]]) -> bytes:
    """One line for each answer; NumPy arrays may be in it."""
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    return b"".join(orjson.dumps(answer, option=option) for answer in answers)
