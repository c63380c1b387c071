"""The items of one generation, as rows of a collection on a Milvus server.

A deleted row stays, with the time of its deletion, until nobody can undelete it any more. So a read always
asks for rows that are not deleted, and every write, of whatever kind, leaves rows with its stamp.

Dimension key: Q queries · D embedding
"""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from app.bounded_batches import bounded_batches
from app.errors import StorageError
from app.search.collection import GRACE_S, Vector
from app.search.milvus.claims import Claims
from app.search.milvus.filters import TERMS, quoted
from app.search.milvus.names import Generation
from app.search.milvus.server import MilvusServer, NotLoaded
from app.search.rows import MAX_ID_BYTES, MAX_METADATA_BYTES, MAX_SOURCE_BYTES

MAX_DIMENSIONS = 32_768  # Milvus's own
MAX_TEXT_BYTES = 65_535  # of any text that it keeps
WINDOW = 16_384  # rows of one answer
REQUEST_BYTES = 16 * 2**20  # servers take 64 MB; the others are for what we don't count
IDS_AT_ONCE = 1_000
LOAD_TIMEOUT_S = 60.0
LIVE = "deleted_ms == 0"
READ_YOUR_WRITES = "Strong"  # of all clients, not only of this one
_ERASE_EVERY_S = 3_600.0
_EXACT_INDEXES = {"FLAT", "BRUTE_FORCE", "GPU_BRUTE_FORCE"}

Row: TypeAlias = dict[str, Any]


