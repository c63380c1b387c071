"""The collections of one data directory, which this process owns."""

import os
import re
import threading
import time
from pathlib import Path
from typing import Self

from app.errors import CollectionExists, InvalidCollection, UnknownCollection
from app.search.collection import CollectionInfo
from app.search.directory import lock_directory, prepare_database
from app.search.embedded import GRACE_S, EmbeddedCollection
from app.search.maintenance import Maintenance
from app.search.store import Store

MAX_DIMENSIONS = 65_536
_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Collections:
    """All collections of one data directory; see `collection.Catalogue` for what each call promises.

    Make it with `open`; `close` it, or use it as a context manager.
    """

    def __init__(self, store: Store, maintenance: Maintenance, lock_descriptor: int) -> None:
        self._store = store
        self._maintenance = maintenance
        self._lock_descriptor = lock_descriptor
        self._lock = threading.Lock()
        self._by_name: dict[str, EmbeddedCollection] = {}

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
            store = Store(prepare_database(data_dir))
            try:
                collections = cls(store, Maintenance(data_dir, store.writer), lock_descriptor)
                collections._load()
            except BaseException:
                store.close()
                raise
        except BaseException:
            os.close(lock_descriptor)
            raise
        return collections

    def settle(self, *, timeout_s: float) -> bool:
        """Waits until the background has nothing left to do; False where that takes longer."""
        return self._maintenance.settle(timeout_s=timeout_s)

    def _load(self) -> None:
        with self._store.writing() as connection:
            self._store.erase_deleted(connection, before=time.time() - GRACE_S)
        with self._store.reading() as connection:
            for row in self._store.collections(connection):
                collection = EmbeddedCollection(row, self._store)
                collection.load(connection)
                self._by_name[row.name] = collection
                self._watch(collection)
        self._maintenance.start()

    def _watch(self, collection: EmbeddedCollection) -> None:
        self._maintenance.watch(collection.cid, collection.index, key=collection.key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def create(self, name: str, *, fingerprint: str, dimensions: int) -> EmbeddedCollection:
        """Makes an empty collection; see `Catalogue.create`."""
        if not _NAME.fullmatch(name):
            raise InvalidCollection(
                "a collection's name has 1 to 64 of the characters a-z, A-Z, 0-9, '.', '_' and '-', "
                "and begins with a letter or a digit"
            )
        if not fingerprint:
            raise InvalidCollection(
                "a collection needs the fingerprint of the model whose vectors it shall hold"
            )
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise InvalidCollection(f"dimensions is {dimensions}; it must be 1 to {MAX_DIMENSIONS}")
        with self._lock:
            if name in self._by_name:
                raise CollectionExists(f"there is a collection {name!r} already")
            with self._store.writing() as connection:
                row = self._store.add_collection(
                    connection, name, fingerprint=fingerprint, dimensions=dimensions, created_at=time.time()
                )
            collection = self._by_name[name] = EmbeddedCollection(row, self._store)
            self._watch(collection)
        return collection

    def get(self, name: str) -> EmbeddedCollection:
        """The collection of a name; see `Catalogue.get`."""
        with self._lock:
            return self._named(name)

    def list(self) -> list[CollectionInfo]:
        """All collections, in order of name; see `Catalogue.list`."""
        with self._lock:
            return [collection.info for _, collection in sorted(self._by_name.items())]

    def drop(self, name: str) -> None:
        """Deletes a collection with all it has; see `Catalogue.drop`."""
        with self._lock:
            collection = self._named(name)
            with self._store.writing() as connection:
                self._store.drop_collection(connection, collection.cid)
            self._maintenance.forget(collection.cid)
            del self._by_name[name]

    def _named(self, name: str) -> EmbeddedCollection:
        """The collection of a name; hold the lock."""
        if name not in self._by_name:
            raise UnknownCollection(
                f"there is no collection {name[:64]!r}; create it, or see the list of collections"
            )
        return self._by_name[name]

    def close(self) -> None:
        """Lets go of the directory; everything acknowledged is on disk already. May be called twice."""
        with self._lock:
            if self._lock_descriptor >= 0:
                self._maintenance.close()
                self._store.close()
                os.close(self._lock_descriptor)
                self._lock_descriptor = -1
