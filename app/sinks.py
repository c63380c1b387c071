"""Where `dino-serve index add` sends pictures: to a running service, or through an engine in this process."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.client import DEFAULT_URL, Added, Client, Failure, NoService, ServiceRefused, Upload
from app.errors import FingerprintMismatch, InvalidItem, Overloaded, TooLarge, UnknownCollection
from app.indexing import BatchRefused, RequestLimits
from app.inference.config import InferenceConfig
from app.inference.engine import Engine
from app.inference.results import ImageEmbedding, ImageFailure
from app.search.collection import Catalogue, Collection, Item
from app.search.library import Collections
from app.thumbnails import make_thumbnail
from dino_core.bundle import load_bundle
from dino_core.errors import ImageError

_PAGE_ITEMS: Final = 1_000
# Statuses that speak of what is in the request, and not of the service: too large, or an item that can't be.
_ABOUT_THE_BATCH: Final = (413, 422)


class ServiceSink:
    """A collection of a running service.

    Args:
        client: Of the service.
        collection: Made if it isn't there.

    Raises:
        NoService: Nobody answers.
        ServiceRefused: It wants an API key, or the collection is another model's.
    """

    def __init__(self, client: Client, collection: str) -> None:
        self._client = client
        self._collection = collection
        info = client.info()
        self._limits = RequestLimits(
            images=info.max_images, request_bytes=info.max_request_bytes, image_bytes=info.max_image_bytes
        )
        self._description = f"collection {collection!r} of {client.base_url} (model {info.model_id})"
        there = {summary.name: summary for summary in client.collections()}
        if collection not in there:
            client.create_collection(collection)
        elif not there[collection].searchable:
            sentence = _another_models(collection, there[collection].fingerprint, info.fingerprint)
            raise ServiceRefused(status=409, code=FingerprintMismatch.code, detail=sentence)

    @property
    def description(self) -> str:
        """Where that is, for people."""
        return self._description

    @property
    def limits(self) -> RequestLimits:
        """What the service takes at once."""
        return self._limits

    def known(self) -> dict[str, str]:
        """Of everything that is there, id -> SHA-256."""
        return {item.id: item.sha256 for item in self._client.items(self._collection)}

    def add(self, uploads: Sequence[Upload]) -> list[Added | Failure]:
        """Sends one request."""
        try:
            return self._client.add(self._collection, uploads)
        except ServiceRefused as refused:
            if refused.status in _ABOUT_THE_BATCH:
                raise BatchRefused(Failure(code=refused.code, title=refused.detail)) from None
            raise


class EngineSink:
    """A collection of a directory, with the model in this process.

    Args:
        engine: Started; on `loop`.
        loop: Runs in another thread.
        collection: Of the engine's model.
        thumbnail_threads: Where thumbnails are made.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        collection: Collection,
        thumbnail_threads: ThreadPoolExecutor,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._collection = collection
        self._thumbnail_threads = thumbnail_threads

    @property
    def description(self) -> str:
        """Where that is, for people."""
        return f"collection {self._collection.name!r}, in this process (model {self._engine.model.id})"

    @property
    def limits(self) -> RequestLimits:
        """What the engine takes at once."""
        config = self._engine.config
        return RequestLimits(
            images=config.max_images_per_request,
            request_bytes=config.max_bytes_in_flight,
            image_bytes=config.max_image_bytes,
        )

    def known(self) -> dict[str, str]:
        """Of everything that is there, id -> SHA-256."""
        return dict(_ids_and_hashes(self._collection))

    def add(self, uploads: Sequence[Upload]) -> list[Added | Failure]:
        """Embeds pictures, makes their thumbnails, and writes them."""
        thumbnails = [self._thumbnail_threads.submit(_thumbnail, upload.data) for upload in uploads]
        try:
            results = asyncio.run_coroutine_threadsafe(
                self._embed([upload.data for upload in uploads]), self._loop
            ).result()
        except TooLarge as error:
            raise BatchRefused(
                Failure(code=error.code, title=error.title, limit=error.limit, actual=error.actual)
            ) from None
        items = {
            index: Item(
                id=upload.id,
                vector=result.embedding,
                metadata=dict(upload.metadata),
                sha256=result.sha256,
                source=upload.source,
                thumbnail=thumbnail.result(),
            )
            for index, (upload, result, thumbnail) in enumerate(
                zip(uploads, results, thumbnails, strict=True)
            )
            if isinstance(result, ImageEmbedding)
        }
        try:
            statuses = self._collection.upsert(
                list(items.values()), fingerprint=self._engine.model.fingerprint
            )
        except InvalidItem as error:
            raise BatchRefused(Failure(code=error.code, title=error.title)) from None
        added = dict(zip(items, statuses, strict=True))
        return [
            _failure(result)
            if isinstance(result, ImageFailure)
            else Added(id=uploads[index].id, status=added[index])
            for index, result in enumerate(results)
        ]

    async def _embed(self, images: list[bytes]) -> list[ImageEmbedding | ImageFailure]:
        while True:
            try:
                return await self._engine.embed(images)
            except Overloaded as busy:
                await asyncio.sleep(busy.retry_after_s)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where collections are: at a running service, or in a directory that the model in this process fills.

    Attributes:
        server: A service's address. None: one at the default address, if it is there, and otherwise this
            process. An address that was named must answer: pictures never go elsewhere than they were sent.
        api_key: For the service.
        data_dir: Of collections, without a service.
        model: A bundle, without a service.
        device: Without a service.
    """

    server: str | None = None
    api_key: str | None = None
    data_dir: Path = Path("data")
    model: Path = Path("models/default")
    device: str = "cpu"


@contextlib.contextmanager
def open_sink(place: Place, *, collection: str) -> Iterator[ServiceSink | EngineSink]:
    """A running service if there is one, and otherwise the engine in this process.

    Args:
        place: See there.
        collection: Made if it isn't there.

    Raises:
        NoService: Nobody answers at the address that was named.
        ServiceRefused: The service wants an API key, or the collection is another model's.
        DirectoryInUse: There is no service at the default address, but another process has the directory.
        StorageError: The directory can't be used.
        BundleError: The model can't be loaded.
        FingerprintMismatch: The directory's collection is another model's.
    """
    with contextlib.ExitStack() as stack:
        client = service_at(place, stack)
        if client is not None:
            yield ServiceSink(client, collection)
        else:
            yield stack.enter_context(_open_engine_sink(place, collection))


def service_at(place: Place, stack: contextlib.ExitStack) -> Client | None:
    """The place's service; None where none was named and none is at the default address.

    Args:
        place: See there.
        stack: Closes the client.
    """
    client = stack.enter_context(Client(place.server or DEFAULT_URL, api_key=place.api_key))
    return client if place.server is not None or _answers(client) else None


def _answers(client: Client) -> bool:
    try:
        client.info(retry=False)
    except NoService:
        return False
    except ServiceRefused:
        return True  # it is there, and says what it wants when it is asked in earnest
    return True


@contextlib.contextmanager
def _open_engine_sink(place: Place, name: str) -> Iterator[EngineSink]:
    with contextlib.ExitStack() as stack:
        catalogue = stack.enter_context(Collections.open(place.data_dir))
        engine = Engine(load_bundle(place.model, device=place.device), InferenceConfig(timeout_s=None))
        collection = _collection_for(engine, catalogue, name)
        loop = stack.enter_context(_running_loop())
        asyncio.run_coroutine_threadsafe(engine.start(), loop).result()
        stack.callback(lambda: asyncio.run_coroutine_threadsafe(engine.stop(), loop).result())
        threads = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="thumbnail"))
        yield EngineSink(engine, loop, collection, threads)


def _collection_for(engine: Engine, catalogue: Catalogue, name: str) -> Collection:
    model = engine.model
    try:
        collection = catalogue.get(name)
    except UnknownCollection:
        return catalogue.create(name, fingerprint=model.fingerprint, dimensions=model.dimensions)
    if collection.fingerprint != model.fingerprint:
        sentence = _another_models(name, collection.fingerprint, model.fingerprint)
        raise FingerprintMismatch(sentence, expected=collection.fingerprint, found=model.fingerprint)
    return collection


def _another_models(name: str, expected: str, found: str) -> str:
    return (
        f"collection {name!r} holds vectors of the model {expected}, and the model here is {found}: "
        "name another collection, or use that model"
    )


@contextlib.contextmanager
def _running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine-loop")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _ids_and_hashes(collection: Collection) -> Iterator[tuple[str, str]]:
    cursor: str | None = None
    while True:
        page = collection.scroll(cursor=cursor, limit=_PAGE_ITEMS)
        yield from ((item.id, item.sha256) for item in page.items)
        cursor = page.next_cursor
        if cursor is None:
            return


def _thumbnail(data: bytes) -> bytes | None:
    try:
        return make_thumbnail(data)
    except ImageError:
        return None  # the picture's own failure is the engine's to tell


def _failure(result: ImageFailure) -> Failure:
    return Failure(code=result.code, title=result.title, limit=result.limit, actual=result.actual)
