"""A collection to a Parquet file and back: equal bit for bit, read by others, and nothing hostile gets in."""

import io
import json
import random
import struct
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.errors import FingerprintMismatch, InvalidImport, InvalidItem, InvalidVector, NotReady, StorageError
from app.search.collection import Collection, Item
from app.search.embedded.library import Collections
from app.search.parquet import Export, export_collection
from app.search.parquet_import import import_collection

D = 5
SHA256 = "0123456789abcdef" * 4


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Collections]:
    with Collections.open(tmp_path / "data") as collections:
        yield collections


def items_of(count: int, *, dimensions: int = D) -> list[Item]:
    rng = np.random.default_rng(count)
    return [
        Item(
            id=f"a b/{number:05} ü\N{GRINNING FACE}",
            vector=rng.standard_normal(dimensions).astype(np.float32),
            metadata={"number": number, "tags": ["x", None, {"ü": 0.1}], "nested": {"a": [1, 2.5, True]}},
            sha256=SHA256 if number % 2 else "",
            source=f"/photos/{number}" if number % 3 else None,
            thumbnail=b"RIFF\x00WEBP" + bytes([number % 256]) * (number % 50) if number % 5 else None,
        )
        for number in range(count)
    ]


def filled(catalogue: Collections, name: str = "photos", *, count: int = 700) -> Collection:
    collection = catalogue.create(name, fingerprint="sha256:f", dimensions=D)
    collection.upsert(items_of(count), fingerprint="sha256:f")
    return collection


def contents(collection: Collection) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    cursor: str | None = None
    while True:
        page = collection.scroll(cursor=cursor, limit=1_000)
        for item in page.items:
            thumbnail = collection.thumbnail(item.id)
            found[item.id] = (item.vector.tobytes(), item.metadata, item.sha256, item.source, thumbnail)
        if (cursor := page.next_cursor) is None:
            return found


def exported(collection: Collection) -> bytes:
    file = io.BytesIO()
    export_collection(collection, file)
    return file.getvalue()


def rewritten(data: bytes, *, metadata: object = None, **columns: pa.Array | None) -> io.BytesIO:
    """An export with other columns, or something else in its metadata."""
    table = pq.read_table(io.BytesIO(data))
    said = table.schema.metadata
    for name, column in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        if column is not None:
            table = table.append_column(name, column)
    if metadata is not None:
        said = {b"dinoserve": metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()}
    file = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(said), file)
    return file


def test_what_was_exported_and_imported_is_equal_bit_for_bit(catalogue: Collections, tmp_path: Path) -> None:
    photos = filled(catalogue, count=5_000)
    assert export_collection(photos, tmp_path / "photos.parquet") == 5_000
    done = import_collection(catalogue, "copy", tmp_path / "photos.parquet")
    assert (done.collection, done.created, done.added) == ("copy", True, 5_000)
    copy = catalogue.get("copy")
    assert copy.fingerprint == "sha256:f"
    assert contents(copy) == contents(photos)
    again = import_collection(catalogue, "copy", tmp_path / "photos.parquet")
    assert (again.created, again.added, again.updated, again.unchanged) == (False, 0, 0, 5_000)


def test_pandas_reads_an_export_with_no_code_of_ours(catalogue: Collections, tmp_path: Path) -> None:
    photos = filled(catalogue, count=10)
    export_collection(photos, tmp_path / "photos.parquet")
    frame = pd.read_parquet(tmp_path / "photos.parquet").set_index("id")
    (item,) = photos.get(["a b/00007 ü\N{GRINNING FACE}"])
    assert item is not None
    row = frame.loc[item.id]
    assert row["vector"].tobytes() == item.vector.tobytes()
    assert json.loads(row["metadata"]) == item.metadata
    assert (row["sha256"], row["source"]) == (item.sha256, item.source)
    assert row["thumbnail"] == photos.thumbnail(item.id)
    assert frame["thumbnail"].isna().sum() == 2
    said = json.loads(pq.read_metadata(tmp_path / "photos.parquet").metadata[b"dinoserve"])
    assert said.pop("created_at").endswith("Z")
    assert said == {
        "format": 1,
        "fingerprint": "sha256:f",
        "dimensions": D,
        "metric": "cosine",
        "collection": "photos",
    }


