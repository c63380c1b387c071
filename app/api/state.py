"""What lives from start to stop, as routes see it, and the small things that most routes need."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, NotRequired, ParamSpec, TypedDict, TypeVar, cast

from fastapi import Depends, Header, Request

from app.api.keys import KeyScope
from app.api.refusals import ClientLeft
from app.errors import FingerprintMismatch
from app.fetching import Fetcher
from app.inference.lanes import Lane
from app.reindex_jobs import ReindexJobs
from app.search.collection import Catalogue, Collection
from app.search.embedded.snapshot_files import Snapshots
from app.search.reading.jobs import ReadingJobs
from app.served_models import ServedModel, ServedModels
from app.settings import Settings
from app.telemetry import Metrics

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Departure:
    """Whether the service is leaving: it still answers, and is not ready for more."""

    leaving: bool = False


class State(TypedDict):
    """Made by the lifespan; those that are not required are each request's own.

    What takes long (an import, a snapshot) has `bulk`, a thread of its own, and keeps none from requests.
    """

    settings: Settings
    models: ServedModels
    catalogue: Catalogue
    metrics: Metrics
    workers: ThreadPoolExecutor
    bulk: ThreadPoolExecutor
    snapshots: Snapshots
    reindex_jobs: ReindexJobs
    reading: ReadingJobs
    departure: Departure
    fetcher: Fetcher | None
    scopes: NotRequired[frozenset[KeyScope]]
    held: NotRequired[list[ServedModel]]
    pinned: NotRequired[str]
    request_id: NotRequired[str]
    timings_ms: NotRequired[dict[str, float]]
    priority_said: NotRequired[Lane]
    timeout_said_s: NotRequired[float]


async def state_of(request: Request) -> State:  # async, as FastAPI runs other dependencies in threads
    """The state that the lifespan made."""
    return cast(State, request.scope["state"])


StateDep = Annotated[State, Depends(state_of)]


async def expect_fingerprint(
    state: StateDep,
    expected: Annotated[
        str | None,
        Header(
            alias="X-Expect-Fingerprint",
            description="Answer 409 unless this is the fingerprint of the model that answers.",
        ),
    ] = None,
) -> None:
    """Refuses requests that pin a model that isn't served; `served_model` refuses those that choose another.

    Raises:
        FingerprintMismatch: It isn't one that is served.
    """
    if expected is None:
        return
    state["pinned"] = expected
    models = state["models"]
    if expected not in models.fingerprints:
        _refuse_unless_pinned(expected, models.get())


def served_model(state: State, name: str | None = None, *, fingerprint: str | None = None) -> ServedModel:
    """The model that a request is answered with. It stays the request's own, whatever is loaded meanwhile.

    Args:
        state: Of the request.
        name: That the request chose; None: the model of the fingerprint, and without one the default.
        fingerprint: See `name`.

    Raises:
        UnknownModel: There is none of the name.
        FingerprintMismatch: The request pins another one with X-Expect-Fingerprint.
    """
    models, held = state["models"], state.setdefault("held", [])
    by_name = name is not None or fingerprint is None
    for model in held:
        if model.name == (name or models.default) if by_name else model.info.fingerprint == fingerprint:
            return model
    model = models.take(name, fingerprint=fingerprint)
    held.append(model)
    if (pinned := state.get("pinned")) is not None:
        _refuse_unless_pinned(pinned, model)
    return model


def give_models_back(state: State) -> None:
    """Lets go of what `served_model` gave, at the end of the request."""
    for model in state.pop("held", []):
        state["models"].give_back(model)


def collection_and_model(
    state: State, name: str, *, model: str | None = None
) -> tuple[Collection, ServedModel]:
    """A collection, and the model whose embeddings may meet it.

    Args:
        state: Of the request.
        name: Of the collection.
        model: That the request chose; None for the one that the collection is of.

    Raises:
        UnknownCollection: There is none of the name.
        UnknownModel: There is none of the name.
        FingerprintMismatch: The collection is another model's.
    """
    collection = state["catalogue"].get(name)
    served = served_model(state, model, fingerprint=collection.fingerprint)
    refuse_other_model(collection, served=served.info.fingerprint)
    return collection, served


def refuse_other_model(collection: Collection, *, served: str) -> None:
    """Refuses to let the served model's embeddings meet another model's.

    Raises:
        FingerprintMismatch: The collection is another model's.
    """
    if collection.fingerprint != served:
        name = collection.name
        raise FingerprintMismatch(
            f"collection {name!r} holds embeddings of another model ({collection.fingerprint}) than that "
            f"served ({served}). Make its embeddings anew with the served model by POST /collections/"
            f"{collection.name}/reindex, or serve that model again, or make a collection for this one with "
            "POST /collections",
            expected=collection.fingerprint,
            found=served,
        )


async def in_worker(state: State, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Runs what blocks (disk, search, codecs) off the event loop."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(state["workers"], lambda: work(*arguments, **named))


async def in_bulk(state: State, request: Request, work: Callable[[threading.Event], T]) -> T:
    """Runs what takes long, one at a time, until the caller leaves. The request's body must have been read.

    Args:
        state: For its thread.
        request: Of the caller.
        work: Ends soon after the event is set.

    Raises:
        ClientLeft: The caller did.
    """
    loop = asyncio.get_running_loop()
    stop = threading.Event()

    async def run() -> T:
        return await loop.run_in_executor(state["bulk"], work, stop)

    try:
        return await while_connected(request, run())
    finally:
        stop.set()


def write_to_current(state: State, name: str, write: Callable[[Collection], T]) -> T:
    """Writes to the collection that has a name; again if another took its place meanwhile.

    What was written between the last look of a reindexing and its switch would be in the old one only.
    """
    while True:
        collection = state["catalogue"].get(name)
        result = write(collection)
        if state["catalogue"].get(name).key == collection.key:
            return result


async def while_connected(request: Request, work: Coroutine[object, object, T]) -> T:
    """Runs `work`, and cancels it when the caller closes the connection. The body must have been read.

    Raises:
        ClientLeft: The caller did.
    """
    here = asyncio.current_task()
    assert here is not None, "a request is answered outside of a task: this is a bug"
    left = False

    async def watch() -> None:
        nonlocal left
        await _closed(request)
        left = True
        here.cancel()

    # The work stays in the request's own task: a task costs as much as parsing the request.
    watcher = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and not here.uncancel():
            raise ClientLeft("the caller closed the connection before the answer was there") from None
        raise
    finally:
        watcher.cancel()


@contextmanager
def timed(state: State, part: str) -> Iterator[None]:
    """Adds a part's duration to the Server-Timing header."""
    started_s = time.perf_counter()
    try:
        yield
    finally:
        timings_ms = state.setdefault("timings_ms", {})
        timings_ms[part] = timings_ms.get(part, 0.0) + (time.perf_counter() - started_s) * 1000


def _refuse_unless_pinned(pinned: str, model: ServedModel) -> None:
    found = model.info.fingerprint
    if pinned != found:
        raise FingerprintMismatch(
            f"X-Expect-Fingerprint is {pinned}, and the model {model.name!r} is {found}: "
            "embeddings of the two don't compare",
            expected=pinned,
            found=found,
        )


async def _closed(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
