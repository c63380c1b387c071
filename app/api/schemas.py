"""The wire contract: what requests may say and what answers look like."""

import base64
import binascii
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from app.api.problems import refusal_of
from app.api.refusals import InvalidParameter
from app.inference.lanes import Lane
from app.search.rules import MAX_PAGE_ITEMS
from dino_core.backbones import Pooling

OnError = Literal["item", "fail"]
SentText = str | dict[Literal["url"], str]  # base64, a data URI, or where the image is
MAX_IDS: Final = 10_000  # of one request


def json_text(value: object) -> object:
    """A query or a form has only text; there, JSON stands in it."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        raise ValueError("it is not valid JSON") from None


def _vector(value: object) -> object:
    """Numbers, or base64 of little-endian float32."""
    if not isinstance(value, str):
        return value
    try:
        data = binascii.a2b_base64(value, strict_mode=True)
        return np.frombuffer(data, "<f4").tolist()
    except (binascii.Error, ValueError):
        raise ValueError("it is neither a list of numbers nor base64 of little-endian float32") from None


class Parameters(BaseModel):
    """What every request with images may say."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    """One of those that `/info` lists; without it the first, or where a collection is asked the one that it
    is of."""
    on_error: OnError | None = None
    """`item`: an image that fails has its error in its place. `fail`: it fails the request. The default is
    `fail` for a raw body, which is one image, and `item` for lists."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds until the answer is of no use any more; above the service's longest, that one. Also as the
    header `X-Request-Timeout-Ms`."""
    priority: Lane | None = None
    """`bulk`: others' interactive requests go first, and this one gets what they leave. Also as the header
    `X-Priority`."""


class EmbeddingForm(BaseModel):
    """What is read of images, and how its numbers are sent."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    normalize: bool = True
    """Whether embeddings have length 1, and so each patch."""
    encoding: Literal["float", "base64"] = "float"
    """How an embedding stands in JSON: numbers, or base64 of little-endian `dtype`, patch after patch."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the numbers that are sent."""
    pool: Pooling | None = None
    """How the network's tokens become one vector: `cls` is the class token, `mean` the mean of the patches.
    Without it, the model's own way, which is what collections hold. Another way is another embedding, with
    another fingerprint: of a bundle that pools so, without what this one does after pooling."""
    output: Literal["embedding", "patches"] = "embedding"
    """`patches`: one vector for each patch of the image as the network sees it, row by row; `grid` says how
    many rows and columns there are."""


class EmbedParameters(Parameters, EmbeddingForm):
    """`POST /embed`."""


class AddParameters(Parameters):
    """`POST /collections/{name}/items`, multipart or raw: id, metadata and source of each image, or none."""

    ids: list[str] = []
    """Without ids, an image's id is the SHA-256 of its bytes."""
    metadata: list[Annotated[dict[str, Any], BeforeValidator(json_text)]] = []
    """JSON objects. Without metadata, the file's name is kept as `filename`."""
    sources: list[str] = []
    """Where the images came from: paths or addresses."""
    fingerprint: str | None = None
    """Of the model, as `X-Fingerprint`: unless it is the collection's, the answer is 409."""


class NewItem(BaseModel):
    """One item of a JSON request, or a line of NDJSON: an image, or an embedding that was made elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    image: SentText | None = None
    """Base64, a data URI, or {"url": …} where the service takes that."""
    embedding: Annotated[list[float] | None, BeforeValidator(_vector)] = None
    """In place of an image: numbers, or base64 of little-endian float32; the request names the model's
    `fingerprint`."""
    id: str | None = None
    """Without one: the SHA-256 of the image's bytes. An embedding needs one."""
    metadata: dict[str, Any] = {}
    source: str | None = None
    """Where the image came from."""

    @model_validator(mode="after")
    def _refuse_what_is_no_item(self) -> Self:
        if (self.image is None) == (self.embedding is None):
            raise ValueError("an item has either an `image` or an `embedding`")
        if self.embedding is not None and self.id is None:
            raise ValueError("an embedding needs an `id`")
        return self


class AddItems(Parameters):
    """`POST /collections/{name}/items` as JSON."""

    items: list[NewItem]
    fingerprint: str | None = None
    """Of the model that made the embeddings; it may also stand in the query, or in `X-Fingerprint`."""


class StreamParameters(BaseModel):
    """`POST /collections/{name}/items` as NDJSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    """One of those that `/info` lists; without it the one that the collection is of."""
    fingerprint: str | None = None
    """Of the model that made the embeddings; it may also stand in `X-Fingerprint`."""


class ItemIds(BaseModel):
    """`POST /collections/{name}/items/get` and `/undelete`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ids: Annotated[list[str], Field(max_length=MAX_IDS)]


class DeleteItems(BaseModel):
    """`POST /collections/{name}/items/delete`: one of the two."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ids: Annotated[list[str], Field(max_length=MAX_IDS)] | None = None
    filter: dict[str, Any] | None = None
    """Items whose metadata match."""
    dry_run: bool = False
    """Only count them."""

    @model_validator(mode="after")
    def _refuse_both_and_neither(self) -> Self:
        if (self.ids is None) == (self.filter is None):
            raise ValueError("say which items: either `ids` or a `filter`")
        return self


class NewCollection(BaseModel):
    """`POST /collections`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """1 to 64 of a-z, A-Z, 0-9, `.`, `_`, `-`, beginning with a letter or a digit."""
    model: str | None = None
    """Whose embeddings it is for, one of those that `/info` lists; without it the first."""


