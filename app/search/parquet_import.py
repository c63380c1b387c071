"""Parquet files to collections. The form is that of `app.search.parquet`; nothing in a file is believed.

The whole file is checked before the first item is written: a file that is refused has changed nothing. Then
it is written in batches, each durable by itself; a file that is sent again finds its items `unchanged`.

Dimension key: N items · D embedding
"""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import (
    FingerprintMismatch,
    InvalidImport,
    InvalidItem,
    InvalidVector,
    NotReady,
    UnknownCollection,
)
from app.search.collection import Catalogue, Collection, Item, Json, Vector
from app.search.parquet import FORMAT_VERSION, METADATA_KEY
from app.search.rows import check_items

_BATCH_ITEMS = 256
_REQUIRED: Final = ("id", "vector", "metadata", "sha256", "source")
_OPTIONAL: Final = ("thumbnail",)
# What a file may claim. Ours have 4,096 rows and some 60 MB in a group; others' have up to a million rows.
_MAX_GROUP_ROWS = 2**20
_MAX_GROUP_BYTES = 2 * 2**30
_MAX_EXPANSION = 256  # vectors are noise, and hardly shrink: more than that is a bomb
_MAX_FOOTER_BYTES = 64 * 2**20
_BUFFER_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What became of a file.

    Attributes:
        collection: Its name.
        created: Whether it was made.
    """

    collection: str
    created: bool
    added: int
    updated: int
    unchanged: int


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What a file says of itself."""

    fingerprint: str
    dimensions: int


def import_collection(
    catalogue: Catalogue, name: str, file: Path | BinaryIO, *, stop: threading.Event | None = None
) -> Imported:
    """Adds what a file has to a collection, which is made if it isn't there.

    Items that the collection has beside those of the file stay; of two rows with the same id the later stays.

    Args:
        catalogue: Of any engine.
        name: Of a collection or an alias.
        file: A path, or an open file that can be sought.
        stop: Once it is set, the import ends between two batches.

    Raises:
        FingerprintMismatch: The vectors are of another model than the collection's.
        InvalidImport: It isn't such a file, is damaged, or claims to be too large.
        InvalidVector: A vector is not [D], not finite, or zero; the message has the row. So InvalidItem.
        InvalidCollection: There is no such collection, and none can have the name.
        NotReady: It was stopped; what was written stays, and is `unchanged` the next time.
        StorageError: It could not be written.
    """
    with _opened(file) as parquet:
        said = _read_said(parquet)
        existing = _existing(catalogue, name, said)
        for first_row, items in _batches(parquet, said, stop):
            _check(items, first_row=first_row, dimensions=said.dimensions)
        collection = existing or catalogue.create(
            name, fingerprint=said.fingerprint, dimensions=said.dimensions
        )
        counts: Counter[str] = Counter()
        for _, items in _batches(parquet, said, stop):
            counts.update(collection.upsert(items, fingerprint=said.fingerprint))
    return Imported(
        collection=collection.name,
        created=existing is None,
        added=counts["added"],
        updated=counts["updated"],
        unchanged=counts["unchanged"],
    )


