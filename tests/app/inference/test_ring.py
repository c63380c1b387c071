import threading

import pytest
import torch

from app.inference.ring import PixelRing, RingClosed


def test_chunks_are_runs_of_consecutive_slots_that_share_the_rings_memory() -> None:
    ring = PixelRing(8, 4)
    for slot in range(8):
        ring.pixels_RCHW[slot] = slot
    chunks = ring.chunks([1, 2, 3, 6, 7])
    assert [chunk[:, 0, 0, 0].tolist() for chunk in chunks] == [[1, 2, 3], [6, 7]]
    assert all(
        chunk.untyped_storage().data_ptr() == ring.pixels_RCHW.untyped_storage().data_ptr()
        for chunk in chunks
    )
    assert chunks[0].is_contiguous(memory_format=torch.channels_last)


def test_no_slots_make_no_chunks() -> None:
    assert PixelRing(2, 4).chunks([]) == []


def test_slots_are_given_in_order_and_again_once_released() -> None:
    ring = PixelRing(3, 4)
    assert [ring.acquire() for _ in range(3)] == [0, 1, 2]
    assert ring.free == 0
    ring.release(1)
    assert ring.acquire() == 1


def test_who_waits_for_a_slot_gets_the_one_released() -> None:
    ring = PixelRing(1, 4)
    ring.acquire()
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(ring.acquire()))
    waiter.start()
    ring.release(0)
    waiter.join(timeout=20)
    assert got == [0]


def test_closing_wakes_all_who_wait_and_those_who_come() -> None:
    ring = PixelRing(1, 4)
    ring.acquire()
    woken: list[bool] = []

    def wait() -> None:
        with pytest.raises(RingClosed):
            ring.acquire()
        woken.append(True)

    waiters = [threading.Thread(target=wait) for _ in range(3)]
    for waiter in waiters:
        waiter.start()
    ring.close()
    for waiter in waiters:
        waiter.join(timeout=20)
    assert woken == [True] * 3
    with pytest.raises(RingClosed):
        ring.acquire()
