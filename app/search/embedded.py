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
from typing import cast

import numpy as np
import numpy.typing as npt

from app.errors import UnknownCollection
from app.search import registry
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
from app.search.filter_sql import SqlFilter, to_sql
from app.search.filters import is_storable_text, parse_filter
from app.search.index import Candidates, Rows, Snapshot, VectorIndex
from app.search.registry import CollectionRow
from app.search.rows import CheckedItems, check_items, unit_vectors
from app.search.rules import check_limit, check_window, cursor_of_id, id_of_cursor, refuse_other_model
from app.search.store import ItemRow, NewItem, Store

_OPTIMISTIC_TRIES = 8


class EmbeddedCollection:
    """A collection of `Collections`; see `app.search.collection.Collection` for what each call promises."""

    def __init__(self, row: CollectionRow, store: Store, *, name: str) -> None:
        self._name = name
        self._row = row
        self._store = store
        self._index = VectorIndex(row.dimensions)

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
        nothing_removed = np.empty(0, dtype=np.int64)
        for rids, vectors_ND in self._store.vectors(connection, self._row):
            self._index.publish(
                self._index.prepare(
                    seq=self._row.seq,
                    rids=np.array(rids, dtype=np.int64),
                    vectors_ND=vectors_ND,
                    removed=nothing_removed,
                )
            )
        no_vectors = np.empty((0, self.dimensions), dtype=np.float32)
        self._index.publish(
            self._index.prepare(
                seq=self._row.seq, rids=nothing_removed, vectors_ND=no_vectors, removed=nothing_removed
            )
        )

    def upsert(self, items: Sequence[Item], *, fingerprint: str) -> list[UpsertStatus]:
        """Adds or replaces items, all or none; see `Collection.upsert`."""
        refuse_other_model(self.name, expected=self.fingerprint, found=fingerprint)
        checked = check_items(items, dimensions=self.dimensions)
        with self._store.writer():
            with self._store.writing() as connection:
                known = self._store.items_by_id(
                    connection, self._row.cid, {item.id for item in items}, with_vectors=True
                )
                statuses, chosen = _plan(checked, known)
                if not chosen:
                    self._seq(connection)
                    return statuses
                snapshot = self._write(connection, checked, chosen, known)
            self._index.publish(snapshot)
        return statuses

    def _write(
        self,
        connection: sqlite3.Connection,
        checked: CheckedItems,
        chosen: list[int],
        known: dict[str, ItemRow],
    ) -> Snapshot:
        seq = self._next_seq(connection)
        rids = self._store.reserve_rids(len(chosen))
        items = checked.items
        old = [known[items[i].id] for i in chosen if items[i].id in known]
        self._store.replace_items(
            connection,
            self._row.cid,
            seq=seq,
            new=[_new_item(rid, checked, i) for rid, i in zip(rids, chosen, strict=True)],
            old_rids=[row.rid for row in old],
        )
        return self._index.prepare(
            seq=seq,
            rids=np.array(rids, dtype=np.int64),
            vectors_ND=checked.vectors_ND[chosen],
            removed=np.array([row.rid for row in old if not row.deleted], dtype=np.int64),
        )

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, durably; see `Collection.delete`."""
        with self._store.writer():
            with self._store.writing() as connection:
                self._seq(connection)
                rids = self._store.rids_of(connection, self.cid, _storable(ids))
                snapshot = self._delete(connection, rids)
            self._index.publish(snapshot)
        return len(rids)

    def delete_where(self, filter: Mapping[str, Json]) -> int:
        """Deletes the items whose metadata match, durably; see `Collection.delete_where`."""
        condition = to_sql(parse_filter(filter))
        with self._store.writer():
            with self._store.writing() as connection:
                self._seq(connection)
                rids = self._store.rids_where(connection, self.cid, condition)
                snapshot = self._delete(connection, rids)
            self._index.publish(snapshot)
        return len(rids)

    def _delete(self, connection: sqlite3.Connection, rids: list[int]) -> Snapshot:
        if not rids:
            return self._index.snapshot
        seq, now = self._next_seq(connection), time.time()
        self._store.mark_deleted(connection, rids, seq=seq, deleted_at=now)
        self._store.erase_deleted(connection, before=now - GRACE_S)
        return self._index.prepare(
            seq=seq,
            rids=np.empty(0, dtype=np.int64),
            vectors_ND=np.empty((0, self.dimensions), dtype=np.float32),
            removed=np.array(rids, dtype=np.int64),
        )

    def undelete(self, ids: Sequence[str]) -> int:
        """Brings deleted items back, durably; see `Collection.undelete`."""
        since = time.time() - GRACE_S
        with self._store.writer():
            with self._store.writing() as connection:
                self._seq(connection)
                rids = self._store.deleted_rids(connection, self.cid, _storable(ids), since=since)
                if not rids:
                    return 0
                seq = self._next_seq(connection)
                fresh, vectors = self._store.undelete(connection, rids, seq=seq)
                snapshot = self._index.prepare(
                    seq=seq,
                    rids=np.array(fresh, dtype=np.int64),
                    vectors_ND=np.frombuffer(b"".join(vectors), dtype="<f4").reshape(-1, self.dimensions),
                    removed=np.empty(0, dtype=np.int64),
                )
            self._index.publish(snapshot)
        return len(rids)

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Reads items by id; see `Collection.get`."""
        with self._store.reading() as connection:
            self._seq(connection)
            rows = self._store.items_by_id(connection, self._row.cid, _storable(ids), with_vectors=True)
        found = {row.id: _item(row) for row in rows.values() if not row.deleted}
        return [found.get(item_id) for item_id in ids]

    def thumbnail(self, item_id: str) -> bytes | None:
        """The WebP that was given with an item; see `Collection.thumbnail`."""
        with self._store.reading() as connection:
            self._seq(connection)
            storable = _storable([item_id])
            return self._store.thumbnail(connection, self._row.cid, storable[0]) if storable else None

    def scroll(self, *, cursor: str | None, limit: int, filter: Mapping[str, Json] | None = None) -> Page:
        """Lists items in order of id; see `Collection.scroll`."""
        check_limit(limit)
        after = "" if cursor is None else id_of_cursor(cursor)
        condition = _condition(filter)
        with self._store.reading() as connection:
            self._seq(connection)
            rows = self._store.items_after(connection, self.cid, after, condition=condition, limit=limit + 1)
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
        """Finds the nearest items of each query; see `Collection.search`. So far always exact."""
        check_window(k=k, offset=offset, threshold=threshold, max_score=max_score)
        condition = _condition(filter)
        queries_QD = unit_vectors(np.asarray(vectors_QD), dimensions=self.dimensions)
        with self._one_state() as (connection, snapshot):
            only = None if condition is None else self._store.rids_where(connection, self.cid, condition)
            excluded = (
                self._store.rids_of(connection, self.cid, _storable(exclude_ids)) if exclude_ids else []
            )
            candidates = _within(
                snapshot,
                queries_QD,
                k=offset + k,
                only=None if only is None else np.array(only, dtype=np.int64),
                excluded=np.array(excluded, dtype=np.int64),
                bounds=(threshold, max_score),
            )
            return self._neighbours(
                connection, candidates, window=slice(offset, offset + k), with_vectors=with_vectors
            )

    def _neighbours(
        self,
        connection: sqlite3.Connection,
        candidates: list[Candidates],
        *,
        window: slice,
        with_vectors: bool,
    ) -> list[list[Neighbour]]:
        ids = self._store.ids_of(connection, {rid for found in candidates for rid in found.rids.tolist()})
        pages = [
            sorted(
                zip(found.scores.tolist(), found.rids.tolist(), strict=True),
                key=lambda pair: (-pair[0], ids[pair[1]]),
            )[window]
            for found in candidates
        ]
        shown = {rid for page in pages for _, rid in page}
        metadata = self._store.metadata_of(connection, shown)
        vectors = self._store.vectors_of(connection, shown) if with_vectors else {}
        return [
            [
                Neighbour(
                    id=ids[rid],
                    score=score,
                    metadata=json.loads(metadata[rid]),
                    vector=_vector(vectors[rid]) if with_vectors else None,
                )
                for score, rid in page
            ]
            for page in pages
        ]

    def explain(self, *, filter: Mapping[str, Json] | None = None, exact: bool = False) -> Explanation:
        """How `search` would go about it now; see `Collection.explain`."""
        matched = None if filter is None else self.count(filter)
        return Explanation(
            method="exact" if matched is None else "rows",
            items=self._index.snapshot.alive_count,
            matched=matched,
        )

    def stats(self) -> CollectionStats:
        """What keeping and searching it takes; see `Collection.stats`."""
        snapshot = self._index.snapshot
        with self._store.reading() as connection:
            self._seq(connection)
            deleted = self._store.count_deleted(connection, self.cid, since=time.time() - GRACE_S)
        return CollectionStats(
            items=snapshot.alive_count,
            deleted=deleted,
            method="exact",
            indexed=0,
            recall=1.0,
            memory_bytes=sum(chunk.nbytes for chunk in snapshot.chunks) + snapshot.rids.nbytes,
            disk_bytes=None,
        )

    @contextlib.contextmanager
    def _one_state(self) -> Iterator[tuple[sqlite3.Connection, Snapshot]]:
        """A transaction and the index's snapshot of the same commit, so that an answer shows one state."""
        for _ in range(_OPTIMISTIC_TRIES):
            with self._store.reading() as connection:
                seq = self._seq(connection)
                snapshot = self._index.snapshot
                if snapshot.seq == seq:
                    yield connection, snapshot
                    return
        # Writers commit faster than we look: keep them out while both are taken, not while they are searched.
        with contextlib.ExitStack() as stack:
            with self._store.writer():
                connection = stack.enter_context(self._store.reading())
                self._seq(connection)
                snapshot = self._index.snapshot
            yield connection, snapshot

    def count(self, filter: Mapping[str, Json] | None = None) -> int:
        """How many items there are, or match; see `Collection.count`."""
        condition = _condition(filter)
        if condition is None:
            return self._index.snapshot.alive_count
        with self._store.reading() as connection:
            self._seq(connection)
            return len(self._store.rids_where(connection, self.cid, condition))

    @property
    def seq(self) -> int:
        """Counts what was written to it."""
        return self._index.snapshot.seq

    def _seq(self, connection: sqlite3.Connection) -> int:
        return self._refuse_if_dropped(registry.seq(connection, self.cid))

    def _next_seq(self, connection: sqlite3.Connection) -> int:
        return self._refuse_if_dropped(registry.next_seq(connection, self.cid))

    def _refuse_if_dropped(self, seq: int | None) -> int:
        if seq is None:
            raise UnknownCollection(f"the collection {self.name!r} was deleted")
        return seq


