"""Writers of this process take turns where they write the same items."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Claims:
    """Who writes which ids now. Others write theirs at the same time."""

    def __init__(self) -> None:
        """Nobody writes."""
        self._changed = threading.Condition()
        self._ids: set[str] = set()
        self._is_closed = False

    @contextmanager
    def of(self, ids: Iterable[str]) -> Iterator[None]:
        """Waits until nobody writes any of the ids, and keeps others from them."""
        claimed = set(ids)
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed and self._ids.isdisjoint(claimed))
            self._ids |= claimed
        try:
            yield
        finally:
            with self._changed:
                self._ids -= claimed
                self._changed.notify_all()

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Waits until nobody writes, and keeps everybody from it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_closed)
            self._is_closed = True
            self._changed.wait_for(lambda: not self._ids)
        try:
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()
