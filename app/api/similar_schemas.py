"""The wire contract of `POST /similar`.

Dimension key: N vectors · D embedding
"""

import binascii
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from app.api.refusals import InvalidParameter
from app.api.schemas import ImageError, Model, Parameters, SentText, json_text
from app.errors import InvalidVector, TooLarge
from app.search.bounds import MAX_RESULTS
from app.search.ranking import MAX_EXAMPLES

Include = Literal["metadata", "embedding"]


_NO_VECTORS = "it is neither a list of numbers, nor a list of such lists, nor base64 of little-endian float32"


@dataclass(frozen=True)
class SentVectors:
    """Embeddings as they were sent; a text is decoded where it is known how long it may be.

    Attributes:
        sent: Numbers with one or two axes, or base64.
    """

    sent: NDArray[np.float64] | str

    def rows(self, dimensions: int, *, at_most: int, name: str) -> NDArray[np.floating[Any]]:
        """One row for each embedding, [N, D]; what else the search can't use, it says itself.

        Args:
            dimensions: D.
            at_most: How many embeddings are taken.
            name: The parameter's, for errors.

        Raises:
            TooLarge: There are more.
            InvalidParameter: A text is not base64.
            InvalidVector: A text is not of whole embeddings.
        """
        if isinstance(self.sent, str):
            _refuse_more(len(self.sent) * 3 // 4 // (4 * dimensions), at_most)
            return _decoded(self.sent, dimensions, name)
        _refuse_more(len(self.sent) if self.sent.ndim > 1 else 1, at_most)
        return np.atleast_2d(self.sent)


def _refuse_more(actual: int, limit: int) -> None:
    if actual > limit:
        raise TooLarge(
            f"there are {actual:,} embeddings where at most {limit} may be: send fewer at once",
            limit=limit,
            actual=actual,
        )


def _decoded(text: str, dimensions: int, name: str) -> NDArray[np.floating[Any]]:
    try:
        numbers = np.frombuffer(binascii.a2b_base64(text, strict_mode=True), "<f4")
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII, or a part of a number
        raise InvalidParameter(f"{name}: {_NO_VECTORS}", parameter=name) from None
    if not numbers.size or numbers.size % dimensions:
        raise InvalidVector(
            f"the text of {name} has {numbers.size} numbers; an embedding has {dimensions}, and several "
            "follow one another"
        )
    return numbers.reshape(-1, dimensions)


def _sent_vectors(value: object) -> SentVectors | None:
    if isinstance(value, str) and value.startswith("["):
        value = json_text(value)
    if value is None or isinstance(value, str):
        return None if value is None else SentVectors(value)
    rows: list[Any] = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    # By hand, as NumPy would read "1" and true and null as numbers too.
    if not all(isinstance(row, list) and all(type(x) in (float, int) for x in row) for row in rows):
        raise ValueError(_NO_VECTORS)
    if len({len(row) for row in rows}) > 1:
        raise ValueError("its lists are not of one length: each embedding has the model's dimensions")
    return SentVectors(np.array(value, dtype=np.float64))


_NUMBERS = {"type": "array", "items": {"type": "number"}}
Vectors = Annotated[
    Any,
    BeforeValidator(_sent_vectors),
    WithJsonSchema({"anyOf": [{"type": "string"}, _NUMBERS, {"type": "array", "items": _NUMBERS}]}),
]


def _comma_list(value: object) -> object:
    """`include=metadata,embedding`, as queries spell lists."""
    return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value


def _example(value: object) -> object:
    """An id or numbers by themselves are examples too."""
    match value:
        case str():
            return {"id": value}
        case list():
            return {"embedding": value}
    return value


class Example(BaseModel):
    """What a query likes or dislikes: an item of the collection, an embedding or an image."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str | None = None
    """An item of the collection; a text by itself is one."""
    embedding: Vectors = None
    """Numbers, or base64 of little-endian float32; a list of numbers by itself is one."""
    image: SentText | None = None
    """Base64 or a data URI."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How much it counts beside the others, by default 1; only with the strategy `average`."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "Example":
        if sum(value is not None for value in (self.id, self.embedding, self.image)) != 1:
            raise ValueError("an example has one of `id`, `embedding` and `image`")
        return self


Examples = Annotated[
    list[Annotated[Example, BeforeValidator(_example, json_schema_input_type=str | list[float] | Example)]],
    BeforeValidator(json_text),
    Field(max_length=MAX_EXAMPLES),
]
_Keys = Annotated[list[str], Field(min_length=1)]


class SimilarParameters(Parameters):
    """`POST /similar`."""

    id: str | list[str] | None = None
    """Search by an item of the collection, or by several; an item is not among its own neighbours."""
    embedding: Vectors = None
    """Search by an embedding, or by several: numbers, lists of them, or base64 of little-endian float32."""
    fingerprint: str | None = None
    """Whose embeddings are sent; answered with 409 unless it is the collection's. The header `X-Fingerprint`
    says the same."""
    positive: Examples = []
    """Search by likes: a list of ids, of embeddings, or of objects with `id`, `embedding` or `image`, and
    perhaps `weight`. Items that are examples are not found."""
    negative: Examples = []
    """Dislikes, as `positive`, to move away from."""
    strategy: Literal["average", "best_score"] = "average"
    """`average`: near to twice the mean of likes less the mean of dislikes. `best_score`: near to any like,
    and nearer to it than to every dislike; the score is the cosine to the nearest like."""
    collection: str = "default"
    """Where to search: a collection's name, or an alias."""
    k: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 10
    """Neighbours of each query; groups, with `group_by`."""
    offset: Annotated[int, Field(ge=0)] = 0
    """How many of the first to pass over; with `k` at most 1,000."""
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    """The least cosine."""
    max_score: Annotated[float, Field(ge=-1, le=1)] | None = None
    """The greatest cosine: with `threshold`, a range."""
    filter: Annotated[dict[str, Any] | None, BeforeValidator(json_text)] = None
    """Only items whose metadata match, say `{"field": "album", "eq": "sea"}`."""
    exclude: Annotated[list[str], BeforeValidator(json_text), Field(max_length=MAX_RESULTS)] = []
    """Ids that shall not be found."""
    exact: bool = False
    """Compare with everything, whatever it costs."""
    diversify: Annotated[float, Field(ge=0, le=1)] = 0.0
    """From 0, the nearest, to 1, the most different, chosen among the nearest 200 (maximal marginal
    relevance)."""
    group_by: str | _Keys | None = None
    """A metadata field: the best items of each of its values. A path with dots, or a list of keys; items
    without the field are left out."""
    group_size: Annotated[int, Field(ge=1, le=MAX_RESULTS)] | None = None
    """Neighbours of each group, by default 1."""
    include: Annotated[tuple[Include, ...], BeforeValidator(_comma_list)] = ("metadata",)
    """What to say of each neighbour, beside id and score."""
    explain: bool = False
    """Say how the search was done, among how many items, and in which time."""


class SearchedCollection(BaseModel):
    """Where neighbours came from; a score is a cosine, in [-1, 1], higher is nearer."""

    name: str
    fingerprint: str
    items: int
    metric: Literal["cosine"]


class Neighbour(BaseModel):
    """One item found."""

    id: str
    score: float
    metadata: dict[str, Any] | None = None
    embedding: list[float] | None = None


class Group(BaseModel):
    """The best items with one value of the field."""

    value: str | bool | float
    neighbours: list[Neighbour]


class Neighbours(BaseModel):
    """Of one query, best first, or in groups; or the query's error."""

    index: int
    neighbours: list[Neighbour] | None = None
    groups: list[Group] | None = None
    error: ImageError | None = None


class Explained(BaseModel):
    """How the search was done."""

    method: str
    items: int
    matched: int | None = None
    took_ms: float


class SimilarAnswer(BaseModel):
    """Of `POST /similar`."""

    model: Model
    collection: SearchedCollection
    data: list[Neighbours]
    explain: Explained | None = None