def _plan(checked: CheckedItems, known: dict[str, ItemRow]) -> tuple[list[UpsertStatus], list[int]]:
    """What each item means, and which must be written: of each id the last, if it isn't there already."""
    statuses: list[UpsertStatus] = []
    chosen: dict[str, int] = {}
    for i, item in enumerate(checked.items):
        earlier, row = chosen.get(item.id), known.get(item.id)
        if earlier is not None:
            same = _says_the_same(_new_item(0, checked, earlier), checked, i)
            statuses.append("unchanged" if same else "updated")
        elif row is None or row.deleted:
            same = False
            statuses.append("added")
        else:
            same = _says_the_same(row, checked, i)
            statuses.append("unchanged" if same else "updated")
        if not same:
            chosen[item.id] = i
    return statuses, sorted(chosen.values())


def _says_the_same(there: ItemRow | NewItem, checked: CheckedItems, i: int) -> bool:
    """Whether writing the item would change nothing. The same image has the same vector, but for rounding."""
    item = checked.items[i]
    has_thumbnail = there.has_thumbnail if isinstance(there, ItemRow) else there.thumbnail is not None
    return (
        there.sha256 == item.sha256
        and there.metadata == checked.metadata[i]
        and there.source == item.source
        and (has_thumbnail or item.thumbnail is None)
        and (item.sha256 != "" or there.vector == checked.vectors_ND[i].tobytes())
    )


