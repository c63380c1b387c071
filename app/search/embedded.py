"""A collection inside this process: SQLite is the truth, memory the search.

A write is prepared in memory, committed to disk, then published to searches with one assignment that can't
fail; so what was acknowledged is both kept and found, and what failed is neither.

Dimension key: Q queries · N items · D embedding
"""

import base64
import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from app.errors import FingerprintMismatch, InvalidQuery, UnknownCollection
from app.search.candidates import Candidates
from app.search.collection import CollectionInfo, Item, Json, Neighbour, Page, UpsertStatus
from app.search.filter_sql import to_sql
from app.search.filters import is_storable_text, parse_filter
from app.search.index import VectorIndex
from app.search.rows import CheckedItems, check_items, unit_vectors
from app.search.rowset import RowSet
from app.search.snapshot import Snapshot
from app.search.store import CollectionRow, ItemRow, NewItem, Store

MAX_RESULTS = 1_000
MAX_PAGE_ITEMS = 1_000
GRACE_S = 7 * 24 * 3_600.0  # how long a deleted item's row stays on disk, hidden, before it is erased
_OPTIMISTIC_TRIES = 8


class EmbeddedCollection:
    """A collection of `Collections`; see `app.search.collection.Collection` for what each call promises."""

    def __init__(self, row: CollectionRow, store: Store) -> None:
        self._row = row
        self._store = store
        self._index = VectorIndex(row.dimensions)

    @property
    def name(self) -> str:
        """Unique in its catalogue."""
        return self._row.name

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
    def info(self) -> CollectionInfo:
        """What a listing says of it."""
        row = self._row
        return CollectionInfo(
            name=row.name,
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
        if fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                f"the collection {self.name!r} holds vectors of the model {self.fingerprint}; these are of "
                f"{fingerprint}. Use that model, or another collection",
                expected=self.fingerprint,
                found=fingerprint,
            )
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
        seq = self._refuse_if_dropped(self._store.next_seq(connection, self._row.cid))
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
        now = time.time()
        with self._store.writer():
            with self._store.writing() as connection:
                seq = self._refuse_if_dropped(self._store.next_seq(connection, self._row.cid))
                rids = self._store.rids_of(connection, self._row.cid, _storable(ids))
                self._store.mark_deleted(connection, rids, seq=seq, deleted_at=now)
                self._store.erase_deleted(connection, before=now - GRACE_S)
                snapshot = self._index.prepare(
                    seq=seq,
                    rids=np.empty(0, dtype=np.int64),
                    vectors_ND=np.empty((0, self.dimensions), dtype=np.float32),
                    removed=np.array(rids, dtype=np.int64),
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

    def scroll(self, *, cursor: str | None, limit: int) -> Page:
        """Lists items in order of id; see `Collection.scroll`."""
        if not 1 <= limit <= MAX_PAGE_ITEMS:
            raise InvalidQuery(f"limit is {limit}; it must be 1 to {MAX_PAGE_ITEMS}")
        after = "" if cursor is None else _id_of_cursor(cursor)
        with self._store.reading() as connection:
            self._seq(connection)
            rows = self._store.items_after(connection, self._row.cid, after, limit=limit + 1)
        has_more = len(rows) > limit
        rows = rows[:limit]
        return Page(
            items=[_item(row) for row in rows], next_cursor=_cursor_of_id(rows[-1].id) if has_more else None
        )

    def search(
        self,
        vectors_QD: npt.NDArray[np.floating],
        *,
        k: int,
        offset: int = 0,
        threshold: float | None = None,
        filter: Mapping[str, Json] | None = None,
        exclude_ids: Sequence[str] = (),
        exact: bool = False,
    ) -> list[list[Neighbour]]:
        """Finds the nearest items of each query; see `Collection.search`."""
        _check_window(k=k, offset=offset, threshold=threshold)
        condition = None if filter is None else to_sql(parse_filter(filter))
        queries_QD = unit_vectors(np.asarray(vectors_QD), dimensions=self.dimensions)
        cid = self._row.cid
        with self._one_state() as (connection, snapshot):
            only = None if condition is None else self._store.rids_where(connection, cid, condition)
            excluded = self._store.rids_of(connection, cid, _storable(exclude_ids)) if exclude_ids else []
            candidates = snapshot.nearest(
                queries_QD,
                k=offset + k,
                only=None if only is None else RowSet(np.array(only, dtype=np.int64)),
                excluded=np.array(excluded, dtype=np.int64),
                exact=exact,
            )
            if threshold is not None:
                candidates = [_at_least(threshold, found) for found in candidates]
            return self._neighbours(connection, candidates, window=slice(offset, offset + k))

    def _neighbours(
        self, connection: sqlite3.Connection, candidates: list[Candidates], *, window: slice
    ) -> list[list[Neighbour]]:
        ids = self._store.ids_of(connection, {rid for found in candidates for rid in found.rids.tolist()})
        pages = [
            sorted(
                zip(found.scores.tolist(), found.rids.tolist(), strict=True),
                key=lambda pair: (-pair[0], ids[pair[1]]),
            )[window]
            for found in candidates
        ]
        metadata = self._store.metadata_of(connection, {rid for page in pages for _, rid in page})
        return [
            [Neighbour(id=ids[rid], score=score, metadata=json.loads(metadata[rid])) for score, rid in page]
            for page in pages
        ]

    @contextlib.contextmanager
    def _one_state(self) -> Iterator[tuple[sqlite3.Connection, Snapshot]]:
        """A transaction and the index's snapshot of the same commit, so that an answer shows one state."""
        for _ in range(_OPTIMISTIC_TRIES):
            with self._store.reading() as connection:
                seq = self._seq(connection)
                snapshot = self._index.at(seq)
                if snapshot is not None:
                    yield connection, snapshot
                    return
        # Writers commit faster than we look: keep them out while both are taken, not while they are searched.
        with contextlib.ExitStack() as stack:
            with self._store.writer():
                connection = stack.enter_context(self._store.reading())
                self._seq(connection)
                snapshot = self._index.snapshot
            yield connection, snapshot

    def count(self) -> int:
        """How many items there are."""
        return self._index.snapshot.alive_count

    def _seq(self, connection: sqlite3.Connection) -> int:
        return self._refuse_if_dropped(self._store.seq(connection, self._row.cid))

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
        vector=np.frombuffer(row.vector or b"", dtype="<f4").astype(np.float32),
        metadata=cast("dict[str, Json]", json.loads(row.metadata)),
        sha256=row.sha256,
        source=row.source,
    )


