"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from app.errors import StorageError
from app.search.embedded.directory import sync_directory


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes its name when the block ends, all of it on disk; if the block raises, never.

    Args:
        path: Of a file that may be there, and stays as it was until the end.

    Raises:
        StorageError: It can't be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror or type(error).__name__}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
