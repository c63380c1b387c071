import threading

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
