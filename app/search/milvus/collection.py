"""A collection on a Milvus server.

What a server can't promise as the engine inside the process does, with several services on one server:

- a batch of more than 16 MB is written in several requests, and each of them is all or nothing;
- two services that write one item at the same moment both succeed, and the later one stays;
- `seq` counts the writes that have ended: another service's that is under way may be missed.

Dimension key: Q queries · N items · D embedding
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from app.errors import InvalidItem, InvalidQuery, UnknownCollection
from app.search.bounds import Bounds, check_window
from app.search.collection import (
    GRACE_S,
    CollectionStats,
    Explanation,
    Item,
    Json,
    Neighbour,
    Page,
    UpsertStatus,
    Vector,
)
from app.search.filters import parse_filter
from app.search.milvus.filters import quoted, to_expression
from app.search.milvus.rows import (
    COMPARED_FIELDS,
    EVERY_FIELD,
    ITEM_FIELDS,
    item_of,
    metadata_of,
    plan,
    thumbnail_of,
    vector_of,
)
from app.search.milvus.search import Hit, Wanted, compare_all, nearest
from app.search.milvus.server import Missing
from app.search.milvus.table import IDS_AT_ONCE, LIVE, Row, Table, chunks
from app.search.rows import check_id, check_items, unit_vectors
from app.search.rules import check_limit, cursor_of_id, id_of_cursor, refuse_other_model


class MilvusCollection:
    """A collection of `MilvusCollections`; see `app.search.collection.Collection` for what calls promise."""

    def __init__(self, name: str, table: Table) -> None:
        self._name = name
        self._table = table

    @property
    def name(self) -> str:
        """Unique in its catalogue, but for a successor, whose name is its predecessor's."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors these are."""
        return self._table.generation.fingerprint

    @property
    def dimensions(self) -> int:
        """D of every vector."""
        return self._table.generation.dimensions

    @property
    def key(self) -> str:
        """What no other collection has, whatever it is called now or was called before."""
        return self._table.generation.server_name

    @property
    def seq(self) -> int:
        """The stamp of the last write of anybody, read from the server."""
        with self._unless_dropped():
            return self._table.last_stamp()

    @contextlib.contextmanager
    def _unless_dropped(self) -> Iterator[None]:
        try:
            yield
        except Missing:
            raise UnknownCollection(f"the collection {self._name!r} was deleted") from None

    # Writing

    def upsert(self, items: Sequence[Item], *, fingerprint: str) -> list[UpsertStatus]:
        """Adds or replaces items; see `Collection.upsert`."""
        refuse_other_model(self._name, expected=self.fingerprint, found=fingerprint)
        checked = check_items(items, dimensions=self.dimensions)
        compared = [*COMPARED_FIELDS, *(["vector"] if any(not item.sha256 for item in items) else [])]
        with self._unless_dropped(), self._table.claims.of(item.id for item in items):
            if not items:
                self._table.index()  # nothing to do, but for saying that it was dropped
                return []
            known = self._table.by_id((item.id for item in items), compared)
            statuses, rows = plan(checked, known)
            self._table.write(rows)
        return statuses

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, durably; see `Collection.delete`."""
        with self._unless_dropped():
            self._table.index()
            deleted = sum(self._delete(some, where=LIVE) for some in self._batches(ids))
            self._table.erase_what_nobody_can_undelete()
        return deleted

    def delete_where(self, filter: Mapping[str, Json]) -> int:
        """Deletes the items whose metadata match, durably; see `Collection.delete_where`."""
        where = _where(filter)
        deleted = 0
        with self._unless_dropped():
            for page in self._table.pages(where, [], rows_at_once=self._rows_at_once):
                deleted += self._delete([row["id"] for row in page], where=where)
            self._table.erase_what_nobody_can_undelete()
        return deleted

    def _delete(self, ids: Sequence[str], *, where: str) -> int:
        with self._table.claims.of(ids):
            rows = self._table.by_id(ids, EVERY_FIELD, where=where)
            self._table.write([row | {"deleted_ms": _now_ms()} for row in rows.values()])
        return len(rows)

    def undelete(self, ids: Sequence[str]) -> int:
        """Brings deleted items back, durably; see `Collection.undelete`."""
        brought_back = 0
        with self._unless_dropped():
            self._table.index()
            for some in self._batches(ids):
                with self._table.claims.of(some):
                    rows = self._table.by_id(some, EVERY_FIELD, where=_in_grace())
                    self._table.write([row | {"deleted_ms": 0} for row in rows.values()])
                brought_back += len(rows)
        return brought_back

    def _batches(self, ids: Sequence[str]) -> Iterator[Sequence[str]]:
        return chunks(_possible(ids), self._rows_at_once)

    @property
    def _rows_at_once(self) -> int:
        return self._table.rows_at_once(EVERY_FIELD, most=IDS_AT_ONCE)

    # Reading

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Reads items by id; see `Collection.get`."""
        with self._unless_dropped():
            rows = self._table.by_id(_possible(ids), ITEM_FIELDS)
        return [item_of(rows[item_id]) if item_id in rows else None for item_id in ids]

    def thumbnail(self, item_id: str) -> bytes | None:
        """The WebP that was given with an item; see `Collection.thumbnail`."""
        with self._unless_dropped():
            rows = self._table.by_id(_possible([item_id]), ["thumbnail", "has_thumbnail"])
        return thumbnail_of(rows[item_id]) if item_id in rows else None

    def scroll(self, *, cursor: str | None, limit: int, filter: Mapping[str, Json] | None = None) -> Page:
        """Lists items in order of id; see `Collection.scroll`."""
        check_limit(limit)
        where = _where(filter)
        if cursor is not None:
            where = f"id > {quoted(_behind(cursor))} and {where}"
        rows: list[Row] = []
        with self._unless_dropped():
            for page in self._table.pages(
                where, ITEM_FIELDS, rows_at_once=self._table.rows_at_once(ITEM_FIELDS, most=limit + 1)
            ):
                rows += page
                if len(rows) > limit:
                    break
        has_more = len(rows) > limit
        rows = rows[:limit]
        return Page(
            items=[item_of(row) for row in rows],
            next_cursor=cursor_of_id(rows[-1]["id"]) if has_more else None,
        )

    def search(  # noqa: PLR0913 - see the seam
        self,
        vectors_QD: npt.NDArray[np.floating],
        *,
        k: int,
        offset: int = 0,
        threshold: float | None = None,
        max_score: float | None = None,
        filter: Mapping[str, Json] | None = None,
        exclude_ids: Sequence[str] = (),
        exact: bool = False,
        with_vectors: bool = False,
    ) -> list[list[Neighbour]]:
        """Finds the nearest items of each query; see `Collection.search`."""
        check_window(k=k, offset=offset)
        bounds = Bounds.checked(threshold=threshold, max_score=max_score)
        where = _where(filter)
        queries_QD = unit_vectors(np.asarray(vectors_QD), dimensions=self.dimensions)
        if excluded := sorted(set(_possible(exclude_ids))):
            where = f"{where} and not (id in [{', '.join(map(quoted, excluded))}])"
        wanted = Wanted(count=offset + k, where=where, bounds=bounds)
        with self._unless_dropped():
            if exact and not self._table.is_exact:
                found = compare_all(self._table, queries_QD, wanted)
            else:
                found = nearest(self._table, queries_QD, wanted)
            pages = [hits[offset : offset + k] for hits in found]
            vectors = self._vectors(pages) if with_vectors else {}
        return [[_neighbour(hit, vectors.get(hit.row["id"])) for hit in page] for page in pages]

    def _vectors(self, pages: list[list[Hit]]) -> dict[str, Vector]:
        """The vectors of hits by id; those that the search didn't read are read now."""
        hits = [hit for page in pages for hit in page]
        read = self._table.by_id((hit.row["id"] for hit in hits if hit.vector is None), ["vector"])
        vectors = {item_id: vector_of(row) for item_id, row in read.items()}
        return vectors | {hit.row["id"]: hit.vector for hit in hits if hit.vector is not None}

    def explain(self, *, filter: Mapping[str, Json] | None = None, exact: bool = False) -> Explanation:
        """How `search` would go about it now; see `Collection.explain`."""
        matched = None if filter is None else self.count(filter)
        with self._unless_dropped():
            by_index = not exact or self._table.is_exact
            method = f"milvus:{self._table.index_type}" if by_index else "exact"
        return Explanation(method=method, items=self.count(), matched=matched)

    def count(self, filter: Mapping[str, Json] | None = None) -> int:
        """How many items there are, or match; see `Collection.count`."""
        where = _where(filter)
        with self._unless_dropped():
            return self._table.count(where)

    def stats(self) -> CollectionStats:
        """What keeping and searching it takes; see `Collection.stats`. Memory and disk are the server's."""
        items = self.count()
        with self._unless_dropped():
            index = self._table.index()
            is_exact = self._table.is_exact
            deleted = self._table.count(_in_grace())
        return CollectionStats(
            items=items,
            deleted=deleted,
            method=f"milvus:{index['index_type']}",
            indexed=min(items, int(index.get("indexed_rows", 0))),
            recall=1.0 if is_exact else None,
            memory_bytes=0,
            disk_bytes=None,
        )


def _where(filter: Mapping[str, Json] | None) -> str:
    return LIVE if filter is None else f"{LIVE} and {to_expression(parse_filter(filter))}"


def _behind(cursor: str) -> str:
    item_id = id_of_cursor(cursor)
    if not _is_possible(item_id):
        raise InvalidQuery("the cursor is not one that a page gave; begin again without one")
    return item_id


def _now_ms() -> int:
    return time.time_ns() // 10**6


def _in_grace() -> str:
    """Deleted, and may come back."""
    return f"deleted_ms > {_now_ms() - int(GRACE_S * 1000)}"


def _possible(ids: Sequence[str]) -> list[str]:
    """The ids that may be there."""
    return [item_id for item_id in ids if _is_possible(item_id)]


def _is_possible(item_id: str) -> bool:
    try:
        check_id(item_id, where="a question")
    except InvalidItem:
        return False
    return True


def _neighbour(hit: Hit, vector: Vector | None) -> Neighbour:
    return Neighbour(id=hit.row["id"], score=hit.score, metadata=metadata_of(hit.row), vector=vector)
