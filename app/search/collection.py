"""The seam of search: what a collection is, whatever engine keeps it.

Callers hold a `Collection` and a `Catalogue`; the engine inside the process (`app.search.embedded`) is one
implementation, a cluster (`app.search.milvus`) is another. What all engines promise:

- a score is the cosine similarity, in [-1, 1], higher is nearer; equal scores are in order of id;
- vectors are normalised by us, so only their direction is kept;
- an answer means done: what was acknowledged survives `kill -9` and a power cut, and is found at once;
- a call that raises has changed nothing.

What can be computed from candidates (grouping, diversity, likes and dislikes: `app.search.ranking`), from all
items (`app.search.reading.jobs`) or from pages (`app.search.parquet`) belongs above the seam.

Dimension key: Q queries · D embedding
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
Vector: TypeAlias = npt.NDArray[np.float32]
UpsertStatus: TypeAlias = Literal["added", "updated", "unchanged"]

GRACE_S = 7 * 24 * 3_600.0  # how long a deleted item can be undeleted before it is erased


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture of a collection.

    Attributes:
        id: Unique in its collection: 1 to 256 bytes of UTF-8 without control characters.
        vector: float32 [D]; its length is not kept, only its direction.
        metadata: A JSON object of at most 16 kB.
        sha256: Of the image's bytes, in hex; empty where no image was given. The same id with the same hash,
            metadata and source is not written again.
        source: Where the image came from (a path or an address), to embed it again with another model.
        thumbnail: A small WebP. Written with the item; read by `Collection.thumbnail`, and None on items that
            are read.
    """

    id: str
    vector: Vector
    metadata: dict[str, Json]
    sha256: str = ""
    source: str | None = None
    thumbnail: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An item found, and how near it is: the cosine, in [-1, 1].

    Attributes:
        vector: float32 [D], of length 1; None unless the search was asked for vectors.
    """

    id: str
    score: float
    metadata: dict[str, Json]
    vector: Vector | None = None


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """How a search is done.

    Attributes:
        method: "exact" (all vectors are compared), "rows" (those that the filter keeps are compared), "int8"
            (all are compared in 8 bits, the best again in full), "ivf" (the nearest parts are compared in a
            bit a dimension, the best again in full), or the name of a server's own index.
        items: How many there are.
        matched: How many of them the filter keeps; None without a filter.
    """

    method: str
    items: int
    matched: int | None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some items in order of id, and the cursor of the next page; None after the last."""

    items: list[Item]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """What a listing says of a collection; `created_at` is in seconds since 1970.

    Attributes:
        aliases: Other names that lead to it, in order.
        successor: The collection that is being built to take its place, or None.
    """

    name: str
    fingerprint: str
    dimensions: int
    items: int
    created_at: float
    aliases: tuple[str, ...] = ()
    successor: "SuccessorInfo | None" = None


@dataclass(frozen=True, kw_only=True)
class SuccessorInfo:
    """A collection that nobody searches yet; `items` counts those that it has so far."""

    fingerprint: str
    dimensions: int
    items: int


@dataclass(frozen=True, kw_only=True)
class CollectionStats:
    """What keeping and searching a collection takes.

    Attributes:
        items: That are found.
        deleted: That can still be undeleted.
        method: As in `Explanation`, of a search without a filter.
        indexed: How many items the method's own structure covers; the others are compared one by one.
        recall: Of the 10 nearest, measured on items of the collection when the structure was built; 1.0 where
            everything is compared, None where it isn't known.
        memory_bytes: Of vectors and search structures in this process.
        disk_bytes: Of the collection's share of the disk, where it is known.
    """

    items: int
    deleted: int
    method: str
    indexed: int
    recall: float | None
    memory_bytes: int
    disk_bytes: int | None