class ListParameters(BaseModel):
    """`GET /collections/{name}/items`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    limit: Annotated[int, Field(ge=1, le=MAX_PAGE_ITEMS)] = 100
    cursor: str | None = None
    """`next_cursor` of the page before."""
    filter: str | None = None
    """Only items whose metadata match: JSON, say `{"field": "album", "eq": "sea"}`."""


class CountItems(BaseModel):
    """`POST /collections/{name}/count`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    filter: dict[str, Any] | None = None
    """Only items whose metadata match, say `{"field": "album", "eq": "sea"}`; without it, all."""


class Model(BaseModel):
    """Which model answers; in every answer."""

    id: str
    fingerprint: str
    dimensions: int


class ErrorDetails(BaseModel):
    """What an error says beside its code, where it has such a thing."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    limit: int | None = None
    """The bound that was broken."""
    actual: int | None = None
    """What was sent, in the unit of the limit."""
    expected: str | None = None
    found: str | None = None
    path: str | None = None
    """In a filter."""
    pointer: str | None = None
    """In the JSON that was sent."""
    parameter: str | None = None
    index: int | None = None
    """Of the image."""


class ImageError(ErrorDetails):
    """Why one image, item or line of a request has no result."""

    code: str
    title: str


class Embedded(BaseModel):
    """One image's embedding or patches, or its error."""

    index: int
    embedding: list[float] | str | None = None
    patches: list[list[float]] | str | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    sha256: str | None = None
    error: ImageError | None = None


class Grid(BaseModel):
    """Rows and columns of patches."""

    height: int
    width: int


class Usage(BaseModel):
    """What the request took."""

    images: int
    failed: int


class EmbedAnswer(BaseModel):
    """Of `POST /embed`."""

    model: Model
    dtype: Literal["float32", "float16"]
    pool: Pooling | None = None
    """Of embeddings."""
    grid: Grid | None = None
    """Of patches."""
    usage: Usage
    data: list[Embedded]


class Added(BaseModel):
    """What became of one image; what is `added` or `updated` is on disk."""

    index: int
    id: str | None = None
    status: Literal["added", "updated", "unchanged"] | None = None
    error: ImageError | None = None


class AddAnswer(BaseModel):
    """Of `POST /collections/{name}/items`."""

    model: Model
    collection: str
    data: list[Added]


class Successor(BaseModel):
    """A collection that is being built to take another's place; nobody searches it yet."""

    fingerprint: str
    dimensions: int
    items: int
    """That it has so far."""


class CollectionAnswer(BaseModel):
    """One collection."""

    name: str
    fingerprint: str
    dimensions: int
    items: int
    metric: Literal["cosine"] = "cosine"
    searchable: bool
    """Whether it holds embeddings of a model that is served."""
    aliases: list[str]
    """Other names that lead to it."""
    successor: Successor | None
    """What is being built to take its place."""
    created_at: float
    """In seconds since 1970."""


class StatsAnswer(BaseModel):
    """What keeping and searching a collection takes."""

    deleted: int
    """Items that can still be undeleted."""
    method: str
    """How it is searched without a filter."""
    indexed: int
    """Items that the method's own structure covers; the others are compared one by one."""
    recall: float | None
    """Of the 10 nearest, as measured when the structure was built; 1 where everything is compared."""
    memory_bytes: int
    disk_bytes: int | None


class DescribedCollectionAnswer(CollectionAnswer):
    """One collection, and what keeping and searching it takes."""

    stats: StatsAnswer


class CountAnswer(BaseModel):
    """How many items there are, or match."""

    count: int


class CollectionsAnswer(BaseModel):
    """All collections, in order of name."""

    model: Model
    data: list[CollectionAnswer]


class ItemAnswer(BaseModel):
    """One item."""

    id: str
    metadata: dict[str, Any]
    sha256: str
    source: str | None
    embedding: list[float] | None = None


class ItemsAnswer(BaseModel):
    """Some items in order of id."""

    data: list[ItemAnswer]
    next_cursor: str | None


class FoundItems(BaseModel):
    """Items in the order of the ids that were asked for; null where there is none."""

    data: list[ItemAnswer | None]


class Deleted(BaseModel):
    """How many items were deleted; of a dry run, how many would be."""

    deleted: int


class Undeleted(BaseModel):
    """How many items came back."""

    undeleted: int


class ProblemAnswer(ErrorDetails):
    """Every error (RFC 9457); `code` is stable, the texts are not."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    retry_after: float | None = None
    """Seconds."""


AnyParameters = TypeVar("AnyParameters", bound=BaseModel)


def parse(model: type[AnyParameters], values: dict[str, Any]) -> AnyParameters:
    """Checks what a request says.

    Args:
        model: What its route takes.
        values: By name; of a query or a form, only text and lists of text.

    Raises:
        InvalidParameter: A value can't be.
        UnknownParameter: A name isn't one of the model's.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise refusal_of(error.errors(include_context=False, include_url=False)) from None


def json_parameter(name: str, text: str) -> Any:  # noqa: ANN401 - any JSON
    """What stands as JSON in a parameter of a query.

    Raises:
        InvalidParameter: It is not JSON.
    """
    try:
        return json_text(text)
    except ValueError as error:
        raise InvalidParameter(f"{name}: {error}", parameter=name) from None


def base64_of(vector: NDArray[np.floating]) -> str:
    """Little-endian, as `numpy.frombuffer(base64.b64decode(text), "<f4")` reads it."""
    return base64.b64encode(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes()).decode(
        "ascii"
    )
