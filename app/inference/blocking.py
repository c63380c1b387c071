"""The engine for threads whose work is not urgent: they wait where it is busy, and end when they are told."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Final

from app.errors import DeadlineExceeded, Overloaded, TooLarge
from app.inference.config import InferenceConfig
from app.inference.engine import Engine
from app.inference.results import ImageEmbedding, ImageFailure, ModelInfo
from dino_core.bundle import Bundle

_DEADLINE_S: Final = 600.0
_LOOK_S: Final = 0.2  # how often a wait looks whether it shall end


class Stopped(Exception):
    """Somebody wants the work to end; what is done stays."""


class BlockingEngine:
    """An engine, as threads beside its event loop see it.

    Args:
        engine: Started.
        loop: The engine's; it runs in another thread than the callers'.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop

    @property
    def model(self) -> ModelInfo:
        """Which model answers."""
        return self._engine.model

    def embed(self, images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
        """Embeds files, when there is room.

        Args:
            images: At most as many as one request may have; if they are too large together, they go in parts.
            stop: Ends the wait.

        Returns:
            For each image, in their order, its embedding or why it has none.

        Raises:
            Stopped: The event was set before the answer was there.
            NotReady: The engine stops, or the device is lost.
        """
        while True:
            try:
                return self._answer(images, stop)
            except Overloaded as busy:
                if stop.wait(busy.retry_after_s):
                    raise Stopped from None
            except DeadlineExceeded:
                continue
            except TooLarge as error:
                if len(images) > 1:
                    half = len(images) // 2
                    return self.embed(images[:half], stop) + self.embed(images[half:], stop)
                return [ImageFailure(error.code, error.title, limit=error.limit, actual=error.actual)]

    def _answer(self, images: Sequence[bytes], stop: threading.Event) -> list[ImageEmbedding | ImageFailure]:
        future: Future[list[ImageEmbedding | ImageFailure]] = asyncio.run_coroutine_threadsafe(
            self._engine.embed(images, lane="bulk", deadline_s=_DEADLINE_S), self._loop
        )
        while not future.done():
            if stop.is_set():
                future.cancel()
                raise Stopped
            wait_for([future], timeout=_LOOK_S)
        return future.result()


@contextlib.contextmanager
def blocking_engine(bundle: Bundle, config: InferenceConfig | None = None) -> Iterator[BlockingEngine]:
    """An engine for as long as the block lasts, on an event loop in a thread of its own.

    Args:
        bundle: Loaded.
        config: None for the defaults.
    """
    engine = Engine(bundle, config)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine-loop")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(engine.start(), loop).result()
        try:
            yield BlockingEngine(engine, loop)
        finally:
            asyncio.run_coroutine_threadsafe(engine.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
