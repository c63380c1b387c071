"""What a client asks of collections and their items, as calls."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote

import httpx

from app.client.calls import Call, json_of, not_ours
from app.client.images import image_parts
from app.client.items import (
    LINES_MEDIA_TYPE,
    Added,
    Failure,
    StoredItem,
    Upload,
    bodies_of,
    failure_of,
    stored_of,
)
from app.search.collection import Json

_PAGE_ITEMS: Final = 1_000


@dataclass(frozen=True, kw_only=True)
class CollectionSummary:
    """A collection as a service lists it.

    Attributes:
        searchable: Whether it holds vectors of the model that is served.
    """

    name: str
    fingerprint: str
    dimensions: int
    items: int
    searchable: bool


def path_of(collection: str) -> str:
    """Of a collection's routes."""
    return f"/collections/{quote(collection, safe='')}"


def listed() -> Call[list[CollectionSummary]]:
    """Asks for all collections."""
    return Call(
        method="GET",
        path="/collections",
        read=lambda response: [_summary(one) for one in json_of(response)["data"]],
    )


def one(name: str) -> Call[CollectionSummary]:
    """Asks for the collection of a name or an alias."""
    return Call(method="GET", path=path_of(name), read=lambda response: _summary(json_of(response)))


def created(name: str) -> Call[CollectionSummary]:
    """Makes an empty collection. Sent twice it would be refused, as the name is taken."""
    return Call(
        method="POST",
        path="/collections",
        read=lambda response: _summary(json_of(response)),
        request={"json": {"name": name}},
        repeatable=False,
    )


def dropped(name: str) -> Call[None]:
    """Deletes a collection. Sent twice it would be refused, as there is none."""
    return Call(method="DELETE", path=path_of(name), read=_nothing, repeatable=False)


def added(collection: str, uploads: Sequence[Upload]) -> Call[list[Added | Failure]]:
    """Adds images in one request.

    Raises:
        ValueError: Some uploads have a source and some have none.
    """
    form: dict[str, list[str]] = {
        "ids": [upload.id for upload in uploads],
        "metadata": [json.dumps(upload.metadata, ensure_ascii=False) for upload in uploads],
    }
    sources = [upload.source for upload in uploads if upload.source is not None]
    if sources and len(sources) != len(uploads):
        raise ValueError("some uploads have a source and some have none: give one to all, or to none")
    if sources:
        form["sources"] = sources
    return Call(
        method="POST",
        path=f"{path_of(collection)}/items",
        read=lambda response: [_added(one) for one in json_of(response)["data"]],
        request={
            "params": {"on_error": "item"},
            "files": image_parts(upload.data for upload in uploads),
            "data": form,
        },
        embeds=True,
    )


def added_lines(
    collection: str, lines: Iterable[bytes], *, params: Mapping[str, str]
) -> Iterator[Call[list[Added | Failure]]]:
    """Adds lines of NDJSON: requests of some lines, as httpx sends a whole body before it reads an answer.

    One that broke is sent again as a whole, which changes nothing.
    """
    for count, body in bodies_of(lines):
        yield Call(
            method="POST",
            path=f"{path_of(collection)}/items",
            read=partial(_added_lines, count=count),
            request={
                "params": dict(params),
                "content": body,
                "headers": {"Content-Type": LINES_MEDIA_TYPE},
            },
        )


def got(collection: str, ids: Sequence[str]) -> Call[list[StoredItem | None]]:
    """Asks for items by id."""
    return Call(
        method="POST",
        path=f"{path_of(collection)}/items/get",
        read=lambda response: [None if one is None else stored_of(one) for one in json_of(response)["data"]],
        request={"json": {"ids": list(ids)}},
    )


def deleted(
    collection: str,
    *,
    ids: Sequence[str] | None,
    filter: Mapping[str, Json] | None,
    dry_run: bool,
) -> Call[int]:
    """Deletes items."""
    asked: dict[str, Any] = {"dry_run": dry_run} | ({} if ids is None else {"ids": list(ids)})
    asked |= {} if filter is None else {"filter": dict(filter)}
    return Call(
        method="POST",
        path=f"{path_of(collection)}/items/delete",
        read=lambda response: int(json_of(response)["deleted"]),
        request={"json": asked},
    )


def undeleted(collection: str, ids: Sequence[str]) -> Call[int]:
    """Brings deleted items back."""
    return Call(
        method="POST",
        path=f"{path_of(collection)}/items/undelete",
        read=lambda response: int(json_of(response)["undeleted"]),
        request={"json": {"ids": list(ids)}},
    )


def page(collection: str, cursor: str | None) -> Call[tuple[list[StoredItem], str | None]]:
    """Asks for a page of items, and where the next begins."""
    return Call(
        method="GET",
        path=f"{path_of(collection)}/items",
        read=_page_of,
        request={"params": {"limit": _PAGE_ITEMS} | ({} if cursor is None else {"cursor": cursor})},
    )


def counted(collection: str, filter: Mapping[str, Json] | None) -> Call[int]:
    """Asks how many items there are, or how many match."""
    return Call(
        method="POST",
        path=f"{path_of(collection)}/count",
        read=lambda response: int(json_of(response)["count"]),
        request={"json": {} if filter is None else {"filter": dict(filter)}},
    )


def _nothing(response: httpx.Response) -> None:
    json_of(response)


def _page_of(response: httpx.Response) -> tuple[list[StoredItem], str | None]:
    answer = json_of(response)
    return [stored_of(one) for one in answer["data"]], answer["next_cursor"]


def _added(one: Mapping[str, Any]) -> Added | Failure:
    return failure_of(one) if "error" in one else Added(id=one["id"], status=one["status"])


def _added_lines(response: httpx.Response, *, count: int) -> list[Added | Failure]:
    if not response.is_success:
        json_of(response)
    results = [json.loads(line) for line in response.content.splitlines()]
    if len(results) != count:
        raise not_ours(response, f"it answered {len(results)} of {count} lines")
    return [_added(one) for one in results]


def _summary(one: Mapping[str, Any]) -> CollectionSummary:
    return CollectionSummary(
        name=one["name"],
        fingerprint=one["fingerprint"],
        dimensions=one["dimensions"],
        items=one["items"],
        searchable=one["searchable"],
    )
