"""Where `dino-serve index add` sends pictures: to a running service, or through an engine in this process."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.adding import Addition, embed_patiently, make_items
from app.client import DEFAULT_URL, Client, NoService, ServiceRefused
from app.client.items import Added, Failure, StoredItem, Upload
from app.errors import FingerprintMismatch, StorageError, UnknownCollection
from app.indexing import BatchRefused, RequestLimits
from app.inference.config import Backend, InferenceConfig
from app.inference.engine import Engine
from app.inference.results import ImageFailure
from app.inference.threads import cpu_budget
from app.search.collection import Catalogue, Collection, Item
from app.search.embedded.library import Collections
from dino_core.bundle import load_bundle

# Statuses that speak of what is in the request, and not of the service: too large, an item that can't be, or
# a picture that our code has a fault with, or too much for one answer. All but one of the batch may pass.
_ABOUT_THE_BATCH: Final = (413, 422, 500, 504)
_ABSENCE_S: Final = 300.0  # a service that is started again, with a large collection, is back by then


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
        there = client.collection(collection) or client.create_collection(collection)
        if not there.searchable:
            sentence = _another_models(collection, there.fingerprint, info.fingerprint)
            raise ServiceRefused(status=409, code=FingerprintMismatch.code, detail=sentence)

    @property
    def description(self) -> str:
        """Where that is, for people."""
        return self._description

    @property
    def limits(self) -> RequestLimits:
        """What the service takes at once."""
        return self._limits

    def stored(self, ids: Sequence[str]) -> list[StoredItem | None]:
        """The items that are there, in the order of their ids."""
        return self._client.get(self._collection, ids)

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
        workers: For disk and thumbnails.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        collection: Collection,
        workers: ThreadPoolExecutor,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._collection = collection
        self._workers = workers

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

    def stored(self, ids: Sequence[str]) -> list[StoredItem | None]:
        """The items that are there, in the order of their ids."""
        return [
            None
            if item is None
            else StoredItem(id=item.id, sha256=item.sha256, metadata=item.metadata, source=item.source)
            for item in self._collection.get(ids)
        ]

    def add(self, uploads: Sequence[Upload]) -> list[Added | Failure]:
        """Embeds pictures, makes their thumbnails, and writes them."""
        made = asyncio.run_coroutine_threadsafe(self._make(uploads), self._loop).result()
        items = [item for item in made if isinstance(item, Item)]
        statuses = iter(self._collection.upsert(items, fingerprint=self._engine.model.fingerprint))
        return [
            _failure(item) if isinstance(item, ImageFailure) else Added(id=item.id, status=next(statuses))
            for item in made
        ]

    async def _make(self, uploads: Sequence[Upload]) -> list[Item | ImageFailure]:
        additions = [
            Addition(id=one.id, content=one.data, metadata=dict(one.metadata), source=one.source)
            for one in uploads
        ]
        return await make_items(
            additions,
            collection=self._collection,
            embed=lambda images: embed_patiently(self._engine, images),
            workers=self._workers,
            limits=self._engine.config.limits,
        )


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
        backend: What computes on a CPU, without a service.
    """

    server: str | None = None
    api_key: str | None = None
    data_dir: Path = Path("data")
    model: Path = Path("models/default")
    device: str = "cpu"
    backend: Backend = "torch"


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
            client.info()  # it must be there now; later it may be started again meanwhile
            patient = Client(client.base_url, api_key=place.api_key, absence_s=_ABSENCE_S)
            yield ServiceSink(stack.enter_context(patient), collection)
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


def open_directory(place: Place) -> Collections:
    """The place's directory, which must be there: for those who find no service and have no pictures to add.

    Raises:
        StorageError: It isn't there, or can't be used; so DirectoryInUse.
    """
    if not place.data_dir.is_dir():
        raise StorageError(
            f"no service runs at the default address, and there is no directory {place.data_dir}: "
            "name one of the two"
        )
    return Collections.open(place.data_dir)


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
        engine = Engine(
            load_bundle(place.model, device=place.device),
            InferenceConfig(backend=place.backend, timeout_s=None),
        )
        collection = _collection_for(engine, catalogue, name)
        loop = stack.enter_context(_running_loop())
        asyncio.run_coroutine_threadsafe(engine.start(), loop).result()
        stack.callback(lambda: asyncio.run_coroutine_threadsafe(engine.stop(), loop).result())
        workers = stack.enter_context(ThreadPoolExecutor(2 * cpu_budget(), thread_name_prefix="index-worker"))
        yield EngineSink(engine, loop, collection, workers)


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


def _failure(result: ImageFailure) -> Failure:
    return Failure(code=result.code, title=result.title, limit=result.limit, actual=result.actual)
