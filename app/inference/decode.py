"""Threads that turn files into pixels. Python threads do: the decoders release the interpreter's lock."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from app.inference.lanes import Lane, LaneQueue
from app.inference.threads import use_native_threads, yield_to_the_loop

logger = logging.getLogger(__name__)

Job = TypeVar("Job")


class DecodePool(Generic[Job]):
    """A fixed number of threads that handle jobs: the interactive ones first, see `LaneQueue`.

    Args:
        handle: Does a job. If it raises anything at all, `failed` is told, and the thread goes on unless what
            was raised ends a process.
        failed: Settles a job that `handle` left unsettled.
        threads: How many, each with one native thread.
        bulk_at_once: Jobs of the bulk lane that may be begun and not yet `bulk_ended`, so that bulk work that
            waits behind the decoders never holds all that a decoder needs.
    """

    def __init__(
        self,
        handle: Callable[[Job], None],
        *,
        failed: Callable[[Job], None],
        threads: int,
        bulk_at_once: int = 1,
    ) -> None:
        self._handle = handle
        self._failed = failed
        self._bulk_at_once = bulk_at_once
        self._bulk_begun = 0
        self._at_once = threads
        self._changed = threading.Condition()
        self._jobs: LaneQueue[Job] = LaneQueue()
        self._closing = False
        self._started = threading.Barrier(threads + 1)
        self._began_s: list[float | None] = [None] * threads  # what each thread does now, since when
        self._threads = [
            threading.Thread(target=self._main, args=(number,), name=f"dino-decode-{number}", daemon=True)
            for number in range(threads)
        ]

    def start(self) -> None:
        """Starts the threads and waits until each has taken its one native thread."""
        for thread in self._threads:
            thread.start()
        self._started.wait()

    def limit(self, at_once: int) -> None:
        """Lets fewer threads work at the same time, from now."""
        with self._changed:
            self._at_once = at_once

    def put(self, job: Job, lane: Lane = "interactive") -> None:
        """Adds a job; never waits. The number of jobs is admission's care."""
        with self._changed:
            self._jobs.put(job, lane)
            self._changed.notify()

    def bulk_ended(self) -> None:
        """A job of the bulk lane that was begun doesn't count any more."""
        with self._changed:
            self._bulk_begun -= 1
            self._changed.notify()

    def close(self, *, timeout_s: float | None = None) -> None:
        """Ends the threads once they have handled all jobs, and waits for each up to the timeout."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def depth(self) -> int:
        """Jobs that no thread has begun."""
        return len(self._jobs)

    def waits(self, lane: Lane) -> bool:
        """Whether a job of the lane waits for a thread."""
        return self._jobs.waiting(lane) > 0

    def busy_for_s(self) -> float:
        """How long the longest job has been in its thread; 0 where there is none."""
        now_s = time.monotonic()
        return max((now_s - began_s for began_s in self._began_s if began_s is not None), default=0.0)

    def _main(self, number: int) -> None:
        yield_to_the_loop()
        use_native_threads(1)
        self._started.wait()
        while True:
            with self._changed:
                while (lane := self._turn()) is None:
                    if self._closing and not self._jobs:
                        self._changed.notify_all()  # who waited for a turn has none to wait for
                        return
                    self._changed.wait()
                job = self._jobs.pop(lane)
                self._began_s[number] = time.monotonic()
            try:
                self._handle(job)
            except Exception:
                logger.exception("a decoder's job failed in an unforeseen way")
                self._failed(job)
            except BaseException:
                logger.exception("a decoder thread died; the service must be restarted")
                self._failed(job)
                return
            finally:
                self._began_s[number] = None

    def _turn(self) -> Lane | None:
        at_work = len(self._began_s) - self._began_s.count(None)
        if at_work >= self._at_once:
            return None  # one of those at work takes what is there when it has done its own
        # At the end nobody comes who could be kept waiting.
        lane = self._jobs.turn(bulk_may=self._closing or self._bulk_begun < self._bulk_at_once)
        if lane == "bulk":
            self._bulk_begun += 1
        return lane
