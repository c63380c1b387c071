"""The wire contract of maps, duplicates and clusters."""

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from app.search.reading.duplicate_groups import DEFAULT_THRESHOLD, MIN_THRESHOLD
from app.search.reading.jobs import MAX_CLUSTERS
from app.search.reading.views import WHOLE_MAP, Box


def _is_box(text: str) -> str:
    try:
        left, lower, right, upper = map(float, text.split(","))
        is_box = all(map(math.isfinite, (left, lower, right, upper))) and left <= right and lower <= upper
    except ValueError:
        is_box = False
    if not is_box:
        raise ValueError(
            "it is not four numbers, left,lower,right,upper, with left <= right and lower <= upper"
        )
    return text


class _Parameters(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class MapParameters(_Parameters):
    """`GET /collections/{name}/map`."""

    limit: Annotated[int, Field(ge=1, le=100_000)] = 20_000
    """The most items; of more, some are drawn, the same each time."""
    box: Annotated[str, AfterValidator(_is_box)] = ",".join(f"{bound:g}" for bound in WHOLE_MAP)
    """Only items in this part of the map: left,lower,right,upper. The whole map is -1,-1,1,1."""
    encoding: Literal["float", "base64"] = "float"
    """How `x` and `y` stand in JSON: numbers, or base64 of little-endian float32."""

    @property
    def bounds(self) -> Box:
        """The box's numbers."""
        left, lower, right, upper = map(float, self.box.split(","))
        return left, lower, right, upper


class DuplicatesParameters(_Parameters):
    """`GET /collections/{name}/duplicates`."""

    threshold: Annotated[float, Field(ge=MIN_THRESHOLD, le=1)] = DEFAULT_THRESHOLD
    """The least cosine of a link; 1 is for equal bytes and equal embeddings alone. What a model gives copies,
    and what it gives strangers, differs from model to model: try some."""
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    """The most groups of a page; a page of large groups has fewer."""
    cursor: str | None = None
    """`next_cursor` of the page before."""


class ClustersParameters(_Parameters):
    """`GET /collections/{name}/clusters`."""

    k: Annotated[int | None, Field(ge=1, le=MAX_CLUSTERS)] = None
    """How many; without it the square root of half the number of items, at least 2 and at most 100."""
    labels: bool = False
    """Whether to say the cluster of every item, too."""


class ComputingAnswer(BaseModel):
    """The first result is being computed; look again after Retry-After seconds."""

    collection: str
    state: Literal["computing"]
    progress: float | None
    """The share that is done; null while others are computed first."""


class _Reading(BaseModel):
    """What every result says of itself."""

    collection: str
    state: Literal["ready"]
    stale: bool
    """Whether the collection was written to since; then a new result is on its way."""
    progress: float | None
    """Of the new result: the share that is done; null where none is being computed."""
    seq: int
    """Which state of the collection it is of: results of one `seq` are of the same items."""
    items: int
    """How many items there were."""
    computed_at: float
    """In seconds since 1970."""


class MapAnswer(_Reading):
    """Of `GET /collections/{name}/map`."""

    total: int
    """Items in the box, also those above the limit."""
    ids: list[str]
    rows: list[int]
    """Of each id, its place among all items in order of id, which is the order of `labels` of clusters; in
    MessagePack, bytes of little-endian int32."""
    x: list[float] | str
    """Of each id, from -1 to 1; in MessagePack, bytes of little-endian float32."""
    y: list[float] | str


class DuplicateGroup(BaseModel):
    """Items that are the same picture, or nearly."""

    size: int
    """Members; of more than 1,000 only the first are listed."""
    ids: list[str]
    """The most central first: by mean cosine to the others."""
    scores: list[float]
    """Of each id, its cosine to the most central."""
    mean_score: float
    """Of all pairs."""
    min_score: float
    """Of all pairs; far below the threshold, the group is a chain of likenesses."""
    keep: str
    """The one to keep, if one: with the most pixels, where the metadata of all say `width` and `height`;
    otherwise the most central."""
    exact: bool
    """Whether the images of all have the same bytes."""
    same_bytes: list[list[str]]
    """Members whose images have the same bytes."""


class DuplicatesAnswer(_Reading):
    """Of `GET /collections/{name}/duplicates`."""

    threshold: float
    total_groups: int
    total_items: int
    data: list[DuplicateGroup]
    next_cursor: str | None


class Cluster(BaseModel):
    """A part of the collection."""

    size: int
    cohesion: float
    """The mean cosine of its items to their common direction: 1 is all the same."""
    representatives: list[str]
    """Items near the middle that are not alike; the first is the nearest."""
    outliers: list[str]
    """Those farthest from the middle, the farthest first."""


class ClustersAnswer(_Reading):
    """Of `GET /collections/{name}/clusters`."""

    data: list[Cluster]
    labels: list[int] | None = None
    """Of every item, in order of id, its place in `data`; in MessagePack, bytes of little-endian int32."""