class Collection(Protocol):
    """Vectors of one model, with ids and metadata. Safe to use from many threads."""

    @property
    def name(self) -> str:
        """Unique in its catalogue."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the model whose vectors these are."""
        ...

    @property
    def dimensions(self) -> int:
        """D of every vector."""
        ...

    @property
    def seq(self) -> int:
        """Counts what was written to it; equal only while nothing was."""
        ...

    @property
    def key(self) -> str:
        """What no other collection has, whatever it is called now or was called before."""
        ...

    def upsert(self, items: Sequence[Item], *, fingerprint: str) -> list[UpsertStatus]:
        """Adds or replaces items, all or none; when it returns they are on disk and found by every search.

        Args:
            items: In order; of two with the same id the later one stays.
            fingerprint: Of the model that made the vectors.

        Returns:
            One status for each item, in order.

        Raises:
            FingerprintMismatch: The vectors are another model's.
            InvalidVector: A vector is not [D], not finite, or zero.
            InvalidItem: An id or metadata can't be kept.
            UnknownCollection: It was dropped.
            StorageError: It could not be written.
        """
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, durably; unknown ids are passed over.

        Returns:
            How many there were to delete.
        """
        ...

    def delete_where(self, filter: Mapping[str, Json]) -> int:
        """Deletes the items whose metadata match, durably.

        Returns:
            How many there were to delete.

        Raises:
            InvalidFilter: The filter is malformed.
        """
        ...

    def undelete(self, ids: Sequence[str]) -> int:
        """Brings deleted items back, durably, within `GRACE_S` of their deletion; other ids are passed over.

        An id that was added again since has its new item, and stays as it is.

        Returns:
            How many came back.
        """
        ...

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Reads items by id, in order; None where there is none."""
        ...

    def thumbnail(self, item_id: str) -> bytes | None:
        """The WebP that was given with an item; None where there is no item or it has none."""
        ...

    def scroll(self, *, cursor: str | None, limit: int, filter: Mapping[str, Json] | None = None) -> Page:
        """Lists items in order of id.

        Args:
            cursor: From the page before; None for the first.
            limit: 1 to 1,000 items.
            filter: Only items whose metadata match.

        Raises:
            InvalidQuery: The limit is out of bounds, or the cursor is not one of ours.
            InvalidFilter: The filter is malformed.
        """
        ...

    def search(  # noqa: PLR0913 - one question, asked in many ways
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
        """Finds the nearest items of each query, best first; equal scores in order of id.

        Args:
            vectors_QD: Any float dtype, any length above 0.
            k: At least 1, and `offset + k` at most 1,000.
            offset: How many of the best to pass over.
            threshold: The least cosine, in [-1, 1]; None for all.
            max_score: The greatest cosine, at least `threshold`: with it, a range; None for all.
            filter: Only items whose metadata match; the language is in `app.search.filters`.
            exclude_ids: Items that shall not be found, say the query itself.
            exact: Forbid any approximation, whatever it costs.
            with_vectors: Whether neighbours carry their vectors.

        Returns:
            For each query at most k neighbours; fewer only where there are no more.

        Raises:
            InvalidQuery: k, offset or threshold is out of bounds.
            InvalidVector: A query is not [D], not finite, or zero.
            InvalidFilter: The filter is malformed.
            UnknownCollection: It was dropped.
        """
        ...

    def explain(self, *, filter: Mapping[str, Json] | None = None, exact: bool = False) -> Explanation:
        """How `search` would go about it now.

        Raises:
            InvalidFilter: The filter is malformed.
        """
        ...

    def count(self, filter: Mapping[str, Json] | None = None) -> int:
        """How many items there are, or match.

        Raises:
            InvalidFilter: The filter is malformed.
        """
        ...

    def stats(self) -> CollectionStats:
        """What keeping and searching it takes."""
        ...


class Catalogue(Protocol):
    """The collections that one engine keeps. Safe to use from many threads.

    A name leads to one collection: its own name, or an alias. Names and aliases are of one kind: 1 to 64 of
    a-z, A-Z, 0-9, `.`, `_`, `-`, beginning with a letter or a digit.
    """

    def create(self, name: str, *, fingerprint: str, dimensions: int) -> Collection:
        """Makes an empty collection for the vectors of one model.

        Args:
            name: Not taken.
            fingerprint: Of the model.
            dimensions: 1 to 65,536; an engine may have a lower bound.

        Raises:
            CollectionExists: The name is taken, by a collection or an alias.
            InvalidCollection: Name or dimensions are out of bounds.
        """
        ...

    def get(self, name: str) -> Collection:
        """The collection of a name or an alias.

        Raises:
            UnknownCollection: There is none.
        """
        ...

    def list(self) -> list[CollectionInfo]:
        """All collections, in order of name, each with the successor that shall take its place."""
        ...

    def drop(self, name: str) -> None:
        """Deletes a collection with all it has, its aliases and its successor; there is no way back.

        Raises:
            UnknownCollection: No collection has this name; an alias is not enough to delete one.
        """
        ...

    def set_alias(self, alias: str, name: str) -> None:
        """Lets an alias lead to a collection, from now on and at once: no search sees both, or none.

        Args:
            alias: New, or one that led elsewhere.
            name: Of a collection.

        Raises:
            UnknownCollection: No collection has this name.
            CollectionExists: The alias is a collection's name.
            InvalidCollection: The alias can't be a name.
        """
        ...

    def drop_alias(self, alias: str) -> None:
        """Forgets an alias; its collection stays.

        Raises:
            UnknownCollection: There is no such alias.
        """
        ...

    def begin_successor(self, name: str, *, fingerprint: str, dimensions: int) -> Collection:
        """Makes an empty collection that shall take another's place, or goes on with the one that was begun.

        It is filled like any other, and neither listed nor found by name until `finish_successor`. It may
        have the predecessor's fingerprint (a restored copy) or another (a new model). Its `name` is the
        predecessor's.

        Raises:
            UnknownCollection: There is no such collection.
            SuccessorExists: One was begun for another fingerprint; cancel it first.
            InvalidCollection: The dimensions are out of bounds.
        """
        ...

    def finish_successor(self, name: str, *, expected_seq: int | None = None) -> str:
        """Puts the successor in its predecessor's place, at once: no search sees both, or none.

        The name and all aliases lead to the successor from now on. The predecessor stays under a new name, so
        that there is a way back (`set_alias` can't take a name in use: drop or keep it as you see fit).

        Args:
            name: Of the predecessor.
            expected_seq: The predecessor's `seq` that the successor was built from; None to switch whatever
                was written since.

        Returns:
            The predecessor's new name.

        Raises:
            UnknownCollection: There is no such collection, or it has no successor.
            PredecessorChanged: It was written to since; look again and try again.
        """
        ...

    def cancel_successor(self, name: str) -> None:
        """Deletes the successor; the predecessor never noticed.

        Raises:
            UnknownCollection: There is no such collection, or it has no successor.
        """
        ...

    def snapshot(self, to: Path) -> None:
        """Copies everything, as it is at one moment, into a new file, while others read and write.

        Raises:
            Unsupported: The engine has its own tool for that; the message names it.
            StorageError: The file is there already, or can't be written.
        """
        ...

    def close(self) -> None:
        """Lets go of files, memory and connections; everything acknowledged is on disk already."""
        ...
