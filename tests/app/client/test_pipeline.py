"""Pieces in flight: in order, never more than was said, and none left behind."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.client.embedding import batches_of
from app.client.items import Failure
from app.client.pipeline import pipelined, pipelined_async


class Pieces:
    """Numbers, and how many were asked for."""

    def __init__(self, count: int) -> None:
        self.asked = 0
        self._count = count

    def __iter__(self) -> Iterator[int]:
        for number in range(self._count):
            self.asked += 1
            yield number


def test_results_come_in_order_whichever_is_done_first() -> None:
    later = threading.Event()

    def work(piece: int) -> int:
        # The first ends only after the second has.
        if piece == 0:
            assert later.wait(10)
        if piece == 1:
            later.set()
        return piece

    assert list(pipelined(work, range(6), in_flight=2)) == list(range(6))


def test_no_more_is_asked_for_than_may_be_in_flight() -> None:
    pieces = Pieces(100)
    results = pipelined(lambda piece: piece, pieces, in_flight=3)
    for taken in range(1, 20):
        assert next(results) == taken - 1
        assert pieces.asked <= taken + 2
    results.close()  # type: ignore[attr-defined]
    assert pieces.asked < 25


def test_a_piece_that_fails_ends_it_when_its_turn_comes() -> None:
    def work(piece: int) -> int:
        if piece == 3:
            raise ValueError("three")
        return piece

    results = pipelined(work, range(100), in_flight=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_the_asynchronous_one_does_the_same() -> None:
    async def run() -> tuple[list[int], int, int]:
        pieces, under_way, most = Pieces(50), 0, 0

        async def work(piece: int) -> int:
            nonlocal under_way, most
            under_way += 1
            most = max(most, under_way)
            for _ in range(3 if piece % 2 else 1):
                await asyncio.sleep(0)
            under_way -= 1
            return piece

        first: list[int] = []
        results = pipelined_async(work, pieces, in_flight=3)
        async for result in results:
            first.append(result)
            if len(first) == 10:
                break
        await results.aclose()  # type: ignore[attr-defined]
        return first, pieces.asked, most

    results, asked, most = asyncio.run(run())
    assert results == list(range(10))
    assert asked <= 13
    assert most <= 3


def test_batches_are_bounded_in_number_and_in_bytes() -> None:
    small = [b"x"] * 10
    assert [len(batch) for batch in batches_of(small, most=4)] == [4, 4, 2]
    large = [bytes(20 * 2**20)] * 3
    assert [len(batch) for batch in batches_of(large, most=4)] == [1, 1, 1]
    assert list(batches_of([], most=4)) == []


def test_a_file_that_cannot_be_read_is_a_failure_in_its_place() -> None:
    (batch,) = batches_of([b"x", Path("nowhere.jpg")], most=4)
    assert batch[0] == b"x"
    assert isinstance(batch[1], Failure)
    assert "nowhere.jpg" in batch[1].title
