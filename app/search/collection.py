"""The seam of search: what a collection is, whatever engine keeps it.

Callers hold a `Collection` and a `Catalogue`; the engine inside the process (`app.search.library`) is one
implementation, a cluster is another. What all engines promise:

- a score is the cosine similarity, in [-1, 1], higher is nearer; equal scores are in order of id;
- vectors are normalised by us, so only their direction is kept;
- an answer means done: what was acknowledged survives `kill -9` and a power cut, and is found at once;
- a call that raises has changed nothing.

What can be computed from candidates (grouping, diversity, likes and dislikes) belongs above the seam.

Dimension key: Q queries · D embedding
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
Vector: TypeAlias = npt.NDArray[np.float32]
UpsertStatus: TypeAlias = Literal["added", "updated", "unchanged"]


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
    """An item found, and how near it is: the cosine, in [-1, 1]."""

    id: str
    score: float
    metadata: dict[str, Json]


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some items in order of id, and the cursor of the next page; None after the last."""

    items: list[Item]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class CollectionInfo:
    """What a listing says of a collection; `created_at` is in seconds since 1970."""

    name: str
    fingerprint: str
    dimensions: int
    items: int
    created_at: float


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

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Reads items by id, in order; None where there is none."""
        ...

    def thumbnail(self, item_id: str) -> bytes | None:
        """The WebP that was given with an item; None where there is no item or it has none."""
        ...

    def scroll(self, *, cursor: str | None, limit: int) -> Page:
        """Lists items in order of id.

        Args:
            cursor: From the page before; None for the first.
            limit: 1 to 1,000 items.

        Raises:
            InvalidQuery: The limit is out of bounds, or the cursor is not one of ours.
        """
        ...

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
        """Finds the nearest items of each query, best first; equal scores in order of id.

        Args:
            vectors_QD: Any float dtype, any length above 0.
            k: At least 1, and `offset + k` at most 1,000.
            offset: How many of the best to pass over.
            threshold: The least cosine, in [-1, 1]; None for all.
            filter: Only items whose metadata match; the language is in `app.search.filters`.
            exclude_ids: Items that shall not be found, say the query itself.
            exact: Forbid any approximation, whatever it costs.

        Returns:
            For each query at most k neighbours; fewer only where there are no more.

        Raises:
            InvalidQuery: k, offset or threshold is out of bounds.
            InvalidVector: A query is not [D], not finite, or zero.
            InvalidFilter: The filter is malformed.
            UnknownCollection: It was dropped.
        """
        ...

    def count(self) -> int:
        """How many items there are."""
        ...


class Catalogue(Protocol):
    """The collections that one engine keeps. Safe to use from many threads."""

    def create(self, name: str, *, fingerprint: str, dimensions: int) -> Collection:
        """Makes an empty collection for the vectors of one model.

        Args:
            name: 1 to 64 of a-z, A-Z, 0-9, `.`, `_`, `-`, beginning with a letter or a digit.
            fingerprint: Of the model.
            dimensions: 1 to 65,536.

        Raises:
            CollectionExists: The name is taken.
            InvalidCollection: Name or dimensions are out of bounds.
        """
        ...

    def get(self, name: str) -> Collection:
        """The collection of a name.

        Raises:
            UnknownCollection: There is none.
        """
        ...

    def list(self) -> list[CollectionInfo]:
        """All collections, in order of name."""
        ...

    def drop(self, name: str) -> None:
        """Deletes a collection with all it has; there is no way back.

        Raises:
            UnknownCollection: There is none.
        """
        ...

    def close(self) -> None:
        """Lets go of files, memory and connections; everything acknowledged is on disk already."""
        ...
