"""What is done behind the writers, so that neither a commit nor a deletion waits for it.

- the index of filters is written, and what updates replaced is erased, many items at a time: an item has its
  rows all over the index, and of a thousand items many are on the same pages;
- what was deleted longer ago than its grace, and what dropped collections had, is erased bit by bit;
- the journal is moved into the database.

All of it is small transactions of their own: a crash leaves each done or not done, and the next start goes
on.
"""

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeVar

from app.errors import StorageError
from app.search.collection import GRACE_S
from app.search.embedded.items import Behind, Items

_Left = TypeVar("_Left", bool, int)
logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.1
INDEX_AT_ONCE = 2_000  # items: about 40 ms
MAX_BEHIND = 8_000  # items; above that a writer does it itself
ERASE_AT_ONCE = 500
_ERASE_EVERY_S: Final = 600.0
JOURNAL_PAGES = 8_192  # 64 MB: above that the writer waits for the rest of a checkpoint


class _Store(Protocol):
    items: Items

    def reading(self) -> contextlib.AbstractContextManager[sqlite3.Connection]: ...
    def transaction(self) -> contextlib.AbstractContextManager[sqlite3.Connection]: ...
    def writer(self) -> contextlib.AbstractContextManager[None]: ...
    def checkpoint(self) -> int: ...


class Upkeep:
    """A thread beside the writers of a store.

    Args:
        store: Whose.
        indexed: The greatest rid that the index of filters has.
    """

    def __init__(self, store: _Store, *, indexed: int) -> None:
        self._store = store
        self._indexed = indexed
        self._commits = 0
        self._is_stopping = False
        self._is_asked_to_erase = True
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="collections-upkeep", daemon=True)

    def start(self) -> None:
        """Begins, with what the last owner left."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the transaction that is going on."""
        self._is_stopping = True
        self._wake.set()
        self._thread.join()

    def erase_soon(self) -> None:
        """Something was dropped."""
        self._is_asked_to_erase = True
        self._wake.set()

    def before_commit(self) -> None:
        """Catches up where writers are faster than the thread; hold the writer."""
        if self._behind() > MAX_BEHIND:
            self._index_some()

    def after_commit(self) -> None:
        """Something was written; hold the writer."""
        self._commits += 1
        if self._behind() >= INDEX_AT_ONCE:
            self._wake.set()

    def _behind(self) -> int:
        return self._store.items.last_rid - self._indexed

    def _run(self) -> None:
        seen, is_done, erased_at = -1, False, -_ERASE_EVERY_S
        while not self._is_stopping:
            self._wake.wait(timeout=LOOK_EVERY_S)
            self._wake.clear()
            is_quiet = seen == self._commits
            seen = self._commits
            with self._told():
                if not is_quiet or not is_done:
                    is_done = self._catch_up(all_of_it=is_quiet)
                    self._checkpoint()
                if self._is_asked_to_erase or time.monotonic() - erased_at > _ERASE_EVERY_S:
                    self._is_asked_to_erase = False
                    erased_at = time.monotonic()
                    self._erase()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk, say: nothing is lost, and it is tried again."""
        try:
            yield
        except StorageError as error:
            if not self._is_stopping:
                logger.warning("the upkeep of the collections goes on later: %s", error)
        except Exception:  # a thread that ends would let the journal grow without bound
            logger.exception("the upkeep of the collections goes on later")

    def _catch_up(self, *, all_of_it: bool) -> bool:
        """Writes the index, and erases what was replaced; True where nothing is left."""
        while not self._is_stopping and (all_of_it or self._behind() >= INDEX_AT_ONCE):
            commits = self._commits
            if not self._paced(self._index_some):
                return commits == self._commits
        return False

    def _index_some(self) -> bool:
        """One step, most of it without keeping writers out; False where nothing is left."""
        with self._store.reading() as connection:
            behind = self._store.items.read_behind(connection, limit=INDEX_AT_ONCE)
        self._write(behind)
        return not behind.is_all

    def _write(self, behind: Behind) -> None:
        if behind.is_empty:
            return
        items = self._store.items
        with self._store.transaction() as connection:
            items.catch_up(connection, behind)
            indexed = items.indexed(connection)
        self._indexed = indexed

    def _checkpoint(self) -> None:
        if self._store.checkpoint() > JOURNAL_PAGES:
            # It begins anew only where a transaction finds all of it moved; so none may go on meanwhile.
            with self._store.writer():
                self._store.checkpoint()

    def _erase(self) -> None:
        while not self._is_stopping and self._paced(self._erase_some):
            pass

    def _erase_some(self) -> int:
        items = self._store.items
        with self._store.transaction() as connection:
            before = time.time() - GRACE_S
            return items.erase_deleted(connection, before=before, limit=ERASE_AT_ONCE) or items.erase_dropped(
                connection, limit=ERASE_AT_ONCE
            )

    def _paced(self, step: Callable[[], _Left]) -> _Left:
        """Does something, and leaves as much time to the others."""
        began = time.monotonic()
        left = step()
        if left and not self._is_stopping:
            time.sleep(min(0.05, time.monotonic() - began))
        return left
