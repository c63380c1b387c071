"""Reindexing in the background of a service: begun, looked at, cancelled; one at a time for a collection."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from app.errors import ServiceError, SuccessorExists, UnknownCollection
from app.inference.blocking import BlockingEngine
from app.inference.engine import Engine
from app.reindexing import Progress, Reindex
from app.search.collection import Catalogue, CollectionInfo
from app.served_models import ServedModels

_SHARE_S: Final = 0.1  # of the model's time that one batch may take, while others wait
_BATCH_IMAGES: Final = (4, 64)

logger = logging.getLogger(__name__)


class _Job:
    """A reindexing and its thread."""

    def __init__(self, reindex: Reindex, *, skip_failed: bool) -> None:
        self.reindex = reindex
        self.thread = threading.Thread(
            target=self._run, kwargs={"skip_failed": skip_failed}, name="reindex", daemon=True
        )

    @property
    def fingerprints(self) -> tuple[str, str]:
        """Before and after; a collection of another one has the name since, and this tells nothing of it."""
        progress = self.reindex.progress
        return progress.from_fingerprint, progress.to_fingerprint

    def _run(self, *, skip_failed: bool) -> None:
        try:
            ended = self.reindex.run(skip_failed=skip_failed)
        except ServiceError as error:
            logger.error("reindexing failed: %s", error.title)
        except Exception:
            logger.exception("reindexing failed in an unforeseen way")
        else:
            logger.info("reindexing collection %r: %s", ended.collection, ended.state)

    def end(self) -> None:
        self.reindex.stop()
        self.thread.join()


class ReindexJobs:
    """The reindexings of one service. Its methods block; they are safe to use from many threads.

    Args:
        catalogue: Of any engine.
        models: Of which one makes the new vectors.
        loop: Of their engines.
    """

    def __init__(self, catalogue: Catalogue, models: ServedModels, loop: asyncio.AbstractEventLoop) -> None:
        self._catalogue = catalogue
        self._models = models
        self._loop = loop
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        self._cancelled: dict[str, Progress] = {}
        self._rebuilt: set[str] = set()

    def begin(self, name: str, *, model: str | None = None, skip_failed: bool = False) -> Progress:
        """Begins, or goes on where one ended; one that runs goes on as it is.

        It ends where its model's place is taken by another.

        Args:
            name: Of the collection.
            model: Whose vectors it shall have; None for the default.
            skip_failed: See `Reindex.run`.

        Raises:
            UnknownCollection: There is no such collection.
            UnknownModel: There is no such model.
            NothingToReindex: It is of that model already.
            SuccessorExists: Something else is built to take its place.
        """
        with self._lock:
            name = self._catalogue.get(name).name
            if name in self._rebuilt:
                raise self._busy(name)
            running = self._jobs.get(name)
            if running is not None and running.thread.is_alive():
                return running.reindex.progress
            engine = self._models.get(model).engine
            reindex = Reindex(
                self._catalogue,
                name,
                engine.model,
                BlockingEngine(engine, self._loop).embed,
                batch_images=lambda: _batch_images(engine),
                max_image_bytes=engine.config.max_image_bytes,
            )
            job = self._jobs[name] = _Job(reindex, skip_failed=skip_failed)
            self._cancelled.pop(name, None)
            job.thread.start()
        return reindex.progress

    def progress(self, name: str) -> Progress:
        """How far the collection's reindexing is, or how it ended.

        Raises:
            UnknownCollection: There is no such collection.
        """
        collection = self._catalogue.get(name)
        with self._lock:
            job, cancelled = self._jobs.get(collection.name), self._cancelled.get(collection.name)
        if job is not None and collection.fingerprint in job.fingerprints:
            return job.reindex.progress
        info = next((info for info in self._catalogue.list() if info.name == collection.name), None)
        if info is None:
            raise UnknownCollection(f"the collection {collection.name!r} was deleted")
        there = self._of_successor(info)
        return cancelled if cancelled is not None and there.state == "none" else there

    def cancel(self, name: str) -> Progress:
        """Stops the collection's reindexing and deletes what it made; the collection never noticed.

        Raises:
            UnknownCollection: There is no such collection, or nothing to cancel.
            SuccessorExists: A restore is under way, which ends by itself.
        """
        collection = self._catalogue.get(name)
        name = collection.name
        with self._lock:
            if name in self._rebuilt:
                raise self._busy(name)
            job = self._jobs.get(name)
        before = self.progress(name)
        if job is not None:
            job.end()
            before = job.reindex.progress
        self._catalogue.cancel_successor(name)  # raises where the switch came first
        cancelled = replace(before, state="cancelled", done=0)
        with self._lock:
            self._jobs.pop(name, None)
            self._cancelled[name] = cancelled
        return cancelled

    @contextlib.contextmanager
    def rebuilding(self, name: str) -> Iterator[None]:
        """Keeps reindexing away from a collection that something else builds a successor of.

        Args:
            name: Of a collection, an alias, or nothing yet.

        Raises:
            SuccessorExists: It is being reindexed, or rebuilt already.
        """
        with self._lock:
            name = {alias: info.name for info in self._catalogue.list() for alias in info.aliases}.get(
                name, name
            )
            running = self._jobs.get(name)
            if name in self._rebuilt or (running is not None and running.thread.is_alive()):
                raise self._busy(name)
            self._rebuilt.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._rebuilt.discard(name)
                self._jobs.pop(name, None)  # it ended, and told of the collection before

    def stop(self) -> None:
        """Stops all; each can be begun again where it is."""
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.reindex.stop()
        for job in jobs:
            job.thread.join()

    def _of_successor(self, info: CollectionInfo) -> Progress:
        """Of a collection that this process hasn't reindexed."""
        served = self._models.get().info.fingerprint
        successor = info.successor
        return Progress(
            collection=info.name,
            state="none" if successor is None else "interrupted",
            from_fingerprint=info.fingerprint,
            to_fingerprint=served if successor is None else successor.fingerprint,
            done=0 if successor is None else successor.items,
            of=info.items,
        )

    def _busy(self, name: str) -> SuccessorExists:
        successor = {info.name: info.successor for info in self._catalogue.list()}.get(name)
        served = self._models.get().info.fingerprint
        return SuccessorExists(
            f"the collection {name!r} is being rebuilt at the moment: wait until that is done, or cancel it",
            expected=served if successor is None else successor.fingerprint,
            found=served,
        )


def _batch_images(engine: Engine) -> int:
    fewest, most = _BATCH_IMAGES
    rate = engine.gauges()["images_per_second"]
    return min(max(fewest, int(rate * _SHARE_S)), most, engine.config.max_images_per_request)
