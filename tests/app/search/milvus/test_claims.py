"""Writers take turns where they write the same items, and only there."""

import contextlib
import threading
import time
from collections.abc import Callable

from app.search.milvus.claims import Claims


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_writers_of_one_item_take_turns_and_others_do_not_wait() -> None:
    claims = Claims()
    order: list[str] = []

    def second() -> None:
        with claims.of(["b", "a"]):
            order.append("second")

    def other() -> None:
        with claims.of(["c"]):
            order.append("other")

    with claims.of(["a"]):
        waiting = started(second)
        started(other).join(5)
        time.sleep(0.05)
        order.append("first")
    waiting.join(5)
    assert order == ["other", "first", "second"]


def test_who_claims_all_waits_for_writers_and_keeps_new_ones_out() -> None:
    claims = Claims()
    order: list[str] = []

    def everything() -> None:
        with claims.of_all():
            order.append("all")
            time.sleep(0.05)
            order.append("all done")

    def late() -> None:
        with claims.of(["b"]):
            order.append("late")

    with claims.of(["a"]):
        closing = started(everything)
        time.sleep(0.05)
        waiting = started(late)
        time.sleep(0.05)
        order.append("early")
    for thread in (closing, waiting):
        thread.join(5)
    assert order == ["early", "all", "all done", "late"]


def test_a_writer_that_fails_lets_others_on() -> None:
    claims = Claims()
    with contextlib.suppress(RuntimeError), claims.of(["a"]):
        raise RuntimeError
    with contextlib.suppress(RuntimeError), claims.of_all():
        raise RuntimeError
    with claims.of(["a"]):
        pass
