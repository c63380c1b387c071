"""Collections to Parquet files, which pandas, DuckDB and polars read with no code of ours.

One row an item, in order of id:

    id         string
    vector     fixed_size_list<float>[D], of length 1
    metadata   string: a JSON object
    sha256     string, of the picture's bytes; null where no picture was given
    source     string; null where there is none
    thumbnail  binary: a WebP; null where there is none. The column may be missing as a whole

The file's own metadata has, under the key `dinoserve`, a JSON object: `format`, `fingerprint`, `dimensions`,
`metric`, `collection`, `created_at`. `app.search.parquet_import` reads it all back.

Needs memory for some thousand items, however many there are.

Dimension key: N items · D embedding
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.search.collection import Collection, Item
from app.search.whole_file import whole_file

FORMAT_VERSION: Final = 1
METADATA_KEY: Final = b"dinoserve"
MEDIA_TYPE: Final = "application/vnd.apache.parquet"

_PAGE_ITEMS = 256  # of 256 kB at most, as thumbnails may have: 64 MB
# A group of rows is what readers skip or read as a whole: 4,096 vectors of 384 dimensions have 6 MB.
_GROUP_ITEMS = 4_096
_GROUP_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20


def export_collection(collection: Collection, to: Path | BinaryIO, *, thumbnails: bool = True) -> int:
    """Writes all items of a collection, while others read and write it.

    Each item is whole, as it was when its page was read; for one moment in time take a snapshot.

    Args:
        collection: Of any engine.
        to: A path, which has the whole file or stays as it was; or an open file.
        thumbnails: Whether there is a column of them.

    Returns:
        How many items were written.

    Raises:
        UnknownCollection: It was dropped.
        StorageError: The file can't be written.
    """
    export = Export(collection, thumbnails=thumbnails)
    if not isinstance(to, Path):
        for chunk in export:
            to.write(chunk)
        return export.items
    with whole_file(to) as file:
        for chunk in export:
            file.write(chunk)
    return export.items


class Export:
    """A collection as the chunks of a Parquet file, each made when it is asked for.

    So whoever sends them waits for the slowest reader without holding a thread. An iterator, for one caller
    at a time; not for two.

    Attributes:
        items: How many are in the chunks so far.
    """

    def __init__(self, collection: Collection, *, thumbnails: bool = True) -> None:
        self.items = 0
        self._collection = collection
        self._thumbnails = thumbnails
        self._chunks = self._run()

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def next_chunk(self) -> bytes | None:
        """At most a megabyte; None after the last.

        Raises:
            UnknownCollection: The collection was dropped.
            StorageError: It can't be read.
        """
        return next(self._chunks, None)

    def _run(self) -> Iterator[bytes]:
        sink = _Sink()
        schema = _schema(self._collection, thumbnails=self._thumbnails)
        with pq.ParquetWriter(sink, schema, **_writing(schema)) as writer:
            for group in self._groups():
                writer.write_table(_table(group, schema), row_group_size=len(group))
                self.items += len(group)
                yield from sink.taken()
        yield from sink.taken()

    def _groups(self) -> Iterator[list[Item]]:
        group: list[Item] = []
        size_bytes = 0
        for item in self._items():
            group.append(item)
            size_bytes += item.vector.nbytes + len(item.thumbnail or b"")
            if len(group) == _GROUP_ITEMS or size_bytes >= _GROUP_BYTES:
                yield group
                group, size_bytes = [], 0
        if group:
            yield group

    def _items(self) -> Iterator[Item]:
        cursor: str | None = None
        while True:
            page = self._collection.scroll(cursor=cursor, limit=_PAGE_ITEMS)
            for item in page.items:
                yield with_thumbnail(item, self._collection) if self._thumbnails else item
            cursor = page.next_cursor
            if cursor is None:
                return


def with_thumbnail(item: Item, collection: Collection) -> Item:
    """An item that was read, with the thumbnail that pages leave out."""
    return replace(item, thumbnail=collection.thumbnail(item.id))


class _Sink:
    """The writer's file: it keeps what was written until it is taken."""

    closed = False

    def __init__(self) -> None:
        self._written: list[bytes] = []
        self._position = 0

    def write(self, data: bytes) -> int:
        self._written.append(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """There is nothing to close."""

    def taken(self) -> Iterator[bytes]:
        """What was written since the last time, in chunks."""
        joined = memoryview(b"".join(self._written))
        self._written.clear()
        for start in range(0, len(joined), _CHUNK_BYTES):
            yield bytes(joined[start : start + _CHUNK_BYTES])


def _schema(collection: Collection, *, thumbnails: bool) -> pa.Schema:
    said = {
        "format": FORMAT_VERSION,
        "fingerprint": collection.fingerprint,
        "dimensions": collection.dimensions,
        "metric": "cosine",
        "collection": collection.name,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    number = pa.field("element", pa.float32(), nullable=False)
    columns = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("vector", pa.list_(number, collection.dimensions), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("source", pa.string()),
    ]
    columns += [pa.field("thumbnail", pa.binary())] if thumbnails else []
    return pa.schema(columns, metadata={METADATA_KEY: json.dumps(said).encode()})


def _writing(schema: pa.Schema) -> dict[str, object]:
    """Texts shrink; vectors are noise and pictures are compressed, so neither would."""
    noise = {"vector", "thumbnail"}
    return {
        "compression": {name: "NONE" if name in noise else "ZSTD" for name in schema.names},
        "use_dictionary": False,
        "write_statistics": ["id"],
        "write_page_checksum": True,
    }


def _table(items: list[Item], schema: pa.Schema) -> pa.Table:
    vectors_ND = np.stack([item.vector for item in items]).astype("<f4", copy=False)
    columns = {
        "id": pa.array([item.id for item in items], pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(
            pa.array(vectors_ND.reshape(-1)), type=schema.field("vector").type
        ),
        "metadata": pa.array(
            [json.dumps(item.metadata, ensure_ascii=False, sort_keys=True) for item in items], pa.string()
        ),
        "sha256": pa.array([item.sha256 or None for item in items], pa.string()),
        "source": pa.array([item.source for item in items], pa.string()),
        "thumbnail": pa.array([item.thumbnail for item in items], pa.binary()),
    }
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
