"""A body of lines, taken as it arrives: bounded in memory, and read no faster than it is worked on.

    receive ─► LineSplitter ─► lines that wait, up to a bound ─► batches

While the bound is reached nothing is received, and TCP slows the caller down.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from starlette.types import Receive

from app.api.refusals import UploadTimeout

_MOST_LINES_HELD: Final = 256


@dataclass(frozen=True)
class OverlongLine:
    """A line above the limit, of which nothing was kept."""

    size_bytes: int


Line: TypeAlias = bytes | OverlongLine


class LineSplitter:
    """Cuts pieces of a body into lines; never holds more than one line's limit.

    Args:
        max_line_bytes: Of a line, without its end.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._pieces: list[bytes] = []
        self._size_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """Gives the lines that end in a piece."""
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._add(end)
            yield self._take()
        self._add(rest)

    def finish(self) -> Iterator[Line]:
        """Gives the last line, where it has no end."""
        if self._size_bytes:
            yield self._take()

    def _add(self, piece: bytes) -> None:
        self._size_bytes += len(piece)
        if self._size_bytes > self._max_line_bytes:
            self._pieces.clear()  # counted on, and thrown away
        elif piece:
            self._pieces.append(piece)

    def _take(self) -> Line:
        is_overlong = self._size_bytes > self._max_line_bytes
        line: Line = OverlongLine(self._size_bytes) if is_overlong else b"".join(self._pieces)
        self._pieces.clear()
        self._size_bytes = 0
        return line


@dataclass(frozen=True)
class LineBounds:
    """How much of a body is in memory.

    Attributes:
        line_bytes: Of one line.
        batch_lines: Of one batch.
        batch_bytes: Of one batch, unless its first line alone has more; so much may wait, too.
        idle_s: How long nothing may arrive while the reader waits for it.
    """

    line_bytes: int
    batch_lines: int
    batch_bytes: int
    idle_s: float


@dataclass
class LineReader:
    """Reads a body of lines on a task of its own, `run`, for one that takes `next_batch`.

    Attributes:
        receive: Of the request, its body unread.
        bounds: Of memory and patience.
        timeout: Why reading ended before the body did; None if it did not.
    """

    receive: Receive
    bounds: LineBounds
    timeout: UploadTimeout | None = None
    _lines: deque[tuple[int, Line]] = field(default_factory=deque)
    _held_bytes: int = 0
    _ended: bool = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self) -> None:
        """Reads until the caller has left, who may wait for answers long after the body has ended."""
        if await self._read_body():
            while (await self.receive())["type"] != "http.disconnect":
                pass

    async def next_batch(self) -> list[tuple[int, Line]] | None:
        """Waits for lines, and gives those that are there, numbered from 0; None when there are no more.

        So a slow caller has each line's answer at once, and a fast one full batches.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._lines or self._ended)
            batch: list[tuple[int, Line]] = []
            size_bytes = 0
            while self._lines and len(batch) < self.bounds.batch_lines:
                size_bytes += _size_of(self._lines[0][1])
                if batch and size_bytes > self.bounds.batch_bytes:
                    break
                batch.append(self._lines.popleft())
            self._held_bytes -= sum(_size_of(line) for _, line in batch)
            self._changed.notify_all()
        return batch or None

    async def _read_body(self) -> bool:
        """Reads the body; whether the caller is still there."""
        splitter = LineSplitter(self.bounds.line_bytes)
        number = 0
        while True:
            try:
                async with asyncio.timeout(self.bounds.idle_s):
                    message = await self.receive()
            except TimeoutError:
                self.timeout = UploadTimeout(f"no line came for {self.bounds.idle_s:g} s: the stream is over")
                await self._end()
                return True
            if message["type"] == "http.disconnect":
                return False
            lines = list(splitter.feed(message.get("body", b"")))
            has_more = message.get("more_body", False)
            if not has_more:
                lines += splitter.finish()
            await self._put([(number + place, line) for place, line in enumerate(lines)])
            number += len(lines)
            if not has_more:
                await self._end()
                return True

    async def _put(self, lines: list[tuple[int, Line]]) -> None:
        async with self._changed:
            # Blank lines are counted, and passed over.
            self._lines.extend((number, line) for number, line in lines if not _is_blank(line))
            self._held_bytes += sum(_size_of(line) for _, line in lines if not _is_blank(line))
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: self._held_bytes <= self.bounds.batch_bytes and len(self._lines) < _MOST_LINES_HELD
            )

    async def _end(self) -> None:
        async with self._changed:
            self._ended = True
            self._changed.notify_all()


def _is_blank(line: Line) -> bool:
    return isinstance(line, bytes) and (not line or line.isspace())


def _size_of(line: Line) -> int:
    return len(line) if isinstance(line, bytes) else 0
