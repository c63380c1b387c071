"""`Client`: the service for code that waits.

Dimension key: B images · H W pixels · D embedding
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import httpx
import numpy as np
import numpy.typing as npt

from app.client import collections, embedding, info, search
from app.client.calls import Call, Method, Patience, json_of
from app.client.collections import CollectionSummary
from app.client.embedding import Embedded
from app.client.errors import NoService, NotFound
from app.client.images import Image, pictures_below
from app.client.info import ServiceInfo
from app.client.items import Added, Failure, NewVector, StoredItem, Upload, item_line
from app.client.pipeline import pipelined
from app.client.search import Explained, Found, FoundGroup, Options, Query, Row
from app.client.transport import BlockingTransport, Connecting, Priority
from app.search.collection import Json


class Client:
    """Speaks with one service. Safe to use from many threads; close it, or use it as a context manager.

    It waits and asks again where the service says when (429 and 503), and where nobody answers. Where a
    connection broke it asks again only what can't be done twice by being sent twice.

    Args:
        base_url: Say `http://127.0.0.1:8000`, which is the default; None also looks at DINO_SERVE_URL.
        api_key: Where the service wants one; None also looks at DINO_SERVE_API_KEY.
        timeout_s: For one answer; embedding a large request on a busy CPU takes a while.
        patience_s: How long in all to come back to a service that says it is busy.
        absence_s: How long to wait for a service that doesn't answer, beyond some tries: one that is started
            again is back by then.
        priority: Of what embeds: "interactive" or "bulk"; None leaves it to the service.
        model: Which of the service's models embeds; None leaves it to the service.

    Raises:
        NoService: The address is none.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        patience_s: float = 600.0,
        absence_s: float = 0.0,
        priority: Priority | None = None,
        model: str | None = None,
    ) -> None:
        self._transport = BlockingTransport(
            Connecting(
                base_url=base_url,
                api_key=api_key,
                timeout_s=timeout_s,
                patience=Patience(busy_s=patience_s, absence_s=absence_s),
                priority=priority,
                model=model,
            )
        )
        self.base_url = self._transport.connecting.url
        self._do = self._transport.do

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
        self._transport.http.close()

    def info(self, *, retry: bool = True) -> ServiceInfo:
        """Which model the service has, and its limits.

        Args:
            retry: Whether to wait for a service that does not answer yet.

        Raises:
            NoService: Nobody answers, or not a dinoserve.
            ServiceRefused: It wants an API key, say.
        """
        return self._do(info.info(retry=retry))

    def embed(self, images: Sequence[Image]) -> list[Embedded | Failure]:
        """Embeds images in one request, each of which succeeds or fails for itself.

        Raises:
            OSError: A file can't be read.
            ServiceRefused: The request as a whole is refused, say for its size.
        """
        return self._do(embedding.embed(images))

    def embed_array(self, images: Sequence[Image]) -> npt.NDArray[np.float32]:
        """Embeds images in one request: float32 [B, D], NaN in the rows of images that have none.

        Raises:
            OSError: A file can't be read.
            ServiceRefused: As `embed`.
        """
        return self._do(embedding.embed_array(images))

    def embed_pixels(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Embeds pictures that are decoded, resized and cropped already; otherwise as `embed_array`.

        Args:
            pixels_BHWC: uint8, RGB, of the model's size.
        """
        return self._do(embedding.embed_pixels(pixels_BHWC))

    def embed_many(
        self, images: Iterable[Image], *, images_per_request: int = 16, in_flight: int = 4
    ) -> Iterator[Embedded | Failure]:
        """Embeds any number of images, in order, with several requests under way and bounded memory.

        Args:
            images: Files are read when their turn comes; one that can't be read is a failure of its own.
            images_per_request: At most; fewer where files are large.
            in_flight: Requests that are under way, or answered and not taken yet.

        Raises:
            ServiceRefused: A request as a whole is refused.
        """
        batches = embedding.batches_of(images, most=images_per_request)
        for answers in pipelined(self._embed_batch, batches, in_flight=in_flight):
            yield from answers

    def embed_folder(
        self, folder: Path, *, images_per_request: int = 16, in_flight: int = 4
    ) -> Iterator[tuple[Path, Embedded | Failure]]:
        """Embeds the pictures in a folder and below it, in order of path; arguments as in `embed_many`.

        Raises:
            NotADirectoryError: It is no folder.
            ServiceRefused: A request as a whole is refused.
        """
        paths = pictures_below(folder)
        answers = self.embed_many(paths, images_per_request=images_per_request, in_flight=in_flight)
        return zip(paths, answers, strict=True)

    def similar(self, image: Image | None = None, **query: Unpack[Query]) -> list[Found] | Failure:
        """The nearest items of an image, an item, an embedding, or of likes and dislikes.

            client.similar(Path("cat.jpg"), k=5, filter={"field": "album", "eq": "sea"})
            client.similar(id="cats/1.jpg", diversify=0.3)
            client.similar(positive=["cats/1.jpg", Path("cat.jpg")], negative=["dogs/1.jpg"])

        Args:
            image: A file or its bytes.
            **query: What to search by in place of an image, and how; see `app.client.search.Query`.

        Raises:
            OSError: A file can't be read.
            ServiceRefused: There is no such item or collection, or a parameter can't be.
        """
        return self._do(search.similar(image, query))

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
        return self._do(search.similar_groups(group_by, image, query, group_size=group_size))

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
        return self._do(search.similar_each(images, ids, vectors, options))

    def explain(self, image: Image | None = None, **query: Unpack[Query]) -> Explained:
        """How a search is done, among how many items, and in which time; arguments as in `similar`.

        Raises:
            OSError: As `similar`, and so ServiceRefused.
        """
        return self._do(search.explain(image, query))

    def collections(self) -> list[CollectionSummary]:
        """All collections, in order of name."""
        return self._do(collections.listed())

    def collection(self, name: str) -> CollectionSummary | None:
        """The collection of a name or an alias; None where there is none."""
        try:
            return self._do(collections.one(name))
        except NotFound as refused:
            if refused.code == "unknown_collection":
                return None
            raise

    def create_collection(self, name: str) -> CollectionSummary:
        """Makes an empty collection for the served model's embeddings.

        Raises:
            ServiceRefused: The name is taken, or is no name.
        """
        return self._do(collections.created(name))

    def drop_collection(self, name: str) -> None:
        """Deletes a collection with all its items; there is no way back.

        Raises:
            ServiceRefused: There is none of the name.
        """
        self._do(collections.dropped(name))

    def add(self, collection: str, uploads: Sequence[Upload]) -> list[Added | Failure]:
        """Adds images to a collection, each of which succeeds or fails for itself.

        Raises:
            ServiceRefused: The request as a whole is refused, say by a collection of another model.
        """
        return self._do(collections.added(collection, uploads))

    def add_stream(self, collection: str, uploads: Iterable[Upload]) -> Iterator[Added | Failure]:
        """Adds any number of images in constant memory, and says of each, in order, what became of it.

        Raises:
            ServiceRefused: The collection is another model's, say.
        """
        for call in collections.added_lines(collection, map(item_line, uploads), params={}):
            yield from self._do(call)

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
        params = {"fingerprint": fingerprint}
        for call in collections.added_lines(collection, map(item_line, vectors), params=params):
            yield from self._do(call)

    def get(self, collection: str, ids: Sequence[str]) -> list[StoredItem | None]:
        """Items by id, in order; None where there is none. At most 10,000."""
        return self._do(collections.got(collection, ids))

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
        return self._do(collections.deleted(collection, ids=ids, filter=filter, dry_run=dry_run))

    def undelete(self, collection: str, ids: Sequence[str]) -> int:
        """Brings deleted items back, within seven days, at most 10,000; says how many came."""
        return self._do(collections.undeleted(collection, ids))

    def items(self, collection: str) -> Iterator[StoredItem]:
        """All items of a collection, in order of id, asked for page by page."""
        page, cursor = self._do(collections.page(collection, None))
        yield from page
        while cursor is not None:
            page, cursor = self._do(collections.page(collection, cursor))
            yield from page

    def count(self, collection: str, *, filter: Mapping[str, Json] | None = None) -> int:
        """How many items a collection has, or how many of them match.

        Raises:
            ServiceRefused: There is no such collection, or the filter is malformed.
        """
        return self._do(collections.counted(collection, filter))

    def ask(self, method: Method, path: str, *, retry: bool = True, **request: Any) -> Any:  # noqa: ANN401 - JSON, and httpx's arguments
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
        return self._do(Call(method=method, path=path, read=json_of, request=request, retry=retry))

    @contextlib.contextmanager
    def stream(self, path: str, **request: Any) -> Iterator[Iterator[bytes]]:  # noqa: ANN401 - httpx's arguments
        """An answer of any size, piece by piece, for as long as the block lasts.

        Raises:
            NoService: Nobody answers, or the connection broke before the end.
            ServiceRefused: The service answered with an error.
        """
        try:
            with self._transport.http.stream("GET", path, **request) as response:
                if not response.is_success:
                    response.read()
                    json_of(response)
                yield response.iter_bytes()
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise NoService(f"{self.base_url} did not answer to the end ({reason})") from None

    def _embed_batch(self, batch: Sequence[bytes | Failure]) -> list[Embedded | Failure]:
        files = embedding.files_of(batch)
        return embedding.in_places(batch, self.embed(files) if files else [])
