"""A small client of the service: one class, plain data in and out, no torch.

    with Client("http://127.0.0.1:8000") as client:
        (answer,) = client.embed([Path("cat.jpg")])
        neighbours = client.similar(Path("cat.jpg"), k=5)

It waits and tries again where the service asks for it (429 and 503, by Retry-After) and where a connection
broke: nothing here is done twice by being sent twice. What can go wrong:

    ClientError
    ├── NoService        nobody answers at the address, or not a dinoserve
    └── ServiceRefused   the service answered with an error; `code` says which
"""

import base64
import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, Unpack, cast
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt

from app.client_items import (
    LINES_MEDIA_TYPE,
    Added,
    Failure,
    NewVector,
    StoredItem,
    Upload,
    bodies_of,
    failure_of,
    item_line,
    stored_of,
)
from app.client_search import (
    Explained,
    Found,
    FoundGroup,
    Image,
    Options,
    Query,
    Row,
    body_of,
    bytes_of,
    explained_of,
    found_of,
    groups_of,
    parameters_of,
    vectors_text,
)
from app.search.collection import Json

DEFAULT_URL: Final = "http://127.0.0.1:8000"
_TRIES_WITHOUT_ANSWER: Final = 4
_FIRST_PAUSE_S: Final = 0.25  # doubles: 0.25, 0.5, 1 s
_LONGEST_PAUSE_S: Final = 2.0
_NO_CONTENT: Final = 204
_PAGE_ITEMS: Final = 1_000
_LONGEST_DEADLINE_S: Final = 600.0  # that the service takes

_Method = Literal["GET", "POST", "PUT", "DELETE"]


class ClientError(Exception):
    """The service could not be asked, or refused."""


class NoService(ClientError):
    """Nobody answers at the address, or somebody who is not a dinoserve."""


class ServiceRefused(ClientError):
    """The service answered with an error.

    Attributes:
        status: Of HTTP.
        code: Stable and machine-readable; empty where the answer was no problem of ours.
        detail: A sentence for people.
    """

    def __init__(self, *, status: int, code: str, detail: str) -> None:
        super().__init__(f"the service refused ({status} {code}): {detail}")
        self.status = status
        self.code = code
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class ServiceInfo:
    """Which model a service has, and what one request may ask of it."""

    model_id: str
    fingerprint: str
    dimensions: int
    max_images: int
    max_request_bytes: int
    max_image_bytes: int


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


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One image's embedding, float32 [D], and what its header says."""

    embedding: npt.NDArray[np.float32]
    width_px: int
    height_px: int
    format: str
    sha256: str


