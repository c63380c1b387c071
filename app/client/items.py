"""What a client sends of items, and how it reads what became of them: plain data, no connection."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app.search.collection import Json, UpsertStatus

LINES_MEDIA_TYPE: Final = "application/x-ndjson"
_MOST_LINES: Final = 256
_MOST_BYTES: Final = 8 * 2**20  # a longer line goes alone


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why one image of a request has no result."""

    code: str
    title: str
    limit: int | None = None
    actual: int | None = None


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An image to add to a collection.

    Attributes:
        id: 1 to 256 bytes of UTF-8.
        data: The file.
        metadata: A JSON object.
        source: Where the image came from; of one request all have one, or none.
    """

    id: str
    data: bytes
    metadata: Mapping[str, Json]
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class NewVector:
    """An embedding that was made elsewhere, to add to a collection of its model.

    Attributes:
        id: 1 to 256 bytes of UTF-8.
        embedding: [D]; only its direction is kept.
        metadata: A JSON object.
        source: Where the image came from.
    """

    id: str
    embedding: npt.NDArray[np.floating]
    metadata: Mapping[str, Json]
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class Added:
    """What became of an upload: it is on disk, and found by the next search."""

    id: str
    status: UpsertStatus


@dataclass(frozen=True, kw_only=True)
class StoredItem:
    """An item without its embedding."""

    id: str
    sha256: str
    metadata: dict[str, Json]
    source: str | None


def item_line(item: Upload | NewVector) -> bytes:
    """One item as a line of NDJSON, with its end."""
    members: dict[str, Any] = {"id": item.id, "metadata": dict(item.metadata)}
    if item.source is not None:
        members["source"] = item.source
    if isinstance(item, Upload):
        members["image"] = base64.b64encode(item.data).decode("ascii")
    else:
        numbers = np.ascontiguousarray(item.embedding, dtype="<f4").tobytes()
        members["embedding"] = base64.b64encode(numbers).decode("ascii")
    # Not orjson: the client needs none, and most of a line is one string that is plain already.
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def bodies_of(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines put together to bodies of bounded size: how many lines each has, and its bytes."""
    body: list[bytes] = []
    size_bytes = 0
    for line in lines:
        if body and (len(body) == _MOST_LINES or size_bytes + len(line) > _MOST_BYTES):
            yield len(body), b"".join(body)
            body, size_bytes = [], 0
        body.append(line)
        size_bytes += len(line)
    if body:
        yield len(body), b"".join(body)


def stored_of(one: Mapping[str, Any]) -> StoredItem:
    """An item of an answer."""
    return StoredItem(id=one["id"], sha256=one["sha256"], metadata=one["metadata"], source=one.get("source"))


def failure_of(one: Mapping[str, Any]) -> Failure:
    """The error in the place of an item of an answer."""
    error = one["error"]
    return Failure(
        code=error["code"], title=error["title"], limit=error.get("limit"), actual=error.get("actual")
    )
