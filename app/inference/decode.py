"""Threads that turn files into pixels. Python threads do: the decoders release the interpreter's lock."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from app.inference.threads import use_native_threads

logger = logging.getLogger(__name__)

Job = TypeVar("Job")


class DecodePool(Generic[Job]):
    """A fixed number of threads that handle jobs in the order of their arrival.

    Args:
        handle: Does a job. If it raises anything at all, `failed` is told, and the thread goes on unless what
            was raised ends a process.
        failed: Settles a job that `handle` left unsettled.
        threads: How many, each with one native thread.
    """

    def __init__(self, handle: Callable[[Job], None], *, failed: Callable[[Job], None], threads: int) -> None:
        self._handle = handle
        self._failed = failed
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._started = threading.Barrier(threads + 1)
        self._threads = [
            threading.Thread(target=self._main, name=f"dino-decode-{number}", daemon=True)
            for number in range(threads)
        ]

    def start(self) -> None:
        """Starts the threads and waits until each has taken its one native thread."""
        for thread in self._threads:
            thread.start()
        self._started.wait()

    def put(self, job: Job) -> None:
        """Adds a job; never waits. The number of jobs is admission's care."""
        self._jobs.put(job)

    def close(self, *, timeout_s: float | None = None) -> None:
        """Ends the threads once they have handled all jobs, and waits for each up to the timeout."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def depth(self) -> int:
        """Jobs that no thread has begun."""
        return self._jobs.qsize()

    def _main(self) -> None:
        use_native_threads(1)
        self._started.wait()
        while (job := self._jobs.get()) is not None:
            try:
                self._handle(job)
            except Exception:
                logger.exception("a decoder's job failed in an unforeseen way")
                self._failed(job)
            except BaseException:
                logger.exception("a decoder thread died; the service must be restarted")
                self._failed(job)
                return
