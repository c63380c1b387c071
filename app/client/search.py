"""What a client asks of `/similar`, and how it reads the answer, as calls."""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, cast

import httpx
import numpy as np
import numpy.typing as npt

from app.client.calls import Call, json_of
from app.client.images import Image, bytes_of, image_parts
from app.client.items import Failure, failure_of
from app.search.collection import Json

Answer = TypeVar("Answer")
Row = npt.NDArray[np.floating[Any]] | Sequence[float]


@dataclass(frozen=True)
class Weighted:
    """An example that counts more, or less, than 1."""

    example: "str | Image | Row"
    weight: float


# An item's id, an image, or an embedding.
Example = str | Image | Row | Weighted


class Options(TypedDict, total=False):
    """How to search; what each means, and its default, is in the service's `/docs`.

    Attributes:
        collection: Its name or an alias; "default" if left out.
        fingerprint: Whose embeddings are sent; refused unless it is the collection's.
        filter: On metadata, as `app.search.filters` says.
        diversify: 0 to 1.
    """

    collection: str
    k: int
    offset: int
    threshold: float
    max_score: float
    filter: Mapping[str, Json] | None
    exclude: Sequence[str]
    exact: bool
    diversify: float
    strategy: Literal["average", "best_score"]
    fingerprint: str


class Query(Options, total=False):
    """What to search by, one of these; `negative` goes with `positive`.

    Attributes:
        id: An item of the collection.
        vector: An embedding.
        positive: Likes.
        negative: Dislikes.
    """

    id: str
    vector: Row
    positive: Sequence[Example]
    negative: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A neighbour; the score is a cosine."""

    id: str
    score: float
    metadata: dict[str, Json]


@dataclass(frozen=True, kw_only=True)
class FoundGroup:
    """The best items with one value of a field."""

    value: str | bool | int | float
    neighbours: list[Found]


@dataclass(frozen=True, kw_only=True)
class Explained:
    """How a search was done.

    Attributes:
        matched: Items that the filter keeps; None without one.
    """

    method: str
    items: int
    matched: int | None
    took_ms: float


def similar(image: Image | None, query: Query) -> Call[list[Found] | Failure]:
    """Asks for the nearest items of one thing."""
    return _call(image, body_of(query), lambda answer: _found(answer["data"][0]))


def similar_groups(
    group_by: str | Sequence[str], image: Image | None, query: Query, *, group_size: int
) -> Call[list[FoundGroup] | Failure]:
    """Asks for the best items of each value of a field."""
    keys = group_by if isinstance(group_by, str) else list(group_by)
    body = body_of(query) | {"group_by": keys, "group_size": group_size}

    def read(answer: Mapping[str, Any]) -> list[FoundGroup] | Failure:
        (one,) = answer["data"]
        return failure_of(one) if "error" in one else groups_of(one["groups"])

    return _call(image, body, read)


def similar_each(
    images: Sequence[Image],
    ids: Sequence[str],
    vectors: Sequence[Row] | npt.NDArray[np.floating[Any]],
    options: Options,
) -> Call[list[list[Found] | Failure]]:
    """Asks for the nearest items of several things at once."""
    body = body_of(cast(Query, options))

    def read(answer: Mapping[str, Any]) -> list[list[Found] | Failure]:
        return [_found(one) for one in answer["data"]]

    if len(images):
        return _image_call(images, body, read)
    by = {"id": list(ids)} if len(ids) else {"embedding": vectors_text(vectors)}
    return _call(None, body | by, read)


def explain(image: Image | None, query: Query) -> Call[Explained]:
    """Asks how a search is done."""
    return _call(image, body_of(query) | {"explain": True}, lambda answer: explained_of(answer["explain"]))


def body_of(query: Query) -> dict[str, Any]:
    """A query without images of its own, as JSON has it."""
    said: dict[str, Any] = _said(query)
    if "vector" in said:
        said["embedding"] = _base64(said.pop("vector"))
    for name in ("positive", "negative"):
        if name in said:
            said[name] = [_example(example) for example in said[name]]
    return said


def parameters_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same beside an image, as the query of an address has it: lists and objects are JSON there."""
    return {
        name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in body.items()
    }


def vectors_text(rows: Iterable[Row]) -> str:
    """Embeddings one after the other, in base64."""
    return base64.b64encode(b"".join(_little_endian(row) for row in rows)).decode("ascii")


def found_of(neighbours: Iterable[Mapping[str, Any]]) -> list[Found]:
    """One answer's neighbours."""
    return [Found(id=one["id"], score=one["score"], metadata=one["metadata"]) for one in neighbours]


def groups_of(groups: Iterable[Mapping[str, Any]]) -> list[FoundGroup]:
    """One answer's groups."""
    return [FoundGroup(value=one["value"], neighbours=found_of(one["neighbours"])) for one in groups]


def explained_of(explain: Mapping[str, Any]) -> Explained:
    """An answer's explanation."""
    return Explained(
        method=explain["method"],
        items=explain["items"],
        matched=explain.get("matched"),
        took_ms=explain["took_ms"],
    )


def _said(query: Query) -> dict[str, Any]:
    said = {name: value for name, value in query.items() if value is not None}
    if "exclude" in said:
        said["exclude"] = list(query["exclude"])
    if "filter" in said:
        said["filter"] = dict(query["filter"] or {})
    return said


def _example(example: Example) -> dict[str, Any]:
    match example:
        case Weighted(example=bare, weight=weight):
            return _example(bare) | {"weight": weight}
        case str():
            return {"id": example}
        case bytes() | Path():
            return {"image": base64.b64encode(bytes_of(example)).decode("ascii")}
        case _:
            return {"embedding": _base64(example)}


def _base64(row: Row) -> str:
    return base64.b64encode(_little_endian(row)).decode("ascii")


def _little_endian(row: Row) -> bytes:
    return np.asarray(row, dtype="<f4").tobytes()


def _call(
    image: Image | None, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Answer]
) -> Call[Answer]:
    if image is not None:
        return _image_call([image], body, read)
    return Call(method="POST", path="/similar", read=_reader(read), request={"json": dict(body)})


def _image_call(
    images: Sequence[Image], body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Answer]
) -> Call[Answer]:
    return Call(
        method="POST",
        path="/similar",
        read=_reader(read),
        request={
            "params": parameters_of(body) | {"on_error": "item"},
            "files": image_parts(map(bytes_of, images)),
        },
        embeds=True,
    )


def _reader(read: Callable[[Mapping[str, Any]], Answer]) -> Callable[[httpx.Response], Answer]:
    return lambda response: read(json_of(response))


def _found(one: Mapping[str, Any]) -> list[Found] | Failure:
    return failure_of(one) if "error" in one else found_of(one["neighbours"])
