"""The wire contract of what keeps collections: exports, snapshots, aliases, reindexing."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from app.reindexing import State


class _Body(BaseModel):
    """A JSON body."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ImportAnswer(BaseModel):
    """Of `POST /collections/{name}/import`: all is on disk, and found by the next search."""

    collection: str
    created: bool
    added: int
    updated: int
    unchanged: int


class AliasTarget(_Body):
    """`PUT /aliases/{alias}`."""

    collection: str
    """A collection's own name."""


class AliasAnswer(BaseModel):
    """Another name of a collection."""

    alias: str
    collection: str


class AliasesAnswer(BaseModel):
    """All aliases, in order."""

    data: list[AliasAnswer]


class SnapshotCollection(BaseModel):
    """A collection in a snapshot."""

    name: str
    fingerprint: str
    dimensions: int
    items: int


class SnapshotAnswer(BaseModel):
    """One snapshot."""

    name: str
    bytes: int
    created_at: float
    """In seconds since 1970."""
    collections: list[SnapshotCollection]
    problem: str | None = None
    """Why it can't be read; no snapshot that the service made has one, unless its disk failed."""


class SnapshotsAnswer(BaseModel):
    """All snapshots, the oldest first."""

    data: list[SnapshotAnswer]


class Restore(_Body):
    """`POST /snapshots/{name}/restore`."""

    collection: str
    """Of the snapshot. It takes the place of the collection that has its name, which stays under another."""
    as_: Annotated[str | None, Field(alias="as")] = None
    """The name of a collection to make for it instead."""


class RestoreAnswer(BaseModel):
    """A collection that came out of a snapshot."""

    collection: str
    fingerprint: str
    items: int
    previous: str | None
    """Which name the collection has now that had the name before."""


class ReindexParameters(_Body):
    """`POST /collections/{name}/reindex`; the body may be missing."""

    model: str | None = None
    """Whose embeddings it shall have, one of those that `/info` lists; without it the first."""
    skip_failed: bool = False
    """Whether items that have no picture any more are left out; otherwise they keep it from its end."""


class FailedItemAnswer(BaseModel):
    """An item that the new model has no picture of."""

    id: str
    code: str
    title: str


class ReindexAnswer(BaseModel):
    """How far a reindexing is."""

    collection: str
    state: State
    from_fingerprint: str
    to_fingerprint: str
    done: int
    of: int
    from_source: int
    from_thumbnails: int
    failed: int
    failures: list[FailedItemAnswer]
    """The first hundred."""
    images_per_s: float
    eta_s: float | None
    warnings: list[str]
    previous: str | None
    """Which name the collection has, since the switch, that had the name before."""
    error: str | None