def test_a_file_that_pandas_wrote_is_read_where_it_kept_the_metadata(catalogue: Collections) -> None:
    photos = filled(catalogue)
    table = pq.read_table(io.BytesIO(exported(photos)))
    frame = table.to_pandas().drop(columns="thumbnail")
    anew = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(table.schema.metadata)
    assert pa.types.is_list(anew.schema.field("vector").type)
    file = io.BytesIO()
    pq.write_table(anew, file)
    assert import_collection(catalogue, "copy", file).added == 700
    with_thumbnails, without = contents(photos), contents(catalogue.get("copy"))
    assert {key: value[:4] for key, value in without.items()} == {
        key: value[:4] for key, value in with_thumbnails.items()
    }


def test_an_empty_collection_is_exported_and_imported(catalogue: Collections) -> None:
    photos = catalogue.create("photos", fingerprint="sha256:f", dimensions=D)
    done = import_collection(catalogue, "copy", io.BytesIO(exported(photos)))
    assert (done.created, done.added) == (True, 0)
    assert catalogue.get("copy").dimensions == D


def test_an_import_adds_and_updates_and_leaves_the_rest(catalogue: Collections) -> None:
    photos = filled(catalogue, count=20)
    data = exported(photos)
    first, second, *_ = [item.id for item in photos.scroll(cursor=None, limit=2).items]
    photos.delete([first])
    other = Item(id="other", vector=np.ones(D, np.float32), metadata={})
    changed = Item(id=second, vector=np.ones(D, np.float32), metadata={"changed": True})
    photos.upsert([other, changed], fingerprint="sha256:f")
    done = import_collection(catalogue, "photos", io.BytesIO(data))
    assert (done.added, done.updated, done.unchanged) == (1, 1, 18)
    assert photos.count() == 21


def test_a_refused_path_has_no_file_and_an_old_file_stays(catalogue: Collections, tmp_path: Path) -> None:
    photos = filled(catalogue, count=3)
    with pytest.raises(StorageError, match="No such file"):
        export_collection(photos, tmp_path / "nowhere" / "photos.parquet")
    (tmp_path / "photos.parquet").write_bytes(b"old")
    catalogue.drop("photos")
    with pytest.raises(Exception, match="collection"):
        export_collection(photos, tmp_path / "photos.parquet")
    assert (tmp_path / "photos.parquet").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "photos.parquet"]


def test_an_export_needs_memory_for_some_items_and_not_for_all(catalogue: Collections) -> None:
    collection = catalogue.create("big", fingerprint="f", dimensions=8)
    rng = np.random.default_rng(0)
    for start in range(0, 6_000, 500):
        collection.upsert(
            [
                Item(
                    id=f"{start + n}",
                    vector=rng.random(8).astype(np.float32),
                    metadata={},
                    thumbnail=rng.bytes(20_000),
                )
                for n in range(500)
            ],
            fingerprint="f",
        )
    export = Export(collection)
    tracemalloc.start()
    size_bytes = sum(map(len, export))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size_bytes > 120e6
    assert peak_bytes < 80e6  # 16 MB of thumbnails as items, as a column, as the file's bytes, as chunks


def test_writing_goes_on_during_an_export(catalogue: Collections) -> None:
    photos = filled(catalogue, count=9_000)
    chunks = iter(Export(photos))
    data = [next(chunks)]
    everything = [item.id for item in items_of(9_000)]
    photos.delete(everything[-10:])
    photos.upsert([Item(id="z", vector=np.ones(D, np.float32), metadata={})], fingerprint="sha256:f")
    data += list(chunks)
    table = pq.read_table(io.BytesIO(b"".join(data)))
    assert table.column("id").to_pylist() == [*everything[:-10], "z"]


