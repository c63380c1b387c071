"""A collection inside this process: SQLite is the truth, memory the search.

A write is prepared in memory, committed to disk, then published to searches with one assignment that can't
fail; so what was acknowledged is both kept and found, and what failed is neither.

Dimension key: Q queries · N items · D embedding
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from app.errors import UnknownCollection
from app.search.bounds import Bounds, check_window
from app.search.collection import (
    GRACE_S,
    CollectionInfo,
    CollectionStats,
    Explanation,
    Item,
    Json,
    Neighbour,
    Page,
    UpsertStatus,
    Vector,
)
from app.search.embedded import registry
from app.search.embedded.changes import Changes, changes
from app.search.embedded.filter_cache import FilterCache, living_rids
from app.search.embedded.filter_sql import Rids
from app.search.embedded.items import StoredItem
from app.search.embedded.listing import matching_after
from app.search.embedded.registry import CollectionRow
from app.search.embedded.scores import nearest_within, pages_of
from app.search.embedded.store import Store
from app.search.filters import Filter, is_storable_text, parse_filter
from app.search.memory.index import VectorIndex
from app.search.memory.snapshot import Snapshot
from app.search.rows import CheckedItems, check_items, unit_vectors
from app.search.rules import check_limit, cursor_of_id, id_of_cursor, refuse_other_model

_OPTIMISTIC_TRIES = 8
_TEXT_BYTES = 500  # of an item: id, metadata of a few fields, and their index
_NO_RIDS: Rids = np.empty(0, dtype=np.int64)


@dataclass
class _Commit:
    """A transaction, and the state that is searched after it; None where nothing changes."""

    connection: sqlite3.Connection
    prepared: Snapshot | None = None


class EmbeddedCollection:
    """A collection of `Collections`; see `app.search.collection.Collection` for what each call promises."""

    def __init__(self, row: CollectionRow, store: Store, *, name: str) -> None:
        self._name = name
        self._row = row
        self._store = store
        self._index = VectorIndex(row.dimensions)
        self._filters = FilterCache(row.cid, items=store.items, fields=store.fields)
        self._item_bytes = 4 * row.dimensions + _TEXT_BYTES
        store.weights[row.cid] = lambda: self._index.snapshot.alive_count * self._item_bytes

    @property
    def name(self) -> str:
        """Unique in its catalogue, but for a successor, whose name is its predecessor's."""
        return self._name

    def rename(self, name: str) -> None:
        """Says another name from now on; the disk has it already."""
        self._name = name

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors these are."""
        return self._row.fingerprint

    @property
    def dimensions(self) -> int:
        """D of every vector."""
        return self._row.dimensions

    @property
    def cid(self) -> int:
        """Its number in the store."""
        return self._row.cid

    @property
    def key(self) -> str:
        """What no other collection has, whatever directory it is from."""
        row = self._row
        return f"{row.cid} {row.fingerprint} {row.dimensions} {row.created_at!r}"

    @property
    def index(self) -> VectorIndex:
        """Its search in memory."""
        return self._index

    @property
    def seq(self) -> int:
        """Counts what was written to it."""
        return self._index.snapshot.seq

    @property
    def info(self) -> CollectionInfo:
        """What a listing says of it; aliases and successors are its catalogue's to tell."""
        row = self._row
        return CollectionInfo(
            name=self._name,
            fingerprint=row.fingerprint,
            dimensions=row.dimensions,
            items=self.count(),
            created_at=row.created_at,
        )

    def load(self, connection: sqlite3.Connection) -> None:
        """Reads all vectors from disk; call it once, before anybody writes.

        Raises:
            StorageError: Vectors are missing or damaged.
        """
        for rids, vectors_ND in self._store.items.vectors(connection, self._row, name=self._name):
            self._index.publish(self._prepared(self._row.seq, rids=rids, vectors_ND=vectors_ND))
        self._index.publish(self._prepared(self._row.seq))

    # Writing

    def upsert(self, items: Sequence[Item], *, fingerprint: str) -> list[UpsertStatus]:
        """Adds or replaces items, all or none; see `Collection.upsert`."""
        refuse_other_model(self.name, expected=self.fingerprint, found=fingerprint)
        checked = check_items(items, dimensions=self.dimensions)
        with self._committing() as commit:
            what = changes(commit.connection, self.cid, checked, items=self._store.items)
            if what.chosen:
                commit.prepared = self._write(commit.connection, checked, what)
            else:
                self._seq_on_disk(commit.connection)
        return what.statuses

    def _write(self, connection: sqlite3.Connection, checked: CheckedItems, what: Changes) -> Snapshot:
        seq = self._next_seq(connection)
        rids = self._store.items.reserve_rids(len(what.chosen))
        self._store.items.replace(
            connection,
            self.cid,
            seq=seq,
            new=what.new_items(checked, rids),
            old=what.replaced,
        )
        return self._prepared(
            seq,
            rids=np.array(rids, dtype=np.int64),
            vectors_ND=checked.vectors_ND[what.chosen],
            removed=np.array([row.rid for row in what.replaced if not row.deleted], dtype=np.int64),
        )

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, durably; see `Collection.delete`."""
        with self._committing() as commit:
            self._seq_on_disk(commit.connection)
            rids = self._store.items.rids(commit.connection, self.cid, _storable(ids))
            return self._delete(commit, rids)

    def delete_where(self, filter: Mapping[str, Json]) -> int:
        """Deletes the items whose metadata match, durably; see `Collection.delete_where`."""
        node = parse_filter(filter)
        with self._committing() as commit:
            self._seq_on_disk(commit.connection)
            snapshot = self._index.snapshot
            rids = living_rids(snapshot, self._filters.kept(commit.connection, snapshot, node))
            return self._delete(commit, rids.tolist())

    def _delete(self, commit: _Commit, rids: list[int]) -> int:
        if rids:
            seq = self._next_seq(commit.connection)
            self._store.items.mark_deleted(commit.connection, rids, seq=seq, deleted_at=time.time())
            commit.prepared = self._prepared(seq, removed=np.array(rids, dtype=np.int64))
        return len(rids)

    def undelete(self, ids: Sequence[str]) -> int:
        """Brings deleted items back, durably; see `Collection.undelete`."""
        since = time.time() - GRACE_S
        items = self._store.items
        with self._committing() as commit:
            self._seq_on_disk(commit.connection)
            rids = items.deleted_rids(commit.connection, self.cid, _storable(ids), since=since)
            if rids:
                seq = self._next_seq(commit.connection)
                fresh, vectors = items.undelete(commit.connection, rids, seq=seq)
                vectors_ND = np.frombuffer(b"".join(vectors), dtype="<f4").reshape(-1, self.dimensions)
                commit.prepared = self._prepared(
                    seq, rids=np.array(fresh, dtype=np.int64), vectors_ND=vectors_ND
                )
        return len(rids)

    @contextlib.contextmanager
    def _committing(self) -> Iterator[_Commit]:
        """A transaction; the state that it prepares is found by searches from its commit on, or never."""
        with self._store.writer():
            with self._store.writing() as connection:
                commit = _Commit(connection)
                yield commit
            if commit.prepared is not None:
                self._store.acknowledged.note(self.cid, commit.prepared.seq)
                self._index.publish(commit.prepared)

    def _prepared(
        self,
        seq: int,
        *,
        rids: Rids = _NO_RIDS,
        vectors_ND: Vector | None = None,
        removed: Rids = _NO_RIDS,
    ) -> Snapshot:
        if vectors_ND is None:
            vectors_ND = np.empty((0, self.dimensions), dtype=np.float32)
        return self._index.prepare(seq=seq, rids=rids, vectors_ND=vectors_ND, removed=removed)

    # Reading

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Reads items by id; see `Collection.get`."""
        with self._store.reading() as connection:
            self._seq_on_disk(connection)
            found = self._store.items.by_id(connection, self.cid, _storable(ids))
        return [None if item_id not in found else _item(found[item_id]) for item_id in ids]

    def thumbnail(self, item_id: str) -> bytes | None:
        """The WebP that was given with an item; see `Collection.thumbnail`."""
        with self._store.reading() as connection:
            self._seq_on_disk(connection)
            storable = _storable([item_id])
            return self._store.items.thumbnail(connection, self.cid, storable[0]) if storable else None

    def scroll(self, *, cursor: str | None, limit: int, filter: Mapping[str, Json] | None = None) -> Page:
        """Lists items in order of id; see `Collection.scroll`."""
        check_limit(limit)
        after = "" if cursor is None else id_of_cursor(cursor)
        node = None if filter is None else parse_filter(filter)
        with self._one_state() as (connection, snapshot):
            if node is None:
                rows = self._store.items.after(connection, self.cid, after, limit=limit + 1)
            else:
                kept = living_rids(snapshot, self._filters.kept(connection, snapshot, node))
                rows = matching_after(
                    connection,
                    self.cid,
                    after,
                    kept=kept,
                    everything=snapshot.alive_count,
                    limit=limit + 1,
                    items=self._store.items,
                )
        has_more = len(rows) > limit
        rows = rows[:limit]
        return Page(
            items=[_item(row) for row in rows], next_cursor=cursor_of_id(rows[-1].id) if has_more else None
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
        node = None if filter is None else parse_filter(filter)
        queries_QD = unit_vectors(np.asarray(vectors_QD), dimensions=self.dimensions)
        items = self._store.items
        with self._one_state() as (connection, snapshot):
            candidates = nearest_within(
                snapshot,
                queries_QD,
                k=offset + k,
                only=None if node is None else self._filters.kept(connection, snapshot, node),
                excluded=self._rids(connection, exclude_ids),
                bounds=bounds,
                exact=exact,
            )
            texts = items.texts(connection, {rid for found in candidates for rid in found.rids.tolist()})
            pages = pages_of(candidates, texts, window=slice(offset, offset + k))
            vectors: dict[int, bytes] = {}
            if with_vectors:
                vectors = items.vectors_of(connection, {rid for page in pages for _, rid in page})
        return [[_neighbour(score, *texts[rid], vectors.get(rid)) for score, rid in page] for page in pages]

    def _rids(self, connection: sqlite3.Connection, ids: Sequence[str]) -> Rids:
        if not ids:
            return _NO_RIDS
        return np.array(self._store.items.rids(connection, self.cid, _storable(ids)), dtype=np.int64)

    def explain(self, *, filter: Mapping[str, Json] | None = None, exact: bool = False) -> Explanation:
        """How `search` would go about it now; see `Collection.explain`."""
        with self._one_state() as (connection, snapshot):
            only = None
            if filter is not None:
                only = self._filters.kept(connection, snapshot, parse_filter(filter))
            return Explanation(
                method=snapshot.method(only=only, exact=exact),
                items=snapshot.alive_count,
                matched=None if only is None else len(living_rids(snapshot, only)),
            )

    def count(self, filter: Mapping[str, Json] | None = None) -> int:
        """How many items there are, or match; see `Collection.count`."""
        if filter is None:
            return self._index.snapshot.alive_count
        node: Filter = parse_filter(filter)
        with self._one_state() as (connection, snapshot):
            return len(living_rids(snapshot, self._filters.kept(connection, snapshot, node)))

    def stats(self) -> CollectionStats:
        """What keeping and searching it takes; see `Collection.stats`."""
        snapshot = self._index.snapshot
        with self._store.reading() as connection:
            self._seq_on_disk(connection)
            deleted = self._store.items.count_deleted(connection, self.cid, since=time.time() - GRACE_S)
        return CollectionStats(
            items=snapshot.alive_count,
            deleted=deleted,
            method=snapshot.method(),
            indexed=snapshot.indexed,
            recall=snapshot.recall,
            memory_bytes=snapshot.memory_bytes,
            disk_bytes=self._disk_bytes(deleted),
        )

    def _disk_bytes(self, deleted: int) -> int:
        """Its share of the file, as vectors and items of middling size have it."""
        weights = {cid: items() for cid, items in list(self._store.weights.items())}
        weights[self.cid] = weights.get(self.cid, 0) + deleted * self._item_bytes
        return self._store.used_bytes() * weights[self.cid] // max(1, sum(weights.values()))

    @contextlib.contextmanager
    def _one_state(self) -> Iterator[tuple[sqlite3.Connection, Snapshot]]:
        """A transaction and the index's snapshot of the same commit, so that an answer shows one state."""
        for _ in range(_OPTIMISTIC_TRIES):
            with self._store.reading() as connection:
                seq = self._seq_on_disk(connection)
                snapshot = self._index.at(seq)
                if snapshot is not None:
                    yield connection, snapshot
                    return
        # Writers commit faster than we look: keep them out while both are taken, not while they are searched.
        with contextlib.ExitStack() as stack:
            with self._store.writer():
                connection = stack.enter_context(self._store.reading())
                self._seq_on_disk(connection)
                snapshot = self._index.snapshot
            yield connection, snapshot

    def _seq_on_disk(self, connection: sqlite3.Connection) -> int:
        return self._refuse_if_dropped(registry.seq(connection, self.cid))

    def _next_seq(self, connection: sqlite3.Connection) -> int:
        return self._refuse_if_dropped(registry.next_seq(connection, self.cid))

    def _refuse_if_dropped(self, seq: int | None) -> int:
        if seq is None:
            raise UnknownCollection(f"the collection {self.name!r} was deleted")
        return seq


def _item(row: StoredItem) -> Item:
    return Item(
        id=row.id,
        vector=_vector(row.vector),
        metadata=cast("dict[str, Json]", json.loads(row.metadata)),
        sha256=row.sha256,
        source=row.source,
    )


def _neighbour(score: float, item_id: str, metadata: str, vector: bytes | None) -> Neighbour:
    return Neighbour(
        id=item_id,
        score=score,
        metadata=json.loads(metadata),
        vector=None if vector is None else _vector(vector),
    )


def _vector(stored: bytes) -> Vector:
    return np.frombuffer(stored, dtype="<f4").astype(np.float32)


def _storable(ids: Sequence[str]) -> list[str]:
    """The ids that may be there. The others SQLite would refuse, or cut at a NUL and find another item."""
    return [item_id for item_id in ids if is_storable_text(item_id)]