def _storable(ids: Sequence[str]) -> list[str]:
    """The ids that may be there. The others SQLite would refuse, or cut at a NUL and find another item."""
    return [item_id for item_id in ids if is_storable_text(item_id)]


def _at_least(threshold: float, found: Candidates) -> Candidates:
    keep = found.scores >= np.float32(threshold)
    return Candidates(found.rids[keep], found.scores[keep])


def _check_window(*, k: int, offset: int, threshold: float | None) -> None:
    if k < 1 or offset < 0 or offset + k > MAX_RESULTS:
        raise InvalidQuery(
            f"k is {k} and offset {offset}; k must be at least 1, offset at least 0, and both together at "
            f"most {MAX_RESULTS:,}. To read everything, list the items page by page"
        )
    if threshold is not None and not -1.0 <= threshold <= 1.0:
        raise InvalidQuery(f"threshold is {threshold}; scores are cosines, so it must be -1 to 1")


def _cursor_of_id(item_id: str) -> str:
    return base64.urlsafe_b64encode(item_id.encode()).decode("ascii")


def _id_of_cursor(cursor: str) -> str:
    try:
        return base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True).decode()
    except ValueError:  # binascii.Error and the Unicode errors are ValueErrors
        raise InvalidQuery("the cursor is not one that a page gave; begin again without one") from None