def metadata_with(**changes: object) -> dict[str, object]:
    return {"format": 1, "fingerprint": "sha256:f", "dimensions": D} | changes


def vectors_with(row: int, value: object, *, count: int = 300) -> pa.Array:
    rows: list[Any] = np.ones((count, D)).tolist()
    rows[row] = value
    return pa.array(rows, pa.list_(pa.float32()))


def texts_with(row: int, text: str | None, *, count: int = 300, usual: str = "x") -> pa.Array:
    return pa.array([text if number == row else usual for number in range(count)], pa.string())


IDS = pa.array([f"{number}" for number in range(300)])

BAD = [
    pytest.param({"metadata": {}}, InvalidImport, "format is None", id="no format"),
    pytest.param({"metadata": metadata_with(format=2)}, InvalidImport, "upgrade", id="newer format"),
    pytest.param({"metadata": b"[1"}, InvalidImport, "not a JSON object", id="metadata not JSON"),
    pytest.param({"metadata": b"[" * 100_000}, InvalidImport, "not a JSON object", id="metadata deep"),
    pytest.param(
        {"metadata": metadata_with(fingerprint=7)}, InvalidImport, "is 7", id="fingerprint a number"
    ),
    pytest.param(
        {"metadata": metadata_with(dimensions=True)}, InvalidImport, "is 7|True", id="dimensions a bool"
    ),
    pytest.param(
        {"metadata": metadata_with(dimensions=6)}, InvalidImport, r"<float>\[6\]|6 dimensions", id="said"
    ),
    pytest.param({"id": None}, InvalidImport, "expected are `id`, `vector`", id="no ids"),
    pytest.param({"extra": IDS}, InvalidImport, "`extra`", id="unknown column"),
    pytest.param(
        {"id": pa.array(range(300))}, InvalidImport, "`id` is of int64; expected is string", id="ids int"
    ),
    pytest.param({"id": texts_with(299, None)}, InvalidImport, "row 299 has no id", id="id missing"),
    pytest.param({"id": texts_with(280, "")}, InvalidItem, "id of row 280", id="id empty"),
    pytest.param({"id": texts_with(1, "a" * 257)}, InvalidItem, "257 bytes", id="id long"),
    pytest.param({"metadata_column": texts_with(290, "{", usual="{}")}, InvalidImport, "row 290", id="json"),
    pytest.param({"metadata_column": texts_with(9, "[]", usual="{}")}, InvalidItem, "row 9", id="no object"),
    pytest.param(
        {"metadata_column": texts_with(9, '{"a":NaN}', usual="{}")}, InvalidItem, "NaN", id="json NaN"
    ),
    pytest.param(
        {"metadata_column": texts_with(9, "[" * 90_000, usual="{}")}, InvalidImport, "row 9", id="deep json"
    ),
    pytest.param(
        {"metadata_column": texts_with(9, json.dumps({"a": "x" * 17_000}), usual="{}")},
        InvalidItem,
        "metadata of row 9",
        id="metadata large",
    ),
    pytest.param({"sha256": texts_with(2, "XYZ", usual="")}, InvalidItem, "sha256 of row 2", id="sha256"),
    pytest.param({"source": texts_with(2, "a\x00b")}, InvalidItem, "source of row 2", id="source with NUL"),
    pytest.param(
        {"thumbnail": pa.array([b""] * 300)}, InvalidItem, "thumbnail of row 0", id="thumbnail empty"
    ),
    pytest.param(
        {"thumbnail": pa.array([b"x" * 300_000, *[None] * 299])},
        InvalidItem,
        "thumbnail of row 0",
        id="thumbnail",
    ),
    pytest.param({"vector": IDS}, InvalidImport, "`vector` is of string", id="vectors text"),
    pytest.param(
        {"vector": pa.array(np.ones((300, D)).tolist())}, InvalidImport, "list<.*double>", id="vectors double"
    ),
    pytest.param(
        {"vector": pa.array(np.ones((300, 4)).tolist(), pa.list_(pa.float32(), 4))},
        InvalidImport,
        r"expected is fixed_size_list<float>\[5\]",
        id="vectors of another dimension",
    ),
    pytest.param({"vector": vectors_with(270, [1.0] * 4)}, InvalidVector, "row 270 has 4", id="vector short"),
    pytest.param(
        {"vector": vectors_with(270, None)}, InvalidVector, "row 270 has no vector", id="vector missing"
    ),
    pytest.param(
        {"vector": vectors_with(270, [0.0] * D)}, InvalidVector, "row 270 is zero", id="vector zero"
    ),
    pytest.param(
        {"vector": vectors_with(270, [float("nan")] * D)}, InvalidVector, "row 270 has NaN", id="vector NaN"
    ),
    pytest.param(
        {"vector": vectors_with(270, [1.0, None, 1, 1, 1])}, InvalidVector, "null", id="vector null"
    ),
]