class Table:
    """Rows of one generation; what is shared by all who hold it. Safe to use from many threads.

    Attributes:
        generation: Which.
        claims: Whose turn it is to write.
    """

    def __init__(self, server: MilvusServer, generation: Generation) -> None:
        """Nothing is asked of the server yet."""
        self._server = server
        self._name = generation.server_name
        self.generation = generation
        self.claims = Claims()
        self._is_ready = False
        self._writing = threading.Lock()
        self._seen_stamp = 0  # the greatest that was read
        self._last_stamp = 0  # the greatest that was given to a write of this process, or read; 0: not known
        self._erase_at = 0.0

    def create(self) -> None:
        """Makes it on the server, which begins to load it.

        Raises:
            StorageError: The server can't.
        """
        client, kind = self._server.pymilvus.MilvusClient, self._server.pymilvus.DataType
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", kind.VARCHAR, is_primary=True, max_length=MAX_ID_BYTES)
        schema.add_field("vector", kind.FLOAT_VECTOR, dim=self.generation.dimensions)
        schema.add_field(TERMS, kind.JSON)
        schema.add_field("sha256", kind.VARCHAR, max_length=64)
        schema.add_field("deleted_ms", kind.INT64)
        schema.add_field("stamp", kind.INT64)
        schema.add_field("has_thumbnail", kind.BOOL)
        # Read for few items at a time: newer servers leave them on the disk, old ones keep them in memory.
        schema.add_field("metadata", kind.VARCHAR, max_length=MAX_METADATA_BYTES, mmap_enabled=True)
        schema.add_field("source", kind.VARCHAR, max_length=MAX_SOURCE_BYTES + 1, mmap_enabled=True)
        schema.add_field("thumbnail", kind.VARCHAR, max_length=MAX_TEXT_BYTES, mmap_enabled=True)
        # One shard: then a batch is one message, and readers see all of it or nothing.
        self._server.call(
            "create_collection", self._name, schema=schema, num_shards=1, consistency_level=READ_YOUR_WRITES
        )
        index = client.prepare_index_params()
        index.add_index(
            "vector", index_type="HNSW", metric_type="COSINE", params={"M": 16, "efConstruction": 200}
        )
        self._server.call("create_index", self._name, index, sync=False)
        self._server.call("load_collection", self._name, _async=True)

    def drop(self) -> None:
        """Deletes it from the server."""
        self._server.call("drop_collection", self._name)

    # Reading

    def select(self, where: str, fields: Sequence[str], *, waits: bool = True) -> list[Row]:
        """Rows, in no order: all there are, or any `WINDOW` of them.

        Args:
            where: Which, as an expression.
            fields: Of them, beside the id.
            waits: Until everything is seen that was written before; what a read of this process has seen is
                nearly always seen without.
        """
        rows: list[Row] = self._read(
            "query",
            filter=where,
            output_fields=["id", *fields],
            limit=WINDOW,
            consistency_level=READ_YOUR_WRITES if waits else "Eventually",
        )
        return rows

    def pages(self, where: str, fields: Sequence[str], *, rows_at_once: int) -> Iterator[list[Row]]:
        """All rows in order of id, some at a time; a page may have fewer than asked for."""
        behind = ""
        while True:
            rows = self._read(
                "query",
                filter=f"id > {quoted(behind)} and {where}",
                output_fields=["id", *fields],
                limit=rows_at_once,
                consistency_level=READ_YOUR_WRITES,
                # Without these a server may answer with any rows, and not with the first.
                iterator="True",
                reduce_stop_for_best="True",
            )
            page = sorted(rows, key=lambda row: str(row["id"]))
            if not page:
                return
            yield page
            behind = page[-1]["id"]

    def by_id(
        self, ids: Iterable[str], fields: Sequence[str], *, where: str = LIVE, waits: bool = True
    ) -> dict[str, Row]:
        """The rows of these ids that are there, by id; see `select`."""
        found: dict[str, Row] = {}
        for some in chunks(sorted(set(ids)), self.rows_at_once(fields, most=IDS_AT_ONCE)):
            among = ", ".join(map(quoted, some))
            found |= {
                row["id"]: row for row in self.select(f"id in [{among}] and {where}", fields, waits=waits)
            }
        return found

    def count(self, where: str) -> int:
        """How many rows there are."""
        (row,) = self._read(
            "query",
            filter=where,
            output_fields=["count(*)"],
            consistency_level=READ_YOUR_WRITES,
        )
        return int(row["count(*)"])

    def nearest(
        self, queries_QD: Vector, where: str, fields: Sequence[str], *, limit: int
    ) -> list[list[tuple[float, Row]]]:
        """What the server's index finds: for each query rough scores and rows, best first."""
        answers = self._read(
            "search",
            data=list(queries_QD),
            anns_field="vector",
            filter=where,
            limit=limit,
            output_fields=list(fields),
            search_params={"metric_type": "COSINE", "params": _effort(self.index_type, limit=limit)},
            consistency_level=READ_YOUR_WRITES,
        )
        return [
            [(float(hit["distance"]), {"id": hit["id"], **hit["entity"]}) for hit in hits] for hits in answers
        ]

    def rows_at_once(self, fields: Sequence[str], *, most: int) -> int:
        """How many rows of these fields make an answer of a bearable size."""
        row_bytes = MAX_ID_BYTES + 64
        row_bytes += 4 * self.generation.dimensions * ("vector" in fields)
        row_bytes += MAX_METADATA_BYTES // 8 * ("metadata" in fields)
        row_bytes += MAX_TEXT_BYTES * ("thumbnail" in fields)
        return max(1, min(most, REQUEST_BYTES // row_bytes))

    @property
    def index_type(self) -> str:
        """Of the vectors, as the server says: HNSW, if nobody has made another."""
        return str(self.index()["index_type"])

    @property
    def is_exact(self) -> bool:
        """Whether the server compares all vectors."""
        return self.index_type in _EXACT_INDEXES

    def index(self) -> Row:
        """What the server says of the index of the vectors."""
        answer: Row = self._server.call("describe_index", self._name, "vector")
        return answer

    def _read(self, method: str, **named: Any) -> Any:  # noqa: ANN401 - as pymilvus answers
        """Reads once the collection is loaded, and loads it again where somebody has released it."""
        try:
            if not self._is_ready:
                self._wait_until_loaded()
            return self._server.call(method, self._name, **named)
        except NotLoaded:
            self._wait_until_loaded()
        try:
            return self._server.call(method, self._name, **named)
        except NotLoaded:
            raise self._not_loaded() from None

    def _wait_until_loaded(self) -> None:
        """The server begins to load a collection when it is made."""
        deadline = time.monotonic() + LOAD_TIMEOUT_S
        asked = False
        while (state := self._server.call("get_load_state", self._name)["state"].name) != "Loaded":
            if state == "NotExist":
                self.index()  # raises Missing
            if state == "NotLoad" and not asked:
                self._server.call("load_collection", self._name, _async=True)
                asked = True
            if time.monotonic() > deadline:
                raise self._not_loaded()
            time.sleep(0.02)
        self._is_ready = True

    def _not_loaded(self) -> StorageError:
        return StorageError(
            f"the Milvus server at {self._server.address} has not loaded a collection within "
            f"{LOAD_TIMEOUT_S:.0f} s; its log says why. Has it memory enough? Try again later"
        )

    # Writing

    def write(self, rows: Sequence[Row]) -> None:
        """Adds or replaces rows, with a stamp of their own; those of one request all or none.

        Raises:
            StorageError: The server can't. Of several requests the first may be written.
        """
        if not rows:
            return
        if self._last_stamp == 0:
            self.last_stamp()  # so that a clock that was set back gives no stamp that was there before
        # One after the other, so that no stamp arrives behind a later one and is missed by `last_stamp`.
        with self._writing:
            self._last_stamp = max(time.time_ns(), self._last_stamp + 1)
            for some in _requests(rows, dimensions=self.generation.dimensions):
                for row in some:
                    row["stamp"] = self._last_stamp
                self._server.call("upsert", self._name, some)

    def last_stamp(self) -> int:
        """Of the last write of anybody; 0 where nobody wrote."""
        seen = self._seen_stamp
        while True:
            # The greatest of any 16,384 leaves few above it, so this ends soon.
            newer = self.select(f"stamp > {seen}", ["stamp"])
            seen = max([seen, *(int(row["stamp"]) for row in newer)])
            if len(newer) < WINDOW:
                break
        with self._writing:
            self._seen_stamp = max(self._seen_stamp, seen)
            self._last_stamp = max(self._last_stamp, seen, 1)
        return seen

    def erase_what_nobody_can_undelete(self) -> None:
        """Deletes rows whose grace is over; once in a while, whoever asks."""
        now_s = time.time()
        if now_s < self._erase_at:
            return
        self._erase_at = now_s + _ERASE_EVERY_S
        over = f"deleted_ms > 0 and deleted_ms < {int((now_s - GRACE_S) * 1000)}"
        for page in self.pages(over, [], rows_at_once=IDS_AT_ONCE):
            ids = [row["id"] for row in page]
            with self.claims.of(ids):
                if still := self.by_id(ids, [], where=over):
                    self._server.call("delete", self._name, ids=list(still))


def _effort(index_type: str, *, limit: int) -> dict[str, int]:
    """How hard a kind of index shall search; of kinds that we don't know the server's default."""
    if index_type.startswith("HNSW"):
        return {"ef": max(512, 2 * limit)}
    if index_type.startswith(("IVF", "GPU_IVF", "SCANN")):
        return {"nprobe": 64}
    if index_type == "DISKANN":
        return {"search_list": max(200, 2 * limit)}
    return {}


def chunks(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Some at a time."""
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _requests(rows: Sequence[Row], *, dimensions: int) -> Iterator[list[Row]]:
    """The rows, some at a time, each time as many as a request may have."""

    def bytes_of(row: Row) -> int:
        lengths = sum(len(row[name]) for name in ("metadata", "source", "thumbnail"))
        return 4 * dimensions + 512 + lengths + 2 * len(row["metadata"])

    return bounded_batches(rows, bytes_of, most_bytes=REQUEST_BYTES)
