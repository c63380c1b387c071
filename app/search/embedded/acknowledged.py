"""The last write that was acknowledged, in a small file beside the database.

SQLite takes a journal that was cut, or removed, for one that ends there, and opens what was before. This file
tells: it says which commit of which collection came last, and is there only between opening and closing. It
isn't waited for, so after a power cut it may be behind the database, but never ahead of it.
"""

import contextlib
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

FILE_NAME: Final = "acknowledged"
_BYTES: Final = 48


class Acknowledged:
    """The file of an open directory.

    Args:
        directory: Locked by this process.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._descriptor = -1

    def read(self) -> tuple[int, int] | None:
        """A collection's cid and the number of its last commit; None where no file says."""
        try:
            words = self._path.read_bytes().split()
        except FileNotFoundError:
            return None
        # Half a line is no line; a cut-off file says nothing.
        return (int(words[0]), int(words[1])) if len(words) == 2 and all(map(bytes.isdigit, words)) else None

    def note(self, cid: int, seq: int) -> None:
        """Says that a commit is on disk; before anybody else is told.

        It never raises, since what it speaks of has happened: a note that can't be written is a check less.
        """
        try:
            if self._descriptor < 0:
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.pwrite(self._descriptor, f"{cid} {seq}".ljust(_BYTES).encode(), 0)
        except OSError as error:
            logger.warning("%s can't be written: %s", self._path, error.strerror)

    def forget(self, cids: Collection[int]) -> None:
        """Says nothing of collections that are dropped."""
        said = self.read()
        if said is not None and said[0] in cids:
            self.clear()

    def clear(self) -> None:
        """Says nothing any more."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
