"""`AsyncClient`: the service for asyncio. Its methods are those of `Client`, awaited.

Dimension key: B images · H W pixels · D embedding
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from app.client import collections, embedding, info, search
from app.client.calls import Call, Method, Patience, json_of
from app.client.collections import CollectionSummary
from app.client.embedding import Embedded
from app.client.errors import NotFound
from app.client.images import Image, pictures_below
from app.client.info import ServiceInfo
from app.client.items import Added, Failure, NewVector, StoredItem, Upload, item_line
from app.client.pipeline import pipelined_async
from app.client.search import Explained, Found, FoundGroup, Options, Query, Row
from app.client.transport import AsyncTransport, Connecting, Priority
from app.search.collection import Json


class AsyncClient:
    """Speaks with one service, on one event loop; close it, or use it as a context manager.

    Files are read on threads. Arguments and errors are those of `app.client.Client`.
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
        self._transport = AsyncTransport(
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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._transport.http.aclose()

    async def info(self, *, retry: bool = True) -> ServiceInfo:
        """See `Client.info`."""
        return await self._do(info.info(retry=retry))

    async def embed(self, images: Sequence[Image]) -> list[Embedded | Failure]:
        """See `Client.embed`."""
        return await self._do(await asyncio.to_thread(embedding.embed, images))

    async def embed_array(self, images: Sequence[Image]) -> npt.NDArray[np.float32]:
        """See `Client.embed_array`: float32 [B, D]."""
        return await self._do(await asyncio.to_thread(embedding.embed_array, images))

    async def embed_pixels(self, pixels_BHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """See `Client.embed_pixels`: float32 [B, D]."""
        return await self._do(embedding.embed_pixels(pixels_BHWC))

    async def embed_many(
        self, images: Iterable[Image], *, images_per_request: int = 16, in_flight: int = 4
    ) -> AsyncIterator[Embedded | Failure]:
        """See `Client.embed_many`."""
        batches = embedding.batches_of(images, most=images_per_request)
        async for answers in pipelined_async(self._embed_batch, batches, in_flight=in_flight):
            for answer in answers:
                yield answer

    async def embed_folder(
        self, folder: Path, *, images_per_request: int = 16, in_flight: int = 4
    ) -> AsyncIterator[tuple[Path, Embedded | Failure]]:
        """See `Client.embed_folder`."""
        paths = await asyncio.to_thread(pictures_below, folder)
        following = iter(paths)
        async for answer in self.embed_many(
            paths, images_per_request=images_per_request, in_flight=in_flight
        ):
            yield next(following), answer

    async def similar(self, image: Image | None = None, **query: Unpack[Query]) -> list[Found] | Failure:
        """See `Client.similar`."""
        return await self._do(await asyncio.to_thread(search.similar, image, query))

    async def similar_groups(
        self,
        group_by: str | Sequence[str],
        image: Image | None = None,
        *,
        group_size: int = 1,
        **query: Unpack[Query],
    ) -> list[FoundGroup] | Failure:
        """See `Client.similar_groups`."""
        call = await asyncio.to_thread(search.similar_groups, group_by, image, query, group_size=group_size)
        return await self._do(call)

    async def similar_each(
        self,
        *,
        images: Sequence[Image] = (),
        ids: Sequence[str] = (),
        vectors: Sequence[Row] | npt.NDArray[np.floating[Any]] = (),
        **options: Unpack[Options],
    ) -> list[list[Found] | Failure]:
        """See `Client.similar_each`."""
        return await self._do(await asyncio.to_thread(search.similar_each, images, ids, vectors, options))

    async def explain(self, image: Image | None = None, **query: Unpack[Query]) -> Explained:
        """See `Client.explain`."""
        return await self._do(await asyncio.to_thread(search.explain, image, query))

    async def collections(self) -> list[CollectionSummary]:
        """See `Client.collections`."""
        return await self._do(collections.listed())

    async def collection(self, name: str) -> CollectionSummary | None:
        """See `Client.collection`."""
        try:
            return await self._do(collections.one(name))
        except NotFound as refused:
            if refused.code == "unknown_collection":
                return None
            raise

    async def create_collection(self, name: str) -> CollectionSummary:
        """See `Client.create_collection`."""
        return await self._do(collections.created(name))

    async def drop_collection(self, name: str) -> None:
        """See `Client.drop_collection`."""
        await self._do(collections.dropped(name))

    async def add(self, collection: str, uploads: Sequence[Upload]) -> list[Added | Failure]:
        """See `Client.add`."""
        return await self._do(collections.added(collection, uploads))

    async def add_stream(self, collection: str, uploads: Iterable[Upload]) -> AsyncIterator[Added | Failure]:
        """See `Client.add_stream`."""
        for call in collections.added_lines(collection, map(item_line, uploads), params={}):
            for result in await self._do(call):
                yield result

    async def add_vectors(
        self, collection: str, vectors: Iterable[NewVector], *, fingerprint: str
    ) -> AsyncIterator[Added | Failure]:
        """See `Client.add_vectors`."""
        params = {"fingerprint": fingerprint}
        for call in collections.added_lines(collection, map(item_line, vectors), params=params):
            for result in await self._do(call):
                yield result

    async def get(self, collection: str, ids: Sequence[str]) -> list[StoredItem | None]:
        """See `Client.get`."""
        return await self._do(collections.got(collection, ids))

    async def delete(
        self,
        collection: str,
        *,
        ids: Sequence[str] | None = None,
        filter: Mapping[str, Json] | None = None,
        dry_run: bool = False,
    ) -> int:
        """See `Client.delete`."""
        return await self._do(collections.deleted(collection, ids=ids, filter=filter, dry_run=dry_run))

    async def undelete(self, collection: str, ids: Sequence[str]) -> int:
        """See `Client.undelete`."""
        return await self._do(collections.undeleted(collection, ids))

    async def items(self, collection: str) -> AsyncIterator[StoredItem]:
        """See `Client.items`."""
        page, cursor = await self._do(collections.page(collection, None))
        for item in page:
            yield item
        while cursor is not None:
            page, cursor = await self._do(collections.page(collection, cursor))
            for item in page:
                yield item

    async def count(self, collection: str, *, filter: Mapping[str, Json] | None = None) -> int:
        """See `Client.count`."""
        return await self._do(collections.counted(collection, filter))

    async def ask(self, method: Method, path: str, *, retry: bool = True, **request: Any) -> Any:  # noqa: ANN401 - JSON, and httpx's arguments
        """See `Client.ask`."""
        return await self._do(Call(method=method, path=path, read=json_of, request=request, retry=retry))

    async def _embed_batch(self, batch: Sequence[bytes | Failure]) -> list[Embedded | Failure]:
        files = embedding.files_of(batch)
        return embedding.in_places(batch, await self.embed(files) if files else [])
