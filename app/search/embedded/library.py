"""The collections of one data directory, which this process owns."""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, TypeVar

from app.errors import (
    CollectionExists,
    PredecessorChanged,
    StorageError,
    SuccessorExists,
    UnknownCollection,
)
from app.search.collection import CollectionInfo, SuccessorInfo
from app.search.embedded import registry
from app.search.embedded.acknowledged import FILE_NAME as ACKNOWLEDGED_NAME
from app.search.embedded.collection import EmbeddedCollection
from app.search.embedded.directory import (
    DATABASE_NAME,
    is_damage,
    lock_directory,
    prepare_database,
    storage_errors,
    sync_directory,
)
from app.search.embedded.store import Store
from app.search.embedded.wreck import what_can_be_saved
from app.search.memory.maintenance import Maintenance
from app.search.rules import MAX_NAME, check_model, check_name, retired_name

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Names:
    """Which name leads where; never changed, but replaced with one assignment, so that readers need no lock.

    Attributes:
        collections: By their own names.
        aliases: Alias -> name of a collection.
        successors: By the names of their predecessors.
    """

    collections: Mapping[str, EmbeddedCollection] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    successors: Mapping[str, EmbeddedCollection] = field(default_factory=dict)


class Collections:
    """All collections of one data directory; see `collection.Catalogue` for what each call promises.

    Make it with `open`; `close` it, or use it as a context manager.
    """

    def __init__(self, store: Store, maintenance: Maintenance, lock_descriptor: int) -> None:
        self._store = store
        self._maintenance = maintenance
        self._lock_descriptor = lock_descriptor
        self._lock = threading.Lock()
        self._names = _Names()

    @classmethod
    def open(cls, data_dir: Path) -> Self:
        """Takes a directory for this process, and reads its collections into memory.

        Args:
            data_dir: Made if it isn't there.

        Raises:
            DirectoryInUse: Another process has it.
            StorageError: It is damaged, another program's, of a newer version, or can't be written.
        """
        lock_descriptor = lock_directory(data_dir)
        try:
            path = prepare_database(data_dir)
            try:
                store = Store(path)
                try:
                    collections = cls(store, Maintenance(data_dir, store.writer), lock_descriptor)
                    collections._load()
                except BaseException:
                    store.close()
                    raise
            except StorageError as error:
                if is_damage(error):
                    raise StorageError(f"{error}; {what_can_be_saved(path)}") from error
                raise
        except BaseException:
            os.close(lock_descriptor)
            raise
        return collections

    def settle(self, *, timeout_s: float) -> bool:
        """Waits until the background has nothing left to do; False where that takes longer."""
        return self._maintenance.settle(timeout_s=timeout_s)

    def _load(self) -> None:
        with self._store.reading() as connection:
            rows = registry.collections(connection)
            _refuse_if_behind(rows, self._store.acknowledged.read())
            name_of = {row.cid: row.name for row in rows if row.name is not None}
            name_of |= {row.cid: name_of[row.successor_of] for row in rows if row.successor_of is not None}
            loaded: list[tuple[registry.CollectionRow, EmbeddedCollection]] = []
            for row in rows:
                collection = EmbeddedCollection(row, self._store, name=name_of[row.cid])
                collection.load(connection)
                loaded.append((row, collection))
                self._watch(collection)
            self._names = _Names(
                collections={c.name: c for row, c in loaded if row.name is not None},
                aliases={alias: name_of[cid] for alias, cid in registry.aliases(connection).items()},
                successors={c.name: c for row, c in loaded if row.name is None},
            )
        self._store.begin()
        self._maintenance.start()

    def _watch(self, collection: EmbeddedCollection) -> None:
        self._maintenance.watch(collection.cid, collection.index, key=collection.key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def create(self, name: str, *, fingerprint: str, dimensions: int) -> EmbeddedCollection:
        """Makes an empty collection; see `Catalogue.create`."""
        check_name(name)
        check_model(fingerprint=fingerprint, dimensions=dimensions)
        with self._lock:
            names = self._names
            if name in names.collections:
                raise CollectionExists(f"there is a collection {name!r} already")
            if name in names.aliases:
                raise CollectionExists(f"{name!r} is an alias of the collection {names.aliases[name]!r}")
            with self._store.writing() as connection:
                row = registry.add(
                    connection, name, fingerprint=fingerprint, dimensions=dimensions, created_at=time.time()
                )
            collection = EmbeddedCollection(row, self._store, name=name)
            self._watch(collection)
            self._names = replace(names, collections={**names.collections, name: collection})
        return collection

    def get(self, name: str) -> EmbeddedCollection:
        """The collection of a name or an alias; see `Catalogue.get`."""
        names = self._names
        return _named(names, names.aliases.get(name, name))

    def list(self) -> list[CollectionInfo]:
        """All collections, in order of name; see `Catalogue.list`."""
        names = self._names
        infos = []
        for name, collection in sorted(names.collections.items()):
            successor = names.successors.get(name)
            infos.append(
                replace(
                    collection.info,
                    name=name,
                    aliases=tuple(sorted(alias for alias, to in names.aliases.items() if to == name)),
                    successor=None if successor is None else _successor_info(successor),
                )
            )
        return infos

    def drop(self, name: str) -> None:
        """Deletes a collection with all it has; see `Catalogue.drop`."""
        with self._lock:
            names = self._names
            dropped = [_named(names, name)]
            if name in names.successors:
                dropped.append(names.successors[name])
            self._erase(dropped)
            self._names = _Names(
                collections=_without(names.collections, name),
                aliases={alias: to for alias, to in names.aliases.items() if to != name},
                successors=_without(names.successors, name),
            )

    def _erase(self, dropped: Sequence[EmbeddedCollection]) -> None:
        with self._store.writing() as connection:
            for collection in dropped:
                registry.remove(connection, collection.cid)
            self._store.acknowledged.forget({collection.cid for collection in dropped})
        for collection in dropped:
            self._maintenance.forget(collection.cid)
            self._store.weights.pop(collection.cid, None)
        self._store.erase_soon()

    # Aliases

    def set_alias(self, alias: str, name: str) -> None:
        """Lets an alias lead to a collection; see `Catalogue.set_alias`."""
        check_name(alias)
        with self._lock:
            names = self._names
            collection = _named(names, name)
            if alias in names.collections:
                raise CollectionExists(f"{alias!r} is a collection's name; take another alias")
            with self._store.writing() as connection:
                registry.set_alias(connection, alias, collection.cid)
            self._names = replace(names, aliases={**names.aliases, alias: name})

    def drop_alias(self, alias: str) -> None:
        """Forgets an alias; see `Catalogue.drop_alias`."""
        with self._lock:
            names = self._names
            if alias not in names.aliases:
                raise UnknownCollection(f"there is no alias {alias[:MAX_NAME]!r}")
            with self._store.writing() as connection:
                registry.remove_alias(connection, alias)
            self._names = replace(names, aliases=_without(names.aliases, alias))

    # Successors

    def begin_successor(self, name: str, *, fingerprint: str, dimensions: int) -> EmbeddedCollection:
        """Makes what shall take a collection's place, or goes on with it; see `Catalogue.begin_successor`."""
        check_model(fingerprint=fingerprint, dimensions=dimensions)
        with self._lock:
            names = self._names
            predecessor = _named(names, name)
            begun = names.successors.get(name)
            if begun is not None:
                if (begun.fingerprint, begun.dimensions) == (fingerprint, dimensions):
                    return begun
                raise SuccessorExists(
                    f"a successor of {name!r} with vectors of the model {begun.fingerprint} "
                    f"({begun.dimensions} dimensions) was begun; this one is of {fingerprint} "
                    f"({dimensions}). Go on with that one, or cancel it first",
                    expected=begun.fingerprint,
                    found=fingerprint,
                )
            with self._store.writing() as connection:
                row = registry.add(
                    connection,
                    None,
                    successor_of=predecessor.cid,
                    fingerprint=fingerprint,
                    dimensions=dimensions,
                    created_at=time.time(),
                )
            successor = EmbeddedCollection(row, self._store, name=name)
            self._watch(successor)
            self._names = replace(names, successors={**names.successors, name: successor})
        return successor

    def finish_successor(self, name: str, *, expected_seq: int | None = None) -> str:
        """Puts the successor in its predecessor's place; see `Catalogue.finish_successor`."""
        with self._lock:
            names = self._names
            predecessor, successor = _named(names, name), _successor_of(names, name)
            retired = retired_name(name, predecessor.fingerprint, taken={*names.collections, *names.aliases})
            with self._store.writing() as connection:
                seq = registry.seq(connection, predecessor.cid)
                if expected_seq is not None and seq != expected_seq:
                    raise PredecessorChanged(
                        f"{name!r} was written to since its successor was built from it (it is at {seq}, the "
                        f"successor has what was there at {expected_seq}): add what is new, and finish again"
                    )
                registry.promote(
                    connection, successor=successor.cid, predecessor=predecessor.cid, retired_name=retired
                )
            predecessor.rename(retired)
            self._names = _Names(
                collections={**names.collections, name: successor, retired: predecessor},
                aliases=names.aliases,
                successors=_without(names.successors, name),
            )
        return retired

    def cancel_successor(self, name: str) -> None:
        """Deletes the successor; see `Catalogue.cancel_successor`."""
        with self._lock:
            names = self._names
            _named(names, name)
            self._erase([_successor_of(names, name)])
            self._names = replace(names, successors=_without(names.successors, name))

    def snapshot(self, to: Path) -> None:
        """Copies everything, as it is at one moment, into a new file; see `Catalogue.snapshot`."""
        if to.exists():
            raise StorageError(f"{to} is there already; a snapshot is a new file")
        beside = to.with_name(f".{to.name}.part")
        try:
            with storage_errors():
                beside.unlink(missing_ok=True)
            self._store.copy_to(beside)
            with storage_errors():
                with beside.open("rb+") as file:
                    os.fsync(file.fileno())
                beside.rename(to)
                sync_directory(to.parent)
        finally:
            beside.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the directory; everything acknowledged is on disk already. May be called twice."""
        with self._lock:
            if self._lock_descriptor >= 0:
                self._maintenance.close()
                self._store.close()
                os.close(self._lock_descriptor)
                self._lock_descriptor = -1


def _refuse_if_behind(rows: Sequence[registry.CollectionRow], last: tuple[int, int] | None) -> None:
    """Refuses a database that lacks what was acknowledged."""
    if last is None:
        return
    cid, seq = last
    found = {row.cid: row for row in rows}.get(cid)
    if found is not None and found.seq >= seq:
        return
    lost = f"{seq - found.seq:,} writes" if found is not None else "a whole collection"
    raise StorageError(
        f"{lost} that this directory acknowledged are not in {DATABASE_NAME}: its journal "
        f"{DATABASE_NAME}-wal was cut or removed, or the database is an older copy. Put back the files that "
        f"belong together; or, to go on without what is missing, remove the file {ACKNOWLEDGED_NAME!r}"
    )


def _named(names: _Names, name: str) -> EmbeddedCollection:
    if name not in names.collections:
        raise UnknownCollection(
            f"there is no collection {name[:MAX_NAME]!r}; create it, or see the list of collections"
        )
    return names.collections[name]


def _successor_of(names: _Names, name: str) -> EmbeddedCollection:
    if name not in names.successors:
        raise UnknownCollection(f"the collection {name!r} has no successor; begin one first")
    return names.successors[name]


def _successor_info(successor: EmbeddedCollection) -> SuccessorInfo:
    return SuccessorInfo(
        fingerprint=successor.fingerprint, dimensions=successor.dimensions, items=successor.count()
    )


def _without(mapping: Mapping[str, _T], name: str) -> dict[str, _T]:
    return {key: value for key, value in mapping.items() if key != name}
