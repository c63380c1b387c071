"""Embeddings by content: what was computed lately, and what is being computed now.

The key is the whole SHA-256 of the file with the model's fingerprint and what is wanted of it, never a part
of the hash or a property of the picture: two that share a key would share a vector (CVE-2025-46722).
"""

import threading
from collections import OrderedDict

from app.inference.features import Reading
from app.inference.results import Vector
from app.inference.work import Picture, Work

_Key = tuple[str, bytes, Reading | None]


class EmbeddingCache:
    """Stored rows, bounded, the least recently used leaving first; and work in flight that others may join.

    Safe to use from many threads.

    Args:
        fingerprint: Of the model that computes the rows.
        max_rows: Rows to keep; 0 keeps none, and work in flight is still shared.
    """

    def __init__(self, fingerprint: str, *, max_rows: int) -> None:
        self._fingerprint = fingerprint
        self._max_rows = max_rows
        self._lock = threading.Lock()
        self._rows: OrderedDict[_Key, Vector] = OrderedDict()
        self._open: dict[_Key, Work] = {}

    def join(self, picture: Picture, work: Work) -> Vector | Work:
        """Finds a picture's row, or the work that will give it one.

        Args:
            picture: With its `sha256`.
            work: The picture's own, which is opened to others if nothing else is there.

        Returns:
            The stored row; `work`, which now has to be done; or another's work, which the picture gets its
            row with. That is then as urgent as the picture.
        """
        key = self._key(picture)
        with self._lock:
            row = self._rows.get(key)  # embeddings only: patches of one image are as large as 200 of them
            if row is not None:
                self._rows.move_to_end(key)
                return row
            shared = self._open.get(key)
            if shared is not None:
                shared.pictures.append(picture)
                if picture.request.lane == "interactive":
                    shared.lane = "interactive"
                return shared
            self._open[key] = work
            return work

    def still_wanted(self, work: Work, now_s: float) -> bool:
        """Whether any picture's caller waits for the work. After False nobody can join it any more."""
        with self._lock:
            if any(picture.request.wanted(now_s) for picture in work.pictures):
                return True
            self._close(work)
            return False

    def finish(self, work: Work, row: Vector | None) -> None:
        """Closes the work to others and stores its row, if it has one."""
        with self._lock:
            self._close(work)
            if row is None or not self._max_rows or not work.pictures[0].sha256 or work.reading:
                return
            # A copy: the row is a view that would keep its whole batch in memory.
            stored = row.copy()
            stored.setflags(write=False)
            self._rows[self._key(work.pictures[0])] = stored
            if len(self._rows) > self._max_rows:
                self._rows.popitem(last=False)

    def __len__(self) -> int:
        return len(self._rows)

    def _close(self, work: Work) -> None:
        key = self._key(work.pictures[0])
        if self._open.get(key) is work:
            del self._open[key]

    def _key(self, picture: Picture) -> _Key:
        return self._fingerprint, picture.sha256, picture.reading