class Client:
    """Speaks with one service. Safe to use from many threads; close it, or use it as a context manager.

    Args:
        base_url: Say `http://127.0.0.1:8000`.
        api_key: Where the service wants one.
        timeout_s: For one answer; embedding a large request on a busy CPU takes a while.
        patience_s: How long in all to come back to a service that says it is busy.
        absence_s: How long to wait for a service that doesn't answer, beyond some tries: one that is started
            again is back by then.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        patience_s: float = 600.0,
        absence_s: float = 0.0,
    ) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.base_url = base_url.rstrip("/")
        self._patience_s = patience_s
        self._absence_s = absence_s
        # Told to the service, whose own default is for people who wait: a large request may take longer.
        self._deadline = {"timeout": min(timeout_s, _LONGEST_DEADLINE_S)}
        try:
            self._http = httpx.Client(
                base_url=self.base_url,
                headers=headers,
                timeout=httpx.Timeout(timeout_s, connect=5.0),
                limits=httpx.Limits(max_connections=64),
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise NoService(f"{base_url!r} is no address of a service: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def info(self, *, retry: bool = True) -> ServiceInfo:
        """Which model the service has, and its limits.

        Args:
            retry: Whether to wait for a service that does not answer yet.

        Raises:
            NoService: Nobody answers, or not a dinoserve.
            ServiceRefused: It wants an API key, say.
        """
        answer = self._ask("GET", "/info", retry=retry)
        try:
            model, limits = answer["model"], answer["limits"]
            return ServiceInfo(
                model_id=model["id"],
                fingerprint=model["fingerprint"],
                dimensions=model["dimensions"],
                max_images=limits["images_per_request"],
                max_request_bytes=limits["request_bytes"],
                max_image_bytes=limits["image_bytes"],
            )
        except (KeyError, TypeError):
            raise NoService(f"what answers at {self.base_url} is not a dinoserve") from None

    def collections(self) -> list[CollectionSummary]:
        """All collections, in order of name."""
        return [_summary(one) for one in self._ask("GET", "/collections")["data"]]

    def collection(self, name: str) -> CollectionSummary | None:
        """The collection of a name or an alias; None where there is none."""
        try:
            return _summary(self._ask("GET", path_of(name)))
        except ServiceRefused as refused:
            if refused.code == "unknown_collection":
                return None
            raise

    def create_collection(self, name: str) -> CollectionSummary:
        """Makes an empty collection for the served model's embeddings.

        Raises:
            ServiceRefused: The name is taken, or is no name.
        """
        return _summary(self._ask("POST", "/collections", json={"name": name}))

    def drop_collection(self, name: str) -> None:
        """Deletes a collection with all its items; there is no way back.

        Raises:
            ServiceRefused: There is none of the name.
        """
        self._ask("DELETE", path_of(name))

    def embed(self, images: Sequence[Image]) -> list[Embedded | Failure]:
        """Embeds images, each of which succeeds or fails for itself.

        Raises:
            OSError: A file can't be read.
            ServiceRefused: The request as a whole is refused, say for its size.
        """
        answer = self._ask(
            "POST",
            "/embed",
            params={"encoding": "base64", "on_error": "item", **self._deadline},
            files=_parts(map(bytes_of, images)),
        )
        return [failure_of(one) if "error" in one else _embedded(one) for one in answer["data"]]

    def add(self, collection: str, uploads: Sequence[Upload]) -> list[Added | Failure]:
        """Adds images to a collection, each of which succeeds or fails for itself.

        Raises:
            ServiceRefused: The request as a whole is refused, say by a collection of another model.
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
        answer = self._ask(
            "POST",
            f"{path_of(collection)}/items",
            params={"on_error": "item", **self._deadline},
            files=_parts(upload.data for upload in uploads),
            data=form,
        )
        return [
            failure_of(one) if "error" in one else Added(id=one["id"], status=one["status"])
            for one in answer["data"]
        ]

    def add_stream(self, collection: str, uploads: Iterable[Upload]) -> Iterator[Added | Failure]:
        """Adds any number of images in constant memory, and says of each, in order, what became of it.

        Raises:
            ServiceRefused: The collection is another model's, say.
        """
        return self._add_lines(collection, map(item_line, uploads), params={})

    def add_vectors(
        self, collection: str, vectors: Iterable[NewVector], *, fingerprint: str
    ) -> Iterator[Added | Failure]:
        """Adds any number of embeddings in constant memory, and says of each, in order, what became of it.

        Args:
            collection: Of the model that made them.
            vectors: With what is to be kept beside them.
            fingerprint: Of that model.

        Raises:
            ServiceRefused: The collection is another model's, say.
        """
        return self._add_lines(collection, map(item_line, vectors), params={"fingerprint": fingerprint})

    def _add_lines(
        self, collection: str, lines: Iterable[bytes], *, params: dict[str, str]
    ) -> Iterator[Added | Failure]:
        # Requests of some lines, as httpx sends a whole body before it reads an answer; one that broke is
        # sent again as a whole, which changes nothing.
        for count, body in bodies_of(lines):
            response = self._request(
                "POST",
                f"{path_of(collection)}/items",
                params=params,
                content=body,
                headers={"Content-Type": LINES_MEDIA_TYPE},
            )
            if not response.is_success:
                self._answer(response)
            results = [json.loads(line) for line in response.content.splitlines()]
            if len(results) != count:
                raise NoService(f"{self.base_url} answered {len(results)} of {count} lines")
            for one in results:
                yield failure_of(one) if "error" in one else Added(id=one["id"], status=one["status"])

    def get(self, collection: str, ids: Sequence[str]) -> list[StoredItem | None]:
        """Items by id, in order; None where there is none. At most 10,000."""
        answer = self._ask("POST", f"{path_of(collection)}/items/get", json={"ids": list(ids)})
        return [None if one is None else stored_of(one) for one in answer["data"]]

    def delete(
        self,
        collection: str,
        *,
        ids: Sequence[str] | None = None,
        filter: Mapping[str, Json] | None = None,
        dry_run: bool = False,
    ) -> int:
        """Deletes items by id, at most 10,000, or those whose metadata match; says how many there were.

        Args:
            collection: Whose.
            ids: Or a filter.
            filter: As `app.search.filters` says.
            dry_run: Only count them.

        Raises:
            ServiceRefused: The filter is malformed, say.
        """
        asked: dict[str, Any] = {"dry_run": dry_run} | ({} if ids is None else {"ids": list(ids)})
        asked |= {} if filter is None else {"filter": dict(filter)}
        return int(self._ask("POST", f"{path_of(collection)}/items/delete", json=asked)["deleted"])

    def undelete(self, collection: str, ids: Sequence[str]) -> int:
        """Brings deleted items back, within seven days, at most 10,000; says how many came."""
        answer = self._ask("POST", f"{path_of(collection)}/items/undelete", json={"ids": list(ids)})
        return int(answer["undeleted"])

    def items(self, collection: str) -> Iterator[StoredItem]:
        """All items of a collection, in order of id, asked for page by page."""
        cursor: str | None = None
        while True:
            params: dict[str, Any] = {"limit": _PAGE_ITEMS} | ({} if cursor is None else {"cursor": cursor})
            page = self._ask("GET", f"{path_of(collection)}/items", params=params)
            for one in page["data"]:
                yield stored_of(one)
            cursor = page["next_cursor"]
            if cursor is None:
                return

    def count(self, collection: str, *, filter: Mapping[str, Json] | None = None) -> int:
        """How many items a collection has, or how many of them match.

        Raises:
            ServiceRefused: There is no such collection, or the filter is malformed.
        """
        said = {} if filter is None else {"filter": dict(filter)}
        return int(self._ask("POST", f"{path_of(collection)}/count", json=said)["count"])

    def similar(self, image: Image | None = None, **query: Unpack[Query]) -> list[Found] | Failure:
        """The nearest items of an image, an item, an embedding, or of likes and dislikes.

            client.similar(Path("cat.jpg"), k=5, filter={"field": "album", "eq": "sea"})
            client.similar(id="cats/1.jpg", diversify=0.3)
            client.similar(positive=["cats/1.jpg", Path("cat.jpg")], negative=["dogs/1.jpg"])

        Args:
            image: A file or its bytes.
            **query: What to search by in place of an image, and how; see `app.client_search.Query`.

        Raises:
            OSError: A file can't be read.
            ServiceRefused: There is no such item or collection, or a parameter can't be.
        """
        (one,) = self._similar(image, query)["data"]
        return failure_of(one) if "error" in one else found_of(one["neighbours"])

    def similar_groups(
        self,
        group_by: str | Sequence[str],
        image: Image | None = None,
        *,
        group_size: int = 1,
        **query: Unpack[Query],
    ) -> list[FoundGroup] | Failure:
        """The best items of each value of a metadata field, in order of each value's best.

        Args:
            group_by: A path with dots, or its keys; items without the field are left out.
            image: As in `similar`.
            group_size: Items of each value; `k` counts the values.
            **query: As in `similar`.

        Raises:
            OSError: As `similar`, and so ServiceRefused.
        """
        keys = group_by if isinstance(group_by, str) else list(group_by)
        (one,) = self._similar(image, query, group_by=keys, group_size=group_size)["data"]
        return failure_of(one) if "error" in one else groups_of(one["groups"])

    def similar_each(
        self,
        *,
        images: Sequence[Image] = (),
        ids: Sequence[str] = (),
        vectors: Sequence[Row] | npt.NDArray[np.floating[Any]] = (),
        **options: Unpack[Options],
    ) -> list[list[Found] | Failure]:
        """The nearest items of several images, items or embeddings, asked for at once.

        Returns:
            An answer for each, in order; one that is unknown or no image has its own failure.

        Raises:
            OSError: A file can't be read.
            ServiceRefused: The request as a whole is refused.
        """
        body = body_of(cast(Query, options))
        if len(images):
            files = _parts(map(bytes_of, images))
            params = parameters_of(body) | {"on_error": "item", **self._deadline}
            answer = self._ask("POST", "/similar", params=params, files=files)
        else:
            by = {"id": list(ids)} if len(ids) else {"embedding": vectors_text(vectors)}
            answer = self._ask("POST", "/similar", json=body | by)
        return [failure_of(one) if "error" in one else found_of(one["neighbours"]) for one in answer["data"]]

    def explain(self, image: Image | None = None, **query: Unpack[Query]) -> Explained:
        """How a search is done, among how many items, and in which time; arguments as in `similar`.

        Raises:
            OSError: As `similar`, and so ServiceRefused.
        """
        return explained_of(self._similar(image, query, explain=True)["explain"])

    def _similar(self, image: Image | None, query: Query, **more: Any) -> Any:  # noqa: ANN401 - JSON
        body = body_of(query) | more
        if image is None:
            return self._ask("POST", "/similar", json=body)
        params = parameters_of(body) | {"on_error": "item", **self._deadline}
        return self._ask("POST", "/similar", params=params, files=_parts([bytes_of(image)]))

    def ask(self, method: _Method, path: str, *, retry: bool = True, **request: Any) -> Any:  # noqa: ANN401 - JSON, and httpx's arguments
        """One answer's JSON, of a route that has no method here; None where it has none.

        Args:
            method: Of HTTP.
            path: Say `/aliases`.
            retry: Whether it may be sent twice, to wait for a service that is away or busy.
            request: As httpx takes it.

        Raises:
            NoService: Nobody answers, or not a dinoserve.
            ServiceRefused: The service answered with an error.
        """
        return self._ask(method, path, retry=retry, **request)

    @contextlib.contextmanager
    def stream(self, path: str, **request: Any) -> Iterator[Iterator[bytes]]:  # noqa: ANN401 - httpx's arguments
        """An answer of any size, piece by piece, for as long as the block lasts.

        Raises:
            NoService: Nobody answers, or the connection broke before the end.
            ServiceRefused: The service answered with an error.
        """
        try:
            with self._http.stream("GET", path, **request) as response:
                if not response.is_success:
                    response.read()
                    self._answer(response)
                yield response.iter_bytes()
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise NoService(f"{self.base_url} did not answer to the end ({reason})") from None

    def _ask(self, method: _Method, path: str, *, retry: bool = True, **request: Any) -> Any:  # noqa: ANN401 - JSON, and httpx's arguments
        """One answer's JSON; None where it has none."""
        response = self._request(method, path, retry=retry, **request)
        return None if response.status_code == _NO_CONTENT else self._answer(response)

    def _request(self, method: _Method, path: str, *, retry: bool = True, **request: Any) -> httpx.Response:  # noqa: ANN401 - httpx's arguments
        """One answer, asked for again for as long as it makes sense."""
        began_s = time.monotonic()
        give_up_s = began_s + self._patience_s
        tries_left = _TRIES_WITHOUT_ANSWER if retry else 1
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                response = self._http.request(method, path, **request)
            except httpx.UnsupportedProtocol as error:
                raise NoService(f"{self.base_url!r} is no address of a service: {error}") from None
            except httpx.TransportError as error:
                tries_left -= 1
                is_overdue = not retry or time.monotonic() - began_s >= self._absence_s
                if tries_left <= 0 and is_overdue:
                    reason = str(error) or type(error).__name__
                    raise NoService(f"no service answers at {self.base_url} ({reason})") from None
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            wait_s = _asked_to_wait_s(response) if retry else None
            if wait_s is None or time.monotonic() + wait_s > give_up_s:
                return response
            time.sleep(wait_s)
            began_s = time.monotonic()  # it is there

    def _answer(self, response: httpx.Response) -> Any:  # noqa: ANN401 - JSON
        try:
            content = response.json()
        except ValueError:
            content = None
        if response.is_success and isinstance(content, dict):
            return content
        if isinstance(content, dict) and "code" in content:
            raise ServiceRefused(
                status=response.status_code, code=str(content["code"]), detail=str(content.get("detail", ""))
            )
        status = response.status_code
        raise NoService(f"what answers at {self.base_url} is not a dinoserve (status {status}, not our JSON)")


def _asked_to_wait_s(response: httpx.Response) -> float | None:
    """How long a busy service wants to be left alone; None where it isn't busy."""
    if response.status_code not in {429, 503}:
        return None
    try:
        if (milliseconds := response.headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1_000)
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _parts(images: Iterable[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("images", ("image", data, "application/octet-stream")) for data in images]


def path_of(collection: str) -> str:
    """Of a collection's routes."""
    return f"/collections/{quote(collection, safe='')}"


def _summary(one: Mapping[str, Any]) -> CollectionSummary:
    return CollectionSummary(
        name=one["name"],
        fingerprint=one["fingerprint"],
        dimensions=one["dimensions"],
        items=one["items"],
        searchable=one["searchable"],
    )


def _embedded(one: Mapping[str, Any]) -> Embedded:
    return Embedded(
        embedding=np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4").astype(np.float32),
        width_px=one["width"],
        height_px=one["height"],
        format=one["format"],
        sha256=one["sha256"],
    )
