"""Pages of the items that a filter keeps, in order of id."""

import sqlite3
from typing import Final

import numpy as np

from app.search.embedded.filter_sql import Rids, is_in
from app.search.embedded.items import Items, StoredItem

# Looking up the id of a rid costs about four times what passing over an item costs that isn't kept.
_LOOK_UP_COST: Final = 4
_IDS_AT_ONCE: Final = 4_096


def matching_after(
    connection: sqlite3.Connection,
    cid: int,
    after_id: str,
    *,
    kept: Rids,
    everything: int,
    limit: int,
    items: Items,
) -> list[StoredItem]:
    """The first items whose ids are above one, of those that a filter keeps.

    Few that are kept are sorted, of many the next are looked for from the id on: whichever costs less.

    Args:
        connection: In a transaction.
        cid: The collection's number.
        after_id: The id of the last page's last item; empty for the first page.
        kept: Rids of living items, rising.
        everything: How many items live.
        limit: How many items at most.
        items: SQL on items.
    """
    if not len(kept):
        return []
    if _LOOK_UP_COST * len(kept) <= limit * everything / len(kept):
        rids = items.first_ids(connection, kept.tolist(), after_id, limit=limit)
    else:
        rids = _next_kept(connection, cid, after_id, kept=kept, limit=limit, items=items)
    return items.by_rid(connection, rids)


def _next_kept(
    connection: sqlite3.Connection, cid: int, after_id: str, *, kept: Rids, limit: int, items: Items
) -> list[int]:
    found: list[int] = []
    while len(found) < limit:
        block = items.ids_after(connection, cid, after_id, limit=_IDS_AT_ONCE)
        if not block:
            break
        rids = np.array([rid for _, rid in block], dtype=np.int64)
        order = np.argsort(rids)
        is_kept = np.empty(len(rids), dtype=np.bool_)
        is_kept[order] = is_in(rids[order], kept)
        found += rids[is_kept].tolist()
        after_id = block[-1][0]
    return found[:limit]