@contextlib.contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[pq.ParquetFile]:
    with contextlib.ExitStack() as stack:
        if isinstance(file, Path):
            try:
                file = stack.enter_context(file.open("rb"))
            except OSError as error:
                raise InvalidImport(f"{file} can't be opened: {error.strerror}") from None
        size_bytes = file.seek(0, 2)
        with _damage():
            parquet = pq.ParquetFile(
                file,
                buffer_size=_BUFFER_BYTES,  # or a group of rows would be read as a whole
                pre_buffer=False,
                thrift_string_size_limit=_MAX_FOOTER_BYTES,
                thrift_container_size_limit=2**20,
                page_checksum_verification=True,
            )
        _refuse_claims(parquet.metadata, size_bytes)
        yield parquet


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns what Arrow says of damaged files into our error. Its own text may have paths and code in it."""
    try:
        yield
    except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        raise InvalidImport(
            "the file is not a whole Parquet file: it is cut short, damaged, or of another kind; export it "
            "again"
        ) from error


def _refuse_claims(metadata: pq.FileMetaData, size_bytes: int) -> None:
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if not (0 <= group.num_rows <= _MAX_GROUP_ROWS and 0 <= group.total_byte_size <= _MAX_GROUP_BYTES):
            raise InvalidImport(
                f"the row group {index} claims {group.num_rows:,} rows in {group.total_byte_size:,} bytes; "
                f"at most {_MAX_GROUP_ROWS:,} rows and {_MAX_GROUP_BYTES:,} bytes are read: write smaller "
                "groups"
            )
    claimed = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    if claimed > _MAX_EXPANSION * size_bytes or metadata.num_rows > _MAX_EXPANSION * size_bytes:
        raise InvalidImport(
            f"the file has {size_bytes:,} bytes, and claims {metadata.num_rows:,} rows and {claimed:,} bytes "
            "when expanded: no embeddings shrink like that"
        )


def _read_said(parquet: pq.ParquetFile) -> _Said:
    schema = parquet.schema_arrow
    said = _said_metadata(schema.metadata or {})
    version, fingerprint, dimensions = (said.get(key) for key in ("format", "fingerprint", "dimensions"))
    if version != FORMAT_VERSION:
        raise InvalidImport(
            f"the file's format is {version!r}, and this dinoserve reads {FORMAT_VERSION}: upgrade dinoserve"
        )
    if not isinstance(fingerprint, str) or not fingerprint:
        raise InvalidImport(f"the file's fingerprint is {fingerprint!r}; it is the text that names a model")
    if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1:
        raise InvalidImport(f"the file's dimensions are {dimensions!r}; they are a number above 0")
    _check_columns(schema, dimensions)
    return _Said(fingerprint=fingerprint, dimensions=dimensions)


def _said_metadata(metadata: dict[bytes, bytes]) -> dict[str, object]:
    try:
        said = json.loads(metadata[METADATA_KEY])
    except KeyError:
        raise InvalidImport(
            "the file doesn't say which model its vectors are of (there is no `dinoserve` in its metadata): "
            "take one that `dino-serve index export` wrote, or keep its metadata when you write it anew"
        ) from None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise InvalidImport("the file's metadata `dinoserve` is not a JSON object")
    return said


def _check_columns(schema: pa.Schema, dimensions: int) -> None:
    found = list(schema.names)
    missing = [name for name in _REQUIRED if name not in found]
    unknown = [name for name in found if name not in _REQUIRED + _OPTIONAL]
    if missing or unknown or len(set(found)) < len(found):
        raise InvalidImport(
            f"the file has the columns {_listed(found)}; expected are {_listed(_REQUIRED)} and perhaps "
            f"{_listed(_OPTIONAL)}. What else is known of an item belongs into its metadata"
        )
    for name in found:
        kind = schema.field(name).type
        expected, fits = _expected(name, kind, dimensions)
        if not fits:
            raise InvalidImport(f"the column `{name}` is of {str(kind)[:100]}; expected is {expected}")


def _expected(name: str, kind: pa.DataType, dimensions: int) -> tuple[str, bool]:
    match name:
        case "vector":
            of_length = pa.types.is_fixed_size_list(kind) and kind.list_size == dimensions
            # Readers that know no lists of one length write plain ones; their lengths are checked row by row.
            plain = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            fits = (of_length or plain) and pa.types.is_float32(kind.value_type)
            return f"fixed_size_list<float>[{dimensions}]", fits
        case "thumbnail":
            return "binary", pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        case _:
            return "string", pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(f"`{name[:64]}`" for name in names[:12])
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _existing(catalogue: Catalogue, name: str, said: _Said) -> Collection | None:
    try:
        collection = catalogue.get(name)
    except UnknownCollection:
        return None
    if collection.fingerprint != said.fingerprint:
        raise FingerprintMismatch(
            f"the collection {collection.name!r} holds vectors of the model {collection.fingerprint}; those "
            f"of the file are of {said.fingerprint}. Import it into another collection",
            expected=collection.fingerprint,
            found=said.fingerprint,
        )
    if collection.dimensions != said.dimensions:
        raise InvalidImport(
            f"the file's vectors have {said.dimensions} dimensions; those of the collection "
            f"{collection.name!r} have {collection.dimensions}"
        )
    return collection


def _batches(
    parquet: pq.ParquetFile, said: _Said, stop: threading.Event | None
) -> Iterator[tuple[int, list[Item]]]:
    """The items, some at a time, and which row the first of them is in."""
    with _damage():
        batches = parquet.iter_batches(batch_size=_BATCH_ITEMS, use_threads=False)
    row = 0
    while True:
        if stop is not None and stop.is_set():
            raise NotReady("the import was stopped before its end: send the file again, it goes on")
        with _damage():
            batch = next(batches, None)
            if batch is None:
                break
            batch.validate(full=True)  # texts are UTF-8, and lengths are true
        yield row, _items(batch, said, first_row=row)
        row += batch.num_rows
    if row != parquet.metadata.num_rows:
        raise InvalidImport(
            f"the file claims {parquet.metadata.num_rows:,} rows and has {row:,}: it is damaged; export it "
            "again"
        )


def _items(batch: pa.RecordBatch, said: _Said, *, first_row: int) -> list[Item]:
    vectors_ND = _vectors(batch.column("vector"), said.dimensions, first_row=first_row)
    ids, metadata, hashes, sources = (
        batch.column(name).to_pylist() for name in ("id", "metadata", "sha256", "source")
    )
    has_thumbnails = "thumbnail" in batch.schema.names
    thumbnails = batch.column("thumbnail").to_pylist() if has_thumbnails else [None] * batch.num_rows
    items = []
    for index, item_id in enumerate(ids):
        if item_id is None:
            raise InvalidImport(f"row {first_row + index} has no id")
        items.append(
            Item(
                id=item_id,
                vector=vectors_ND[index],
                metadata=_metadata(metadata[index], row=first_row + index),
                sha256=hashes[index] or "",
                source=sources[index],
                thumbnail=thumbnails[index],
            )
        )
    return items


def _vectors(column: pa.Array, dimensions: int, *, first_row: int) -> Vector:
    """float32 [N, D]."""
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise InvalidVector(f"row {row} has no vector")
    if not pa.types.is_fixed_size_list(column.type):
        lengths = np.diff(column.offsets.to_numpy())
        if (wrong := np.flatnonzero(lengths != dimensions)).size:
            raise InvalidVector(
                f"the vector of row {first_row + int(wrong[0])} has {int(lengths[wrong[0]])} dimensions; the "
                f"file's have {dimensions}"
            )
    numbers = column.flatten()
    if numbers.null_count:
        raise InvalidVector(f"a vector of rows {first_row} to {first_row + len(column) - 1} has a null in it")
    return cast(Vector, numbers.to_numpy(zero_copy_only=False).reshape(len(column), dimensions))


def _metadata(text: str | None, *, row: int) -> dict[str, Json]:
    try:
        metadata = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidImport(f"the metadata of row {row} is not JSON") from None
    return cast("dict[str, Json]", metadata)  # what is no object is refused with the other items' faults


def _check(items: list[Item], *, first_row: int, dimensions: int) -> None:
    try:
        check_items(items, dimensions=dimensions)
    except (InvalidItem, InvalidVector):
        for index, item in enumerate(items):
            try:
                check_items([item], dimensions=dimensions)
            except (InvalidItem, InvalidVector) as error:
                raise type(error)(error.title.replace("item 0", f"row {first_row + index}", 1)) from None
        raise
