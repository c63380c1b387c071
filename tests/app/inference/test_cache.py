import asyncio
import hashlib
import math

import numpy as np

from app.inference.admission import Cost
from app.inference.cache import EmbeddingCache
from app.inference.lanes import Lane
from app.inference.results import Vector
from app.inference.work import Picture, Request, Work


def picture_of(data: bytes, request: Request | None = None, *, lane: Lane = "interactive") -> Picture:
    if request is None:
        loop = asyncio.new_event_loop()
        request = Request(loop.create_future(), images=1, deadline_s=math.inf, lane=lane)
        loop.close()
    picture = Picture(request, 0, Cost(1), data)
    picture.sha256 = hashlib.sha256(data).digest()
    return picture


def enter(cache: EmbeddingCache, data: bytes, *, lane: Lane = "interactive") -> tuple[Work, Vector | Work]:
    picture = picture_of(data, lane=lane)
    work = Work([picture])
    return work, cache.join(picture, work)


def leads(entered: tuple[Work, Vector | Work]) -> bool:
    work, found = entered
    return found is work


def row(value: float) -> Vector:
    return np.full(4, value, np.float32)


def test_the_first_leads_the_same_bytes_follow_and_other_bytes_lead() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=8)
    work, found = enter(cache, b"one")
    assert found is work
    assert enter(cache, b"one")[1] is work
    assert len(work.pictures) == 2
    assert leads(enter(cache, b"two"))


def test_work_is_as_urgent_as_the_most_urgent_who_waits_for_it() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=8)
    work, _ = enter(cache, b"one", lane="bulk")
    lanes = [work.lane]
    for lane in ("bulk", "interactive", "bulk"):
        enter(cache, b"one", lane=lane)
        lanes.append(work.lane)
    assert lanes == ["bulk", "bulk", "interactive", "interactive"]


def test_a_finished_row_is_found_by_its_bytes_and_cannot_be_changed() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=8)
    work, _ = enter(cache, b"one")
    batch = np.stack([row(1), row(2)])
    cache.finish(work, batch[0])
    batch[:] = 9
    _, found = enter(cache, b"one")
    assert isinstance(found, np.ndarray)
    assert found.tolist() == [1, 1, 1, 1]
    assert not found.flags.writeable
    assert found.base is None, "a view would keep its whole batch in memory"


def test_work_without_a_row_is_not_kept_and_the_next_leads_again() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=8)
    work, _ = enter(cache, b"one")
    cache.finish(work, None)
    assert leads(enter(cache, b"one"))


def test_the_least_recently_used_leaves_first() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=2)
    for data in (b"one", b"two"):
        cache.finish(enter(cache, data)[0], row(1))
    assert isinstance(enter(cache, b"one")[1], np.ndarray)
    cache.finish(enter(cache, b"three")[0], row(3))
    assert len(cache) == 2
    assert isinstance(enter(cache, b"one")[1], np.ndarray)
    assert leads(enter(cache, b"two"))


def test_without_room_for_rows_work_in_flight_is_still_shared() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=0)
    work, _ = enter(cache, b"one")
    assert enter(cache, b"one")[1] is work
    cache.finish(work, row(1))
    assert len(cache) == 0
    assert leads(enter(cache, b"one"))


def test_work_is_wanted_while_one_of_its_callers_is_there_and_closed_when_none_is() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=8)
    work, _ = enter(cache, b"one")
    enter(cache, b"one")
    leader, follower = work.pictures
    leader.request.left = True
    assert cache.still_wanted(work, 0.0)
    follower.request.deadline_s = 5.0
    assert cache.still_wanted(work, 4.9)
    assert not cache.still_wanted(work, 5.0)
    assert leads(enter(cache, b"one")), "nobody joins work that will not be done"


def test_pixels_sent_without_a_file_are_never_stored() -> None:
    cache = EmbeddingCache("sha256:a", max_rows=8)
    sent = picture_of(b"")
    sent.sha256 = b""
    cache.finish(Work([sent]), row(1))
    assert len(cache) == 0