@pytest.mark.parametrize(("changes", "kind", "says"), BAD)
def test_a_file_that_can_not_be_is_refused_and_nothing_is_changed(
    catalogue: Collections, changes: dict[str, Any], kind: type[Exception], says: str
) -> None:
    photos = filled(catalogue, count=300)
    data = exported(photos)
    if "metadata_column" in changes:
        file = rewritten(data)
        table = pq.read_table(file)
        said = table.schema.metadata
        table = table.drop_columns(["metadata"]).append_column("metadata", changes["metadata_column"])
        file = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(said), file)
    else:
        file = rewritten(data, **changes)
    before = contents(photos)
    for name in ("photos", "new"):
        with pytest.raises(kind, match=says):
            import_collection(catalogue, name, file)
    assert contents(photos) == before
    assert [info.name for info in catalogue.list()] == ["photos"]


def test_vectors_of_another_model_are_refused_with_both_fingerprints(catalogue: Collections) -> None:
    data = exported(filled(catalogue))
    other = catalogue.create("other", fingerprint="sha256:g", dimensions=D)
    with pytest.raises(FingerprintMismatch) as refused:
        import_collection(catalogue, "other", io.BytesIO(data))
    assert (refused.value.expected, refused.value.found) == ("sha256:g", "sha256:f")
    assert other.count() == 0


def test_the_same_model_with_other_dimensions_is_refused(catalogue: Collections) -> None:
    data = exported(filled(catalogue))
    catalogue.create("other", fingerprint="sha256:f", dimensions=7)
    with pytest.raises(InvalidImport, match="have 5 dimensions.*have 7"):
        import_collection(catalogue, "other", io.BytesIO(data))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"PAR1", id="magic alone"),
        pytest.param(b"PAR1" + struct.pack("<I", 2**31) + b"PAR1", id="footer longer than the file"),
        pytest.param(b"id,vector\n1,2\n" * 100, id="CSV"),
        pytest.param(b"PK\x03\x04" + bytes(1_000), id="zip"),
    ],
)
def test_what_is_not_parquet_is_refused(catalogue: Collections, data: bytes) -> None:
    with pytest.raises(InvalidImport, match="not a whole Parquet file"):
        import_collection(catalogue, "new", io.BytesIO(data))
    assert catalogue.list() == []


def test_a_file_that_is_not_there_is_said(catalogue: Collections, tmp_path: Path) -> None:
    with pytest.raises(InvalidImport, match="can't be opened: No such file"):
        import_collection(catalogue, "new", tmp_path / "nowhere.parquet")


def test_a_file_without_a_model_says_what_it_needs(catalogue: Collections) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"], "vector": [[1.0]]}), file)
    with pytest.raises(InvalidImport, match="which model"):
        import_collection(catalogue, "new", file)


