"""Work on a long series with several pieces under way, in order, and never more in memory than those."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def pipelined(
    work: Callable[[Piece], Result], pieces: Iterable[Piece], *, in_flight: int
) -> Iterator[Result]:
    """The results of pieces, in their order, from as many threads as may be in flight.

    A piece is asked for when there is room for it: at most `in_flight` are anywhere between the two ends.

    Raises:
        Exception: What `work` raised for a piece, when its turn comes; later pieces' results are lost.
    """
    waiting: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(in_flight, thread_name_prefix="dino-client")
    try:
        for piece in pieces:
            waiting.append(threads.submit(work, piece))
            if len(waiting) == in_flight:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


async def pipelined_async(
    work: Callable[[Piece], Awaitable[Result]], pieces: Iterable[Piece], *, in_flight: int
) -> AsyncIterator[Result]:
    """As `pipelined`, with tasks. Pieces are asked for on a thread, as reading files blocks."""
    waiting: deque[asyncio.Future[Result]] = deque()
    source = iter(pieces)
    end = object()
    try:
        while (piece := await asyncio.to_thread(next, source, end)) is not end:
            waiting.append(asyncio.ensure_future(work(piece)))  # type: ignore[arg-type] # it isn't the end
            if len(waiting) == in_flight:
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