def _new_item(rid: int, checked: CheckedItems, i: int) -> NewItem:
    item = checked.items[i]
    vector = checked.vectors_ND[i].astype("<f4").tobytes()
    return NewItem(rid, item.id, checked.metadata[i], item.sha256, item.source, vector, item.thumbnail)


def _item(row: ItemRow) -> Item:
    return Item(
        id=row.id,
        vector=_vector(row.vector or b""),
        metadata=cast("dict[str, Json]", json.loads(row.metadata)),
        sha256=row.sha256,
        source=row.source,
    )


def _vector(stored: bytes) -> Vector:
    return np.frombuffer(stored, dtype="<f4").astype(np.float32)


def _condition(filter: Mapping[str, Json] | None) -> SqlFilter | None:
    return None if filter is None else to_sql(parse_filter(filter))


def _storable(ids: Sequence[str]) -> list[str]:
    """The ids that may be there. The others SQLite would refuse, or cut at a NUL and find another item."""
    return [item_id for item_id in ids if is_storable_text(item_id)]


def _within(
    snapshot: Snapshot,
    queries_QD: Vector,
    *,
    k: int,
    only: Rows | None,
    excluded: Rows,
    bounds: tuple[float | None, float | None],
) -> list[Candidates]:
    """The k nearest of each query whose scores are within bounds.

    The nearest may all be too near: then more are asked for, until there are k that are not, or no others.
    """
    least, greatest = bounds
    asked = k
    while True:
        found = snapshot.nearest(queries_QD, k=asked, only=only, excluded=excluded)
        kept = [_between(least, greatest, candidates) for candidates in found]
        enough = greatest is None or all(
            len(inside.rids) >= k or len(candidates.rids) < asked
            for inside, candidates in zip(kept, found, strict=True)
        )
        if enough:
            return kept
        asked *= 4


def _between(least: float | None, greatest: float | None, found: Candidates) -> Candidates:
    keep = np.ones(len(found.scores), dtype=np.bool_)
    if least is not None:
        keep &= found.scores >= np.float32(least)
    if greatest is not None:
        keep &= found.scores <= np.float32(greatest)
    return Candidates(found.rids[keep], found.scores[keep])
