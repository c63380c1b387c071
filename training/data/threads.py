"""Threads that decode, and end with the process: one that waits for a dead disk keeps nobody waiting.

Those of concurrent.futures are waited for when Python ends, for ever if need be.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

_FAREWELL_S = 5.0  # in which a thread that is alive ends what it is at

_Task = tuple[Future[None], Callable[[], None]]


class Threads:
    """A few threads that do what they are given, in order."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"decode_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Has something done by the next thread that is free."""
        future: Future[None] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Ends the threads; what none has begun is not done."""
        while not self._tasks.empty():
            if (waiting := self._tasks.get()) is not None:
                waiting[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        deadline_s = time.monotonic() + _FAREWELL_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline_s - time.monotonic()))

    def _work(self) -> None:
        while (given := self._tasks.get()) is not None:
            future, task = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                task()
            except BaseException as error:  # whatever it is, it belongs to the one who waits for the result
                future.set_exception(error)
            else:
                future.set_result(None)
            del future, task, given  # a batch shall not stay in memory until the next task comes
