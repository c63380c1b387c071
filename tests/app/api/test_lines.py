import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive

from app.api.lines import Line, LineBounds, LineReader, LineSplitter, OverlongLine
from app.api.refusals import UploadTimeout

BOUNDS = LineBounds(line_bytes=10, batch_lines=3, batch_bytes=15, idle_s=5.0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_cut_wherever_the_pieces_are(size: int) -> None:
    body = b"one\n\ntwo\r\nlonger than ten\n1234567890\nlast"
    splitter = LineSplitter(10)
    lines: list[Line] = []
    for start in range(0, len(body), size):
        lines += splitter.feed(body[start : start + size])
    lines += splitter.finish()
    assert lines == [b"one", b"", b"two\r", OverlongLine(15), b"1234567890", b"last"]


def test_an_endless_line_is_not_kept() -> None:
    splitter = LineSplitter(1_000)
    for _ in range(10_000):
        assert list(splitter.feed(b"x" * 1_000)) == []
        assert sum(map(len, splitter._pieces)) <= 1_000
    assert list(splitter.feed(b"\nshort\n")) == [OverlongLine(10_000_000), b"short"]


def body_in(pieces: Sequence[bytes], *, taken: list[int] | None = None) -> Receive:
    """Receives pieces, then waits for ever."""
    messages: list[Message] = [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
        for number, piece in enumerate(pieces)
    ]

    async def receive() -> Message:
        if not messages:
            await asyncio.Event().wait()
        if taken is not None:
            taken.append(len(taken))
        return messages.pop(0)

    return receive


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(10):
            await work()

    asyncio.run(timed())


async def batches_of(reader: LineReader) -> list[list[tuple[int, Line]]]:
    reading = asyncio.create_task(reader.run())
    batches = []
    while (batch := await reader.next_batch()) is not None:
        batches.append(batch)
    reading.cancel()
    return batches


def test_batches_keep_to_their_bounds_and_lines_are_numbered_as_they_stand() -> None:
    async def work() -> None:
        reader = LineReader(body_in([b"a\n\nb\n \r\nc\nd\n0123456789\n0123456789\nlast"]), BOUNDS)
        assert await batches_of(reader) == [
            [(0, b"a"), (2, b"b"), (4, b"c")],
            [(5, b"d"), (6, b"0123456789")],
            [(7, b"0123456789"), (8, b"last")],
        ]

    run(work)


def test_a_slow_caller_gets_each_line_at_once() -> None:
    async def work() -> None:
        pieces: asyncio.Queue[Message] = asyncio.Queue()
        reader = LineReader(pieces.get, BOUNDS)
        reading = asyncio.create_task(reader.run())
        for number in range(3):
            await pieces.put({"type": "http.request", "body": b"x\n", "more_body": True})
            assert await reader.next_batch() == [(number, b"x")]
        reading.cancel()

    run(work)


def test_nothing_more_is_received_while_lines_wait() -> None:
    async def work() -> None:
        taken: list[int] = []
        reader = LineReader(body_in([b"0123456789\n"] * 100, taken=taken), BOUNDS)
        reading = asyncio.create_task(reader.run())
        await asyncio.sleep(0.05)
        assert len(taken) == 2  # the bound is 15 bytes
        for _ in range(10):
            assert await reader.next_batch() is not None
        await asyncio.sleep(0.05)
        assert len(taken) == 12
        reading.cancel()

    run(work)


def test_a_body_that_stops_coming_is_over_after_a_while_but_not_while_nobody_takes_lines() -> None:
    async def work() -> None:
        bounds = LineBounds(line_bytes=10, batch_lines=3, batch_bytes=5, idle_s=0.1)
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": b"0123456789\n", "more_body": True}
        ]

        async def receive() -> Message:
            if not messages:
                await asyncio.Event().wait()
            return messages.pop(0)

        reader = LineReader(receive, bounds)
        reading = asyncio.create_task(reader.run())
        await asyncio.sleep(0.3)
        assert _timeout(reader) is None  # it is we who don't read
        assert await reader.next_batch() == [(0, b"0123456789")]
        assert await reader.next_batch() is None
        assert isinstance(_timeout(reader), UploadTimeout)
        reading.cancel()

    run(work)


def _timeout(reader: LineReader) -> UploadTimeout | None:
    return reader.timeout


def test_it_ends_when_the_caller_leaves() -> None:
    async def work() -> None:
        for pieces in ([b"a\n", b"b\n"], [b""]):
            messages: list[Message] = [
                *({"type": "http.request", "body": piece, "more_body": len(pieces) > 1} for piece in pieces),
                {"type": "http.disconnect"},
            ]

            async def receive(messages: list[Message] = messages) -> Message:
                return messages.pop(0)

            await LineReader(receive, BOUNDS).run()
            assert messages == []

    run(work)
