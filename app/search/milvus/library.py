"""The collections of a Milvus server, which other services may use at the same time.

The package pymilvus is imported when a server is opened, and not before.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from app.errors import (
    CollectionExists,
    InvalidCollection,
    PredecessorChanged,
    StorageError,
    SuccessorExists,
    UnknownCollection,
    Unsupported,
)
from app.search.collection import CollectionInfo, SuccessorInfo
from app.search.milvus.collection import MilvusCollection
from app.search.milvus.names import Generation, Names, Stand, new_token
from app.search.milvus.server import MilvusServer, Missing, Taken
from app.search.milvus.table import LIVE, MAX_DIMENSIONS, Table
from app.search.rules import MAX_NAME, check_model, check_name, retired_name

DEFAULT_SPACE = "dinoserve"
_COUNTED_AT_ONCE = 16


class MilvusCollections:
    """All collections in one space of a server; see `collection.Catalogue` for what each call promises.

    Make it with `open`; `close` it, or use it as a context manager.
    """

    def __init__(self, server: MilvusServer, names: Names) -> None:
        self._server = server
        self._names = names
        self._lock = threading.Lock()
        self._tables: dict[str, Table] = {}

    @classmethod
    def open(cls, url: str, *, token: str | None = None, space: str = DEFAULT_SPACE) -> Self:
        """Connects to a server.

        Args:
            url: http://host:19530; a path behind it is the name of a database.
            token: If the server wants one: "user:password", or a key.
            space: 1 to 20 letters and digits, the same for all services that share their collections.

        Raises:
            StorageError: No server answers, it doesn't take the token, or pymilvus isn't installed.
        """
        return cls(MilvusServer(url, token=token), Names(space))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def create(self, name: str, *, fingerprint: str, dimensions: int) -> MilvusCollection:
        """Makes an empty collection; see `Catalogue.create`."""
        check_name(name)
        check_model(fingerprint=fingerprint, dimensions=dimensions, max_dimensions=MAX_DIMENSIONS)
        self._refuse_if_taken(name)
        stand = Stand(new_token(), name)
        generation = self._names.new_generation(stand.token, dimensions=dimensions, fingerprint=fingerprint)
        table = self._table(generation)
        table.create()
        try:
            self._server.call("create_alias", generation.server_name, self._names.current(stand.token))
            self._stand_up(stand)
        except BaseException:
            with contextlib.suppress(StorageError, Missing):
                self._server.call("drop_alias", self._names.current(stand.token))
                table.drop()
            raise
        return MilvusCollection(name, table)

    def _stand_up(self, stand: Stand) -> None:
        """Makes what stands for a collection, and gives it its name: from then on the collection is there.

        Raises:
            CollectionExists: Another service was quicker to take the name.
        """
        client, kind = self._server.pymilvus.MilvusClient, self._server.pymilvus.DataType
        schema = client.create_schema(auto_id=False)
        schema.add_field("id", kind.VARCHAR, is_primary=True, max_length=1)
        schema.add_field("vector", kind.FLOAT_VECTOR, dim=2)  # no collection is without
        server_name = self._names.stand(stand)
        self._server.call("create_collection", server_name, schema=schema, num_shards=1)
        try:
            self._server.call("create_alias", server_name, self._names.name(stand.name))
        except Taken:
            self._server.call("drop_collection", server_name)
            self._refuse_if_taken(stand.name)
            raise CollectionExists(f"there is a collection {stand.name!r} already") from None

    def _refuse_if_taken(self, name: str) -> None:
        stand = self._stand_of(name)
        if stand is not None and stand.name == name:
            raise CollectionExists(f"there is a collection {name!r} already")
        if stand is not None:
            raise CollectionExists(f"{name!r} is an alias of the collection {stand.name!r}")

    def get(self, name: str) -> MilvusCollection:
        """The collection of a name or an alias; see `Catalogue.get`."""
        stand = self._stand_of(name)
        generation = None if stand is None else self._generation_of(self._names.current(stand.token))
        if stand is None or generation is None:
            raise _unknown(name)
        return MilvusCollection(stand.name, self._table(generation))

    def list(self) -> list[CollectionInfo]:
        """All collections, in order of name; see `Catalogue.list`."""
        stands = map(self._names.to_stand, self._server.call("list_collections"))
        # Counting waits for the server's clock, for each collection anew: better at the same time.
        with ThreadPoolExecutor(_COUNTED_AT_ONCE, thread_name_prefix="dino-milvus") as pool:
            infos = list(pool.map(self._info, (stand for stand in stands if stand is not None)))
        return sorted((info for info in infos if info is not None), key=lambda info: info.name)

    def _info(self, stand: Stand) -> CollectionInfo | None:
        """What a listing says; None of what is being made or dropped at the moment."""
        try:
            aliases = self._server.call("list_aliases", self._names.stand(stand))["aliases"]
            generation = self._generation_of(self._names.current(stand.token))
            if self._names.name(stand.name) not in aliases or generation is None:
                return None
            return CollectionInfo(
                name=stand.name,
                fingerprint=generation.fingerprint,
                dimensions=generation.dimensions,
                items=self._table(generation).count(LIVE),
                created_at=generation.created_at,
                aliases=tuple(sorted({self._names.to_name(alias) for alias in aliases} - {stand.name})),
                successor=self._successor_info(stand),
            )
        except Missing:
            return None

    def _successor_info(self, stand: Stand) -> SuccessorInfo | None:
        successor = self._successor_of(stand)
        if successor is None:
            return None
        return SuccessorInfo(
            fingerprint=successor.fingerprint,
            dimensions=successor.dimensions,
            items=self._table(successor).count(LIVE),
        )

    def drop(self, name: str) -> None:
        """Deletes a collection with all it has; see `Catalogue.drop`."""
        stand = self._named(name)
        server_name = self._names.stand(stand)
        # The name first: from then on nobody finds it, even if the rest is cut short.
        self._server.call("drop_alias", self._names.name(name))
        for alias in self._server.call("list_aliases", server_name)["aliases"]:
            self._server.call("drop_alias", alias)
        self._drop_generation(self._names.successor(stand.token))
        self._drop_generation(self._names.current(stand.token))
        self._server.call("drop_collection", server_name)

    def _drop_generation(self, alias: str) -> None:
        """Takes an alias from a generation, and drops it if that was its last."""
        generation = self._generation_of(alias)
        if generation is None:
            return
        self._server.call("drop_alias", alias)
        if not self._server.call("list_aliases", generation.server_name)["aliases"]:
            self._table(generation).drop()
            with self._lock:
                self._tables.pop(generation.server_name, None)

    # Aliases

    def set_alias(self, alias: str, name: str) -> None:
        """Lets an alias lead to a collection; see `Catalogue.set_alias`."""
        check_name(alias)
        server_name = self._names.stand(self._named(name))
        there = self._stand_of(alias)
        if there is not None and there.name == alias:
            raise CollectionExists(f"{alias!r} is a collection's name; take another alias")
        with contextlib.suppress(Taken):
            if there is None:
                self._server.call("create_alias", server_name, self._names.name(alias))
                return
        self._server.call("alter_alias", server_name, self._names.name(alias))

    def drop_alias(self, alias: str) -> None:
        """Forgets an alias; see `Catalogue.drop_alias`."""
        stand = self._stand_of(alias)
        if stand is None or stand.name == alias:
            raise UnknownCollection(f"there is no alias {alias[:MAX_NAME]!r}")
        self._server.call("drop_alias", self._names.name(alias))

    # Successors

    def begin_successor(self, name: str, *, fingerprint: str, dimensions: int) -> MilvusCollection:
        """Makes what shall take a collection's place, or goes on with it; see `Catalogue.begin_successor`."""
        check_model(fingerprint=fingerprint, dimensions=dimensions, max_dimensions=MAX_DIMENSIONS)
        stand = self._named(name)
        begun = self._successor_of(stand)
        if begun is None:
            begun = self._begin(stand, fingerprint=fingerprint, dimensions=dimensions)
        if (begun.fingerprint, begun.dimensions) != (fingerprint, dimensions):
            raise SuccessorExists(
                f"a successor of {name!r} with vectors of the model {begun.fingerprint} "
                f"({begun.dimensions} dimensions) was begun; this one is of {fingerprint} "
                f"({dimensions}). Go on with that one, or cancel it first",
                expected=begun.fingerprint,
                found=fingerprint,
            )
        return MilvusCollection(name, self._table(begun))

    def _begin(self, stand: Stand, *, fingerprint: str, dimensions: int) -> Generation:
        """A new generation, or the one that another service was quicker to begin."""
        made = self._names.new_generation(stand.token, dimensions=dimensions, fingerprint=fingerprint)
        alias = self._names.successor(stand.token)
        if self._generation_of(alias) is not None:
            self._server.call("drop_alias", alias)  # left by a finish that was cut short: it is current
        self._table(made).create()
        try:
            self._server.call("create_alias", made.server_name, alias)
        except Taken:
            self._table(made).drop()
            return self._successor_of(stand) or made
        return made

    def finish_successor(self, name: str, *, expected_seq: int | None = None) -> str:
        """Puts the successor in its predecessor's place; see `Catalogue.finish_successor`."""
        stand = self._named(name)
        current, successor = self._names.current(stand.token), self._names.successor(stand.token)
        predecessor, made = self._generation_of(current), self._must_have_successor(stand)
        if predecessor is None:
            raise _unknown(name)
        table = self._table(predecessor)
        with table.claims.of_all(), self._table(made).claims.of_all():
            seq = table.last_stamp()
            if expected_seq is not None and seq != expected_seq:
                raise PredecessorChanged(
                    f"{name!r} was written to since its successor was built from it (it is at {seq}, the "
                    f"successor has what was there at {expected_seq}): add what is new, and finish again"
                )
            retired = self._retire(name, predecessor)
            # This is the moment: before it all names lead to the predecessor, after it to the successor.
            self._server.call("alter_alias", made.server_name, current)
            self._server.call("drop_alias", successor)
        return retired

    def _retire(self, name: str, predecessor: Generation) -> str:
        """Gives a generation another name, beside the one that it has until the next moment."""
        taken: set[str] = set()
        while True:
            retired = retired_name(name, predecessor.fingerprint, taken=taken)
            stand = Stand(new_token(), retired)
            try:
                self._refuse_if_taken(retired)
                self._server.call("create_alias", predecessor.server_name, self._names.current(stand.token))
                self._stand_up(stand)
            except CollectionExists:
                self._server.call("drop_alias", self._names.current(stand.token))
                taken.add(retired)
            else:
                return retired

    def cancel_successor(self, name: str) -> None:
        """Deletes the successor; see `Catalogue.cancel_successor`."""
        stand = self._named(name)
        self._must_have_successor(stand)
        self._drop_generation(self._names.successor(stand.token))

    def snapshot(self, to: Path) -> None:
        """Is not for us to do; see `Catalogue.snapshot`."""
        raise Unsupported(
            "collections on a Milvus server are copied by Milvus's own tool, milvus-backup: "
            "https://github.com/zilliztech/milvus-backup. Or export them one by one"
        )

    def close(self) -> None:
        """Lets go of the connection; everything acknowledged is on the server. May be called twice."""
        self._server.close()

    # What leads where

    def _stand_of(self, name: str) -> Stand | None:
        """What stands for the collection that a name or an alias leads to."""
        try:
            check_name(name)
        except InvalidCollection:
            return None
        server_name = self._target(self._names.name(name))
        return None if server_name is None else self._names.to_stand(server_name)

    def _named(self, name: str) -> Stand:
        """What stands for the collection of this very name."""
        stand = self._stand_of(name)
        if stand is None or stand.name != name:
            raise _unknown(name)
        return stand

    def _generation_of(self, alias: str) -> Generation | None:
        server_name = self._target(alias)
        return None if server_name is None else self._names.to_generation(server_name)

    def _successor_of(self, stand: Stand) -> Generation | None:
        """The generation that is being built; one that a cut finish left as current is none."""
        successor = self._generation_of(self._names.successor(stand.token))
        if successor is None or successor == self._generation_of(self._names.current(stand.token)):
            return None
        return successor

    def _must_have_successor(self, stand: Stand) -> Generation:
        successor = self._successor_of(stand)
        if successor is None:
            raise UnknownCollection(f"the collection {stand.name!r} has no successor; begin one first")
        return successor

    def _target(self, alias: str) -> str | None:
        """The server's collection that an alias leads to."""
        try:
            return str(self._server.call("describe_alias", alias)["collection_name"])
        except Missing:
            return None

    def _table(self, generation: Generation) -> Table:
        """One for each generation, so that all who write to it here take turns."""
        with self._lock:
            return self._tables.setdefault(generation.server_name, Table(self._server, generation))


def _unknown(name: str) -> UnknownCollection:
    return UnknownCollection(
        f"there is no collection {name[:MAX_NAME]!r}; create it, or see the list of collections"
    )
