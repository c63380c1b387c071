"""What filters keep, remembered from one search to the next.

A rid is never used twice and its metadata never change: an update or an undeletion gets a new one. So what a
filter keeps of the rids that there were stays right for ever, and only those that came since are asked for.
Rids of deleted items may stay among it; the index knows who lives.
"""

import json
import sqlite3
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from app.search.embedded.fields import Fields
from app.search.embedded.filter_sql import Rids, kept_by
from app.search.embedded.items import Items
from app.search.filters import Filter
from app.search.matching import matches
from app.search.memory.rowset import RowSet
from app.search.memory.snapshot import Snapshot

MAX_BYTES: Final = 16 * 2**20  # of a collection: two filters that keep all of a million items
_MAX_ENTRIES: Final = 256
# Asking the index of fields costs as much as looking at so many items one by one, at most.
_ASKING: Final = 500
_ASKING_SHARE: Final = 0.025
# Rids of the dead gather in an entry; asked anew, it has none.
_STALE_SHARE: Final = 0.5


@dataclass(frozen=True)
class _Entry:
    """What a filter keeps.

    Attributes:
        since_seq: The commit of the snapshot that it was last held against: it has nothing of what was erased
            before, so an older snapshot can't use it.
        covered: The greatest rid of that snapshot.
        kept: What it keeps.
        one_by_one: How many rids were asked for since the index was.
    """

    since_seq: int
    covered: int
    kept: RowSet
    one_by_one: int


class FilterCache:
    """Of one collection. Safe to use from many threads.

    Args:
        cid: The collection's number in the store.
        items: SQL on items.
        fields: The index of filters.
    """

    def __init__(self, cid: int, *, items: Items, fields: Fields) -> None:
        self._cid = cid
        self._items = items
        self._fields = fields
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def kept(self, connection: sqlite3.Connection, snapshot: Snapshot, node: Filter) -> RowSet:
        """The rids of a snapshot that a filter keeps; with some that are dead, or aren't there yet.

        Args:
            connection: In a transaction that sees the snapshot's commit.
            snapshot: Of the index.
            node: From `parse_filter`.
        """
        key = repr(node)  # equal filters may differ: 1, 1.0 and True are equal
        with self._lock:
            known = self._entries.get(key)
            if known is not None:
                self._entries.move_to_end(key)
        if known is None or known.since_seq > snapshot.seq:
            entry = self._asked(connection, snapshot, node)
        elif known.since_seq == snapshot.seq:
            return known.kept
        else:
            entry = self._brought_up(connection, snapshot, node, known)
        self._remember(key, entry)
        return entry.kept

    def _asked(self, connection: sqlite3.Connection, snapshot: Snapshot, node: Filter) -> _Entry:
        """Asks the index of fields, as far as it is written, and then one by one."""
        kept = kept_by(connection, self._cid, node, fields=self._fields)
        indexed = self._items.indexed(connection)
        everything = rids_above(snapshot, 0)
        there = everything[: np.searchsorted(everything, indexed, side="right")]
        entry = _Entry(snapshot.seq, indexed, RowSet(kept.of(there)), 0)
        return self._extended(connection, snapshot, node, entry)

    def _brought_up(
        self, connection: sqlite3.Connection, snapshot: Snapshot, node: Filter, known: _Entry
    ) -> _Entry:
        """From the commit that an entry knows to that of a snapshot, the cheaper way."""
        fresh = len(rids_above(snapshot, known.covered))
        unindexed = len(rids_above(snapshot, self._items.indexed(connection)))
        is_cheaper = fresh > unindexed + max(_ASKING, _ASKING_SHARE * snapshot.size)
        is_stale = known.one_by_one + fresh > _STALE_SHARE * (snapshot.size + _ASKING)
        if is_cheaper or is_stale:
            return self._asked(connection, snapshot, node)
        return self._extended(connection, snapshot, node, known)

    def _extended(
        self, connection: sqlite3.Connection, snapshot: Snapshot, node: Filter, known: _Entry
    ) -> _Entry:
        fresh = rids_above(snapshot, known.covered)
        if not len(fresh):
            return replace(known, since_seq=snapshot.seq)
        texts = self._items.texts(connection, fresh.tolist())
        more = [rid for rid, (_, metadata) in sorted(texts.items()) if matches(node, json.loads(metadata))]
        kept = known.kept
        if more:
            kept = RowSet(np.concatenate([kept.rids, np.array(more, dtype=np.int64)]))
        return _Entry(snapshot.seq, int(fresh[-1]), kept, known.one_by_one + len(fresh))

    def _remember(self, key: str, entry: _Entry) -> None:
        with self._lock:
            known = self._entries.get(key)
            if known is None or known.since_seq < entry.since_seq:
                self._entries[key] = entry
                self._entries.move_to_end(key)
            total = sum(entry.kept.rids.nbytes + len(key) for key, entry in self._entries.items())
            while self._entries and (total > MAX_BYTES or len(self._entries) > _MAX_ENTRIES):
                key, entry = self._entries.popitem(last=False)
                total -= entry.kept.rids.nbytes + len(key)


def rids_above(snapshot: Snapshot, rid: int) -> Rids:
    """The rids of a snapshot that came after one, dead or alive, rising."""
    found = []
    for view in reversed(snapshot.views):
        known = view.chunk.rids[: view.size]
        if known[0] <= rid:
            found.append(known[np.searchsorted(known, rid, side="right") :])
            break
        found.append(known)
    return np.concatenate(found[::-1]) if found else np.empty(0, dtype=np.int64)


def living_rids(snapshot: Snapshot, kept: RowSet) -> Rids:
    """Those of some rids that live in a snapshot, rising."""
    found = [np.empty(0, dtype=np.int64)]
    for number, rows in kept.parts(snapshot.firsts, snapshot.views):
        view = snapshot.views[number]
        found.append(view.chunk.rids[view.living(rows)])
    return np.concatenate(found)