def test_a_file_cut_short_anywhere_is_refused(catalogue: Collections) -> None:
    data = exported(filled(catalogue, count=300))
    rng = random.Random(0)
    for length in rng.sample(range(len(data)), 50):
        with pytest.raises(InvalidImport):
            import_collection(catalogue, "new", io.BytesIO(data[:length]))
    assert [info.name for info in catalogue.list()] == ["photos"]


def test_a_file_damaged_anywhere_is_refused_or_harmless(catalogue: Collections) -> None:
    photos = filled(catalogue, count=300)
    data = exported(photos)
    before = contents(photos)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        at = rng.randrange(len(data))
        damaged[at : at + rng.choice([1, 1, 4, 64])] = rng.randbytes(1)
        try:
            import_collection(catalogue, "copy", io.BytesIO(damaged))
        except (InvalidImport, InvalidVector, InvalidItem, FingerprintMismatch):
            refused += 1
            continue
        copy = contents(catalogue.get("copy"))
        catalogue.drop("copy")
        assert copy == before  # what isn't noticed must be without effect, say in the writer's name
    assert refused > 200


def claiming(data: bytes, *, rows: int | None = None, size_bytes: int | None = None) -> io.BytesIO:
    """A file whose footer claims something: its numbers are replaced by longer ones."""
    footer_bytes = struct.unpack("<I", data[-8:-4])[0]
    body, footer = data[: -8 - footer_bytes], data[-8 - footer_bytes : -8]
    metadata = pq.read_metadata(io.BytesIO(data))
    for old, new in ((metadata.num_rows, rows), (metadata.row_group(0).total_byte_size, size_bytes)):
        if new is not None:
            assert varint(old) in footer
            footer = footer.replace(varint(old), varint(new))
    return io.BytesIO(body + footer + struct.pack("<I", len(footer)) + b"PAR1")


def varint(number: int) -> bytes:
    """As Thrift's compact protocol writes an i64: zigzag, seven bits a byte."""
    number <<= 1
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)


@pytest.mark.parametrize(
    "claims",
    [
        pytest.param({"rows": 2**40}, id="rows"),
        pytest.param({"rows": 2**20}, id="more rows than there are"),
        pytest.param({"size_bytes": 2**50}, id="bytes"),
        pytest.param({"size_bytes": 2**30}, id="bytes that this file can't have"),
    ],
)
def test_a_file_that_claims_to_be_huge_is_refused_at_once(
    catalogue: Collections, claims: dict[str, int]
) -> None:
    data = exported(filled(catalogue, count=300))
    file = claiming(data, **claims)
    with pytest.raises(InvalidImport, match="claims|not a whole"):
        import_collection(catalogue, "new", file)


def test_a_bomb_is_refused_by_what_it_expands_to(catalogue: Collections) -> None:
    table = pa.table(
        {
            "id": pa.array(["same"] * 20_000).dictionary_encode().cast(pa.string()),
            "vector": pa.array([[1.0] * 8] * 20_000, pa.list_(pa.float32(), 8)),
            "metadata": ["{}"] * 20_000,
            "sha256": pa.nulls(20_000, pa.string()),
            "source": ["x" * 4_000] * 20_000,
        },
        metadata={b"dinoserve": json.dumps(metadata_with(dimensions=8)).encode()},
    )
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    assert len(file.getvalue()) < 1e6
    with pytest.raises(InvalidImport, match="claims"):
        import_collection(catalogue, "new", file)


def test_an_import_that_is_stopped_goes_on_the_next_time(catalogue: Collections) -> None:
    file = io.BytesIO(exported(filled(catalogue)))
    stop = threading.Event()
    stop.set()
    with pytest.raises(NotReady, match="send the file again"):
        import_collection(catalogue, "new", file, stop=stop)
    stop.clear()
    assert import_collection(catalogue, "new", file, stop=stop).added == 700
