"""Puts the parts together. Importing this does nothing: `create_app` is the one function that wires."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware import Middleware

from app.api import (
    admin,
    aliases,
    attention,
    collections,
    embed,
    embed_stream,
    health,
    info,
    items,
    many_items,
    openai,
    problems,
    reading,
    reindex,
    similar,
    snapshots,
    transfer,
)
from app.api.context import RequestContext
from app.api.direct import DirectRoutes
from app.api.guard import BodyLimit, EncodedItemPaths, Guard
from app.api.keys import KeyRing
from app.api.openapi import PROBLEM_RESPONSES, describe_problems
from app.api.pages import Pages, page_router
from app.api.scopes import check_scopes, require_scope
from app.api.state import Departure, State, expect_fingerprint
from app.api.urgency import read_urgency
from app.errors import CollectionExists, UnknownCollection
from app.fetching import Address, Fetcher, is_public
from app.inference.threads import cpu_budget
from app.reindex_jobs import ReindexJobs
from app.search.collection import Catalogue, Collection
from app.search.embedded.library import Collections
from app.search.embedded.snapshot_files import SNAPSHOTS_FOLDER, Snapshots
from app.search.reading.jobs import ReadingJobs
from app.served_models import ServedModels
from app.settings import Settings
from app.telemetry import Metrics
from app.tracing import Tracing

DEFAULT_COLLECTION = "default"

_RESOURCES = (
    admin,
    embed,
    similar,
    collections,
    many_items,
    items,
    transfer,
    reindex,
    aliases,
    snapshots,
    reading,
    info,
    openai,
    embed_stream,
    attention,
)

logger = logging.getLogger(__name__)


def create_app(
    settings: Settings,
    models: ServedModels,
    catalogue: Catalogue,
    *,
    metrics: Metrics | None = None,
    tracing: Tracing | None = None,
    departure: Departure | None = None,
    fetches_from: Callable[[Address], bool] = is_public,
) -> FastAPI:
    """Makes the service of one model or several.

    Args:
        settings: Of the service.
        models: Not started; the app starts and stops them.
        catalogue: Open; who opened it closes it.
        metrics: Those that the engines observe into; None for new ones without the engines'.
        tracing: Where spans go; who made it closes it. None: there are none.
        departure: That the server announces; None: it leaves unannounced.
        fetches_from: The addresses that images by URL may have; another than the default is for tests.

    Raises:
        SettingsInvalid: The file of API keys can't be used.
    """
    metrics = metrics or Metrics()
    metrics.serves(models.present)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with _running(
            settings,
            models,
            catalogue,
            metrics=metrics,
            departure=departure or Departure(),
            fetcher=_fetcher(settings, fetches_from),
        ) as state:
            yield state

    app = FastAPI(
        title="dinoserve",
        version=version("dinoserve"),
        description="Embeds pictures with a self-supervised teacher, and finds those that are alike.",
        lifespan=lifespan,
        docs_url=None,  # ours is at /docs, without assets from other hosts
        redoc_url=None,
        redirect_slashes=False,  # a client that doesn't follow would take the empty answer for ours
        responses=PROBLEM_RESPONSES,
        middleware=[
            Middleware(RequestContext, metrics=metrics, models=models, tracing=tracing),
            Middleware(
                Guard,
                settings=settings,
                keys=KeyRing(settings.api_key_file),
            ),
            Middleware(
                BodyLimit,
                max_bytes=settings.max_request_bytes,
                max_import_bytes=settings.max_import_bytes,
            ),
            Middleware(EncodedItemPaths),
            Middleware(DirectRoutes, routes=_direct_routes()),
        ],
    )
    problems.install(app)
    api = APIRouter(dependencies=[Depends(require_scope), Depends(expect_fingerprint), Depends(read_urgency)])
    for resource in _RESOURCES:
        check_scopes(resource.router.routes)
        api.include_router(resource.router)
    app.include_router(api)
    app.include_router(health.router)
    app.include_router(page_router(Pages()))
    describe_problems(app)
    return app


def _direct_routes() -> list[APIRoute]:
    """Those that are asked for pictures by the thousand."""
    asked = ((embed, "/embed"), (similar, "/similar"), (openai, "/v1/embeddings"))
    return [
        route
        for resource, path in asked
        for route in resource.router.routes
        if isinstance(route, APIRoute) and route.path == path
    ]


@asynccontextmanager
async def _running(
    settings: Settings,
    models: ServedModels,
    catalogue: Catalogue,
    *,
    metrics: Metrics,
    departure: Departure,
    fetcher: Fetcher | None,
) -> AsyncIterator[State]:
    """What lives from start to stop."""
    ensure_default_collection(catalogue, models)
    await models.start()
    # Twice the cores: half of this work waits for the disk.
    workers = ThreadPoolExecutor(2 * cpu_budget(), thread_name_prefix="dino-worker")
    bulk = ThreadPoolExecutor(1, thread_name_prefix="dino-bulk")
    loop = asyncio.get_running_loop()
    reindex_jobs = ReindexJobs(catalogue, models, loop)
    reading_jobs = ReadingJobs(
        catalogue, folder=_reading_folder(settings, catalogue), threads=max(1, cpu_budget() // 2)
    )
    try:
        yield State(
            settings=settings,
            models=models,
            catalogue=catalogue,
            metrics=metrics,
            workers=workers,
            bulk=bulk,
            snapshots=Snapshots(settings.data_dir / SNAPSHOTS_FOLDER),
            reindex_jobs=reindex_jobs,
            reading=reading_jobs,
            departure=departure,
            fetcher=fetcher,
        )
    finally:
        # Each may wait for what it does; what is under way elsewhere needs the loop meanwhile.
        await loop.run_in_executor(None, reindex_jobs.stop)  # before the engines, which it needs
        await models.stop()
        if fetcher is not None:
            await fetcher.close()
        await loop.run_in_executor(None, bulk.shutdown)
        await loop.run_in_executor(None, reading_jobs.close)
        workers.shutdown()


def _fetcher(settings: Settings, fetches_from: Callable[[Address], bool]) -> Fetcher | None:
    """Of images by URL; None where they aren't taken."""
    if not settings.allow_url_inputs:
        return None
    return Fetcher(
        max_image_bytes=settings.max_image_bytes,
        max_request_bytes=settings.max_request_bytes,
        max_wait_s=settings.upload_timeout_s,  # as for a body that brings the images itself
        hosts=settings.url_hosts,
        allows=fetches_from,
    )


def _reading_folder(settings: Settings, catalogue: Catalogue) -> Path | None:
    """Where maps and the like are kept: in the data directory, if it is this process's."""
    return settings.data_dir / "derived" / "reading" if isinstance(catalogue, Collections) else None


def ensure_default_collection(catalogue: Catalogue, models: ServedModels) -> Collection:
    """The collection `default`, made for the default model where there is none.

    One that holds another model's embeddings stays as it is: searches in it are refused, and say what to do.
    """
    model = models.get().info
    try:
        collection = catalogue.get(DEFAULT_COLLECTION)
    except UnknownCollection:
        # Another service on the same search server may start at this moment.
        with contextlib.suppress(CollectionExists):
            return catalogue.create(
                DEFAULT_COLLECTION, fingerprint=model.fingerprint, dimensions=model.dimensions
            )
        collection = catalogue.get(DEFAULT_COLLECTION)
    if collection.fingerprint not in models.fingerprints:
        logger.warning(
            "collection %r holds embeddings of another model (%s): /embed works, searching it answers 409 "
            "until POST /collections/%s/reindex has made them anew",
            DEFAULT_COLLECTION,
            collection.fingerprint,
            DEFAULT_COLLECTION,
        )
    return collection
