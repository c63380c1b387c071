import queue
import threading
import time

from app.inference.decode import DecodePool


def test_every_job_is_handled_once_before_the_pool_closes() -> None:
    handled: list[int] = []
    pool: DecodePool[int] = DecodePool(handled.append, failed=lambda _: None, threads=3)
    pool.start()
    for job in range(100):
        pool.put(job)
    pool.close(timeout_s=20)
    assert sorted(handled) == list(range(100))
    assert not pool.alive


def test_a_job_that_raises_is_settled_and_its_thread_goes_on() -> None:
    handled: list[int] = []
    failed: list[int] = []

    def handle(job: int) -> None:
        if job % 2:
            raise MemoryError
        handled.append(job)

    pool: DecodePool[int] = DecodePool(handle, failed=failed.append, threads=1)
    pool.start()
    for job in range(6):
        pool.put(job)
    assert pool.alive
    pool.close(timeout_s=20)
    assert handled == [0, 2, 4]
    assert failed == [1, 3, 5]


def test_a_thread_that_is_made_to_end_settles_its_job_and_shows_as_dead() -> None:
    failed: list[str] = []
    told = threading.Event()

    def handle(job: str) -> None:
        raise SystemExit

    def settle(job: str) -> None:
        failed.append(job)
        told.set()

    pool: DecodePool[str] = DecodePool(handle, failed=settle, threads=1)
    pool.start()
    pool.put("last")
    assert told.wait(timeout=20)
    pool.close(timeout_s=20)
    assert failed == ["last"]
    assert not pool.alive


def test_jobs_wait_where_all_threads_are_busy() -> None:
    free = threading.Event()
    begun = threading.Semaphore(0)

    def handle(job: int) -> None:
        begun.release()
        assert free.wait(timeout=20)

    pool: DecodePool[int] = DecodePool(handle, failed=lambda _: None, threads=2)
    pool.start()
    for job in range(5):
        pool.put(job)
    assert begun.acquire(timeout=20)
    assert begun.acquire(timeout=20)
    assert pool.depth == 3
    free.set()
    pool.close(timeout_s=20)
    assert pool.depth == 0


def test_interactive_jobs_overtake_bulk() -> None:
    free, begun = threading.Event(), threading.Event()
    handled: list[str] = []

    def handle(job: str) -> None:
        begun.set()
        assert free.wait(timeout=20)
        handled.append(job)

    pool: DecodePool[str] = DecodePool(handle, failed=lambda _: None, threads=1, bulk_at_once=9)
    pool.start()
    pool.put("first")
    assert begun.wait(timeout=20)
    for number in range(3):
        pool.put(f"bulk {number}", "bulk")
    pool.put("second")
    free.set()
    pool.close(timeout_s=20)
    assert handled == ["first", "second", "bulk 0", "bulk 1", "bulk 2"]


def test_bulk_that_waits_behind_the_decoders_holds_only_its_part_of_what_they_need() -> None:
    handled: queue.SimpleQueue[str] = queue.SimpleQueue()
    pool: DecodePool[str] = DecodePool(handled.put, failed=lambda _: None, threads=1, bulk_at_once=2)
    pool.start()
    for number in range(4):
        pool.put(f"bulk {number}", "bulk")
    assert [handled.get(timeout=20), handled.get(timeout=20)] == ["bulk 0", "bulk 1"]
    pool.put("interactive")
    assert handled.get(timeout=20) == "interactive", "though it came after all of bulk"
    assert pool.depth == 2
    pool.bulk_ended()
    assert handled.get(timeout=20) == "bulk 2"
    pool.close(timeout_s=20)
    assert handled.get(timeout=20) == "bulk 3", "at the end all is handled"


def test_a_job_that_takes_long_shows_while_it_lasts() -> None:
    free = threading.Event()
    pool: DecodePool[int] = DecodePool(
        lambda _: None if free.wait(20) else None, failed=lambda _: None, threads=2
    )
    pool.start()
    assert pool.busy_for_s() == 0
    pool.put(1)
    deadline_s = time.monotonic() + 20
    while pool.busy_for_s() < 0.05:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    free.set()
    pool.close(timeout_s=20)
    assert pool.busy_for_s() == 0


def test_a_limited_pool_works_at_fewer_jobs_at_once_and_ends() -> None:
    together = 0
    most = 0
    lock = threading.Lock()

    def handle(_: int) -> None:
        nonlocal together, most
        with lock:
            together += 1
            most = max(most, together)
        time.sleep(0.005)
        with lock:
            together -= 1

    pool: DecodePool[int] = DecodePool(handle, failed=lambda _: None, threads=4)
    pool.start()
    pool.limit(2)
    for job in range(30):
        pool.put(job)
    pool.close(timeout_s=20)
    assert not pool.alive, "who waited for a turn ended with the others"
    assert most == 2
