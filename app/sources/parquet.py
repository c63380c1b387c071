"""Pictures in a Parquet file, as Hugging Face writes them, or named by it.

    image       binary, or a struct of `bytes` and `path`; or, in its place,
    path        below the Parquet file's own folder, or absolute
    id          the item's; without it, the file's name and the row
    metadata    JSON text, or a struct
    and others  each is metadata under its own name

Rows are read some at a time, however large the groups are that they were written in.
"""

import math
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from app.client.items import Failure
from app.search.collection import Json
from app.sources.listing import listed_entry, row_metadata
from app.sources.picture import Entry, FailedPicture, NoPictures, Picture, clean, id_of, unreadable

_EXPORT_KEY: Final = b"dinoserve"  # in the metadata of files that `index export` writes
_ROWS_AT_ONCE: Final = 32  # pictures of 1 MB: 32 MB
_READ_BYTES: Final = 2**20


class ParquetSource:
    """The pictures of a Parquet file, in its order.

    Args:
        path: Of the file.

    Raises:
        NoPictures: It is no whole Parquet file, has no pictures, or is an export of a collection.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = clean(str(path))
        try:
            with pq.ParquetFile(path) as file:
                self._rows = file.metadata.num_rows
                schema = file.schema_arrow
        except (pa.ArrowException, OSError):
            raise NoPictures(f"{self._name} is not a whole Parquet file: was it cut short?") from None
        self._holds_images = _check_columns(self._name, schema)
        self._columns = [field.name for field in schema if _is_told(field)]
        self._columns += ["image"] if self._holds_images else []

    @property
    def description(self) -> str:
        """What it is, for people."""
        return f"the Parquet file {self._name}"

    def count(self) -> int:
        """How many rows it has.

        Raises:
            NoPictures: None.
        """
        if not self._rows:
            raise NoPictures(f"{self._name} has no rows")
        return int(self._rows)

    def entries(self, *, max_image_bytes: int) -> Iterator[Entry]:
        """The pictures; see `Source.entries`."""
        del max_image_bytes  # a row is in memory before its size is known
        number = 0
        try:
            # Read in pieces, not a whole column of a group of rows, which may be all of the file.
            with pq.ParquetFile(self._path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=self._columns):
                    for row in batch.to_pylist():
                        yield self._entry(row, number)
                        number += 1
        except (pa.ArrowException, OSError) as error:
            title = f"the file is damaged: the rows before {number} were read, and none after it"
            failure = unreadable(error) if isinstance(error, PermissionError) else None
            yield FailedPicture("", self._name, failure or Failure(code="damaged_parquet", title=title))

    def _entry(self, row: dict[str, Any], number: int) -> Entry:
        where = f"{self._name}, row {number}"
        image = row.pop("image", None) if self._holds_images else None
        told = {name: _json(value) for name, value in row.items()}
        told = {name: value for name, value in told.items() if value is not None}
        if isinstance(image, Mapping):
            named, image = image.get("path"), image.get("bytes")
            if named:
                told.setdefault("path", str(named))
        if image is None:
            if "path" in told:
                return listed_entry(told, beside=self._path, where=where)
            return FailedPicture("", where, Failure(code="empty_image", title="the row has no picture"))
        return self._embedded(cast(bytes, image), told, number, where)

    def _embedded(self, data: bytes, told: dict[str, Json], number: int, where: str) -> Entry:
        given = told.pop("id", None)
        item_id = id_of(f"{self._path.stem}/{number}" if given in (None, "") else str(given))
        try:
            path: dict[str, Json] = {"path": told["path"]} if "path" in told else {}
            metadata = path | row_metadata(told)
        except ValueError as error:
            return FailedPicture(item_id, where, Failure(code="invalid_metadata", title=f"the row's {error}"))
        return Picture(
            id=item_id,
            where=where,
            source=f"{clean(str(self._path.absolute()))}#{number}",
            metadata=metadata,
            size_bytes=len(data),
            read=lambda: data,
            held_bytes=len(data),
        )


def is_parquet(path: Path) -> bool:
    """Whether a file begins as a Parquet file does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def _check_columns(name: str, schema: pa.Schema) -> bool:
    """Whether the pictures are in the file; otherwise it names them.

    Raises:
        NoPictures: Neither.
    """
    columns = {field.name: field.type for field in schema}
    if "vector" in columns and ("fingerprint" in columns or _EXPORT_KEY in (schema.metadata or {})):
        raise NoPictures(
            f"{name} is an export of a collection, with vectors: use `dino-serve index import {name}`"
        )
    image = columns.get("image")
    if image is not None and _holds_images(image):
        return True
    if "path" in columns and _is_text(columns["path"]):
        return False
    listed = ", ".join(f"{column} ({kind})" for column, kind in list(columns.items())[:8])
    raise NoPictures(
        f"{name} has neither a column `image` (binary, or a struct of bytes and path) nor a column `path` "
        f"(text); its columns are {listed or 'none'}"
    )


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_told(field: pa.Field) -> bool:
    """Whether a column can be metadata: not other bytes, nor what holds them."""
    return "binary" not in str(field.type)


def _json(value: object) -> Json:
    match value:
        case None | bool() | int() | str():
            return value
        case float() | Decimal() | timedelta():
            return _number(value)
        case datetime() | date() | time():
            return value.isoformat()
        case Mapping():
            return {str(name): _json(member) for name, member in value.items()}
        case list() | tuple():
            return [_json(member) for member in value]
        case _:
            return str(value)


def _number(value: float | Decimal | timedelta) -> Json:
    """NaN is how tables of numbers say that there is none."""
    number = value.total_seconds() if isinstance(value, timedelta) else float(value)
    return number if math.isfinite(number) else None
