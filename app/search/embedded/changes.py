"""What an upsert means for each of its items: whether it is new, changed, or there already."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from app.search.collection import UpsertStatus
from app.search.embedded.items import Items, KnownItem, NewItem
from app.search.rows import CheckedItems


@dataclass(frozen=True)
class Changes:
    """What is to be done.

    Attributes:
        statuses: One for each item, in order.
        chosen: Which items must be written: of each id the last, if it isn't there already.
        replaced: What they take the place of, deleted items included.
    """

    statuses: list[UpsertStatus]
    chosen: list[int]
    replaced: list[KnownItem]

    def new_items(self, checked: CheckedItems, rids: Sequence[int]) -> list[NewItem]:
        """The items to write, each with a fresh rid."""
        vectors = checked.vectors_ND.astype("<f4", copy=False)
        return [
            NewItem(
                rid=rid,
                id=checked.items[i].id,
                metadata=checked.metadata[i],
                sha256=checked.items[i].sha256,
                source=checked.items[i].source,
                vector=vectors[i].tobytes(),
                thumbnail=checked.items[i].thumbnail,
            )
            for rid, i in zip(rids, self.chosen, strict=True)
        ]


def changes(connection: sqlite3.Connection, cid: int, checked: CheckedItems, *, items: Items) -> Changes:
    """Holds checked items against what is on disk."""
    known = items.known(connection, cid, {item.id for item in checked.items})
    unchanged = _unchanged(connection, checked, known, items=items)
    statuses: list[UpsertStatus] = []
    chosen: dict[str, int] = {}
    for i, item in enumerate(checked.items):
        earlier, row = chosen.get(item.id), known.get(item.id)
        if earlier is not None:
            same = _is_same_as_earlier(checked, earlier, i)
            statuses.append("unchanged" if same else "updated")
        elif row is None or row.deleted:
            same = False
            statuses.append("added")
        else:
            same = i in unchanged
            statuses.append("unchanged" if same else "updated")
        if not same:
            chosen[item.id] = i
    replaced = [known[item_id] for item_id in chosen if item_id in known]
    return Changes(statuses, sorted(chosen.values()), replaced)


def _unchanged(
    connection: sqlite3.Connection, checked: CheckedItems, known: dict[str, KnownItem], *, items: Items
) -> set[int]:
    """Which items are there already. The same image has the same vector, but for rounding.

    Old vectors and thumbnails are read only where all else is the same.
    """
    alike: dict[int, int] = {}  # which item -> the rid that it is like
    for i, item in enumerate(checked.items):
        row = known.get(item.id)
        if (
            row is not None
            and not row.deleted
            and (row.sha256, row.metadata, row.source) == (item.sha256, checked.metadata[i], item.source)
        ):
            alike[i] = row.rid
    with_thumbnail = {i: rid for i, rid in alike.items() if checked.items[i].thumbnail is not None}
    if with_thumbnail:
        there = items.having_thumbnails(connection, with_thumbnail.values())
        for i, rid in with_thumbnail.items():
            if rid not in there:
                del alike[i]
    without_image = {i: rid for i, rid in alike.items() if checked.items[i].sha256 == ""}
    if without_image:
        vectors = items.vectors_of(connection, without_image.values())
        for i, rid in without_image.items():
            if vectors.get(rid) != _vector_bytes(checked, i):
                del alike[i]
    return set(alike)


def _is_same_as_earlier(checked: CheckedItems, earlier: int, i: int) -> bool:
    """Whether an item says what one before it in the batch has said of the same id."""
    first, item = checked.items[earlier], checked.items[i]
    return (
        first.sha256 == item.sha256
        and checked.metadata[earlier] == checked.metadata[i]
        and first.source == item.source
        and (first.thumbnail is not None or item.thumbnail is None)
        and (item.sha256 != "" or _vector_bytes(checked, earlier) == _vector_bytes(checked, i))
    )


def _vector_bytes(checked: CheckedItems, i: int) -> bytes:
    stored: bytes = checked.vectors_ND[i].astype("<f4", copy=False).tobytes()
    return stored
