"""Saves what can be read of a damaged data directory into a new one."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.errors import ServiceError, StorageError
from app.search.collection import Item
from app.search.embedded.collection import EmbeddedCollection
from app.search.embedded.directory import DATABASE_NAME, lock_directory, storage_errors
from app.search.embedded.library import Collections
from app.search.embedded.wreck import Wreck, WreckedCollection
from app.search.rows import check_items

_ITEMS_AT_ONCE: Final = 512


@dataclass(frozen=True, kw_only=True)
class RescuedCollection:
    """What became of a collection.

    Attributes:
        name: In the new directory. It ends in "-successor" where a successor was being built.
        fingerprint: "unknown" where that could not be read; such a collection can be read and exported.
        items: How many were saved.
        lost: The ids of items that were not; None where nobody knows, because their index is damaged, too.
    """

    name: str
    fingerprint: str
    items: int
    lost: list[str] | None


@dataclass(frozen=True, kw_only=True)
class RescueReport:
    """What was saved, and what was wrong.

    Attributes:
        collections: In order of their names.
        aliases: Those that were saved, and the collections that they lead to.
        complaints: The first things that SQLite's check found; empty where it found nothing.
    """

    collections: list[RescuedCollection]
    aliases: dict[str, str]
    complaints: list[str]


def rescue(source: Path, target: Path) -> RescueReport:
    """Copies everything that can be read of a data directory into a new one. The source isn't changed.

    Items that were deleted stay behind, and so do search structures, which are made again.

    Args:
        source: A data directory that nobody serves.
        target: Not there yet, or empty.

    Raises:
        DirectoryInUse: Somebody serves the source or the target.
        StorageError: There is no database at all, the target has something in it, or can't be written.
    """
    database = source / DATABASE_NAME
    if not database.is_file():
        raise StorageError(f"there is no {DATABASE_NAME} in {source}: nothing to save")
    if target.exists() and any(target.iterdir()):
        raise StorageError(f"{target} is not empty; name a new directory to save into")
    descriptor = lock_directory(source)
    try:
        with storage_errors(), Wreck(database) as wreck, Collections.open(target) as into:
            return _copied(wreck, into)
    finally:
        os.close(descriptor)


def _copied(wreck: Wreck, into: Collections) -> RescueReport:
    found = wreck.collections()
    names = {collection.cid: collection.name for collection in found}
    made: dict[int, EmbeddedCollection] = {}
    for collection, batch in _batches(wreck, found):
        if collection.cid not in made:
            made[collection.cid] = _made(collection, batch, names, into)
        _keep(collection, batch, made[collection.cid])
    for collection in found:  # empty ones, too
        if collection.cid not in made and collection.dimensions is not None:
            made[collection.cid] = _made(collection, [], names, into)
    aliases = {}
    for alias, cid in wreck.aliases().items():
        if cid in made:
            into.set_alias(alias, made[cid].name)
            aliases[alias] = made[cid].name
    return RescueReport(
        collections=sorted(
            (
                RescuedCollection(
                    name=made[collection.cid].name,
                    fingerprint=collection.fingerprint,
                    items=made[collection.cid].count(),
                    lost=collection.lost,
                )
                for collection in found
                if collection.cid in made
            ),
            key=lambda one: one.name,
        ),
        aliases=aliases,
        complaints=wreck.complaints(),
    )


def _batches(wreck: Wreck, found: list[WreckedCollection]) -> Iterator[tuple[WreckedCollection, list[Item]]]:
    waiting: dict[int, list[Item]] = {}
    by_cid = {collection.cid: collection for collection in found}
    for collection, item in wreck.items(found):
        batch = waiting.setdefault(collection.cid, [])
        batch.append(item)
        if len(batch) == _ITEMS_AT_ONCE:
            yield collection, waiting.pop(collection.cid)
    for cid, batch in waiting.items():
        yield by_cid[cid], batch


def _made(
    collection: WreckedCollection, batch: list[Item], names: dict[int, str], into: Collections
) -> EmbeddedCollection:
    name = collection.name
    if collection.successor_of is not None:
        name = f"{names.get(collection.successor_of, str(collection.cid))[:54]}-successor"
    return into.create(
        name,
        fingerprint=collection.fingerprint,
        dimensions=collection.dimensions or len(batch[0].vector),
    )


def _keep(collection: WreckedCollection, batch: list[Item], into: EmbeddedCollection) -> None:
    """Writes items, without those that damage has made impossible."""
    whole = []
    for item in batch:
        try:
            check_items([item], dimensions=into.dimensions)
            whole.append(item)
        except ServiceError:
            lost = [rid for rid, item_id in (collection.ids or {}).items() if item_id == item.id]
            collection.read.difference_update(lost)
    into.upsert(whole, fingerprint=into.fingerprint)
