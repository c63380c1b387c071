"""Files of rows, each row with an image: Parquet, and Arrow as Hugging Face's `save_to_disk` writes it.

Both come in groups of rows. Those of an Arrow file are mapped into memory and cost nothing until they are
looked at; one of a Parquet file is decoded as a whole, so the last ones are kept.

Dimension key: G groups of rows of a file
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from training.data.files import LocalFile, StoredFile
from training.data.images import UnreadableImage
from training.errors import DataError

_KEPT_BYTES = 256 * 2**20  # of decoded groups, over all Parquet files of a data set


class RowFile(Protocol):
    """One file of rows."""

    @property
    def file(self) -> StoredFile:
        """Where the rows are."""
        ...

    @property
    def schema(self) -> Any:  # noqa: ANN401  pyarrow ships no types
        """Pyarrow's schema of the columns, with its metadata."""
        ...

    @property
    def rows_G(self) -> Sequence[int]:
        """How many rows each group has."""
        ...

    def column(self, group: int, name: str) -> Any:  # noqa: ANN401
        """A column of a group as pyarrow's array. Called from several threads.

        Raises:
            UnreadableImage: The group is damaged.
            DataError: The file is gone, or is another one now.
        """
        ...


class GroupCache:
    """The groups of rows that were used last, within a bound of memory; several files share one."""

    def __init__(self, kept_bytes: int = _KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._reading: dict[tuple[str, int, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def column(self, file: "ParquetRows", group: int, name: str) -> Any:  # noqa: ANN401
        """A column of a group; of threads that want the same one, one decodes it."""
        key = (file.file.where, group, name)
        with self._lock:
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:
            with self._lock:
                if key in self._groups:
                    self._groups.move_to_end(key)
                    return self._groups[key]
            column = file.decoded(group, name)
            with self._lock:
                self._groups[key] = column
                self._reading.pop(key, None)
                while len(self._groups) > 1 and self._total_bytes() > self._kept_bytes:
                    self._groups.popitem(last=False)
            return column

    def _total_bytes(self) -> int:
        return sum(column.nbytes for column in self._groups.values())


class ParquetRows:
    """A Parquet file, here or at an address.

    Args:
        file: Of the rows.
        groups: Shared with the other files of the data set.

    Raises:
        DataError: It is no whole Parquet file.
    """

    def __init__(self, file: StoredFile, groups: GroupCache) -> None:
        self.file = file
        self._groups = groups
        try:
            with file.open() as opened, pq.ParquetFile(opened) as parquet:
                self._metadata = parquet.metadata
                self.schema = parquet.schema_arrow
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.where} is no whole Parquet file: fetch or write it anew") from error
        self.rows_G = [self._metadata.row_group(g).num_rows for g in range(self._metadata.num_row_groups)]

    def column(self, group: int, name: str) -> Any:  # noqa: ANN401
        """A column of a group; see `RowFile.column`."""
        return self._groups.column(self, group, name)

    def decoded(self, group: int, name: str) -> Any:  # noqa: ANN401
        """A column of a group, read from the file."""
        try:
            with (
                self.file.open() as opened,
                pq.ParquetFile(opened, metadata=self._metadata, pre_buffer=False) as parquet,
            ):
                return parquet.read_row_group(group, columns=[name], use_threads=False).column(name)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableImage(f"rows of group {group} of {self.file.where} are damaged") from error


class ArrowRows:
    """An Arrow file in the form of a stream, mapped into memory.

    Raises:
        DataError: It is no whole Arrow file.
    """

    def __init__(self, file: LocalFile) -> None:
        self.file = file
        try:
            reader = pa.ipc.open_stream(pa.memory_map(str(file.path)))
            self.schema = reader.schema
            self._batches = list(reader)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.where} is no whole Arrow file: save the data set anew") from error
        self.rows_G = [batch.num_rows for batch in self._batches]

    def column(self, group: int, name: str) -> Any:  # noqa: ANN401
        """A column of a group; see `RowFile.column`."""
        self.file.open().close()  # a mapped file that shrank would end the process at the next look
        return self._batches[group].column(name)
