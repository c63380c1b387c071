"""Batches of canvases, in an order that is a function of (seed, epoch); nothing random but the order.

This module knows nothing of views, networks or devices.

Dimension key: N images of the data set · B images of a batch · C channels · H W pixels
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_core.randomness import shuffled, streams
from training.data.canvases import CanvasSource, DecodedCanvases
from training.data.images import Images, UnreadableImage
from training.data.threads import Threads
from training.errors import DataError, NoImagesCome
from training.machine import usable_cores

_PREFETCHED_BATCHES = 2  # one in the making while the next waits; more only costs memory
_MOST_WORKERS = 8
_REPLACEMENTS = -2  # the stream of dino_core.randomness from which stand-ins for unreadable images are drawn


class Batch(NamedTuple):
    """What the augmentation needs of B images."""

    pixels_BCHW: Tensor
    """uint8 canvases."""
    sizes_px_B2: Tensor
    """int64, height and width of the originals; stays on the host."""
    indices_B: Tensor
    """int64, places in the image list; stays on the host."""


class CanvasLoader:
    """Batches of canvases, epoch by epoch, read ahead by threads (decoders let go of Python's lock).

        order = shuffled(N, seed, epoch)
        for batch in start_batch … N // batch_size - 1:
            for row in 0 … batch_size - 1:
                try order[batch * batch_size + row], and if it can't be read a stand-in, a function of
                (seed, epoch, place), until one can

    So an epoch is the same whatever the number of workers and wherever it is entered. What is left over when
    the images don't fill a last batch is left out; another epoch leaves out others.

    Attributes:
        skipped: Unreadable files by name, with the reason; grows while batches are read.
    """

    def __init__(  # noqa: PLR0913  what is read, in which order, by whom, and how patiently
        self,
        images: Images,
        *,
        canvas_px: int,
        batch_size: int,
        seed: int,
        workers: int | None = None,
        source: CanvasSource | None = None,
        pin_memory: bool = False,
        max_wait_s: float = 600.0,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Makes a loader; nothing is read yet.

        Args:
            images: Such as `training.data.folder.find_images` finds.
            canvas_px: Both sides of a canvas.
            batch_size: Images of a batch over all processes.
            seed: The run's.
            workers: Threads that decode; 0: the caller's own; None: one for each core, at most 8.
            source: Where canvases come from, as `training.data.cache.open_cache` gives; None: the files,
                as RGB.
            pin_memory: Page-locked batches, which a GPU fetches without waiting.
            max_wait_s: How long the threads may take for a batch, before it is an error.
            say: Told when they take a tenth of that.

        Raises:
            DataError: There are fewer images than a batch has.
        """
        if not 1 <= batch_size <= len(images):
            raise DataError(
                f"the batch size is {batch_size} and {images.origin} has {len(images)} images: "
                f"set a batch size from 1 to {len(images)}, or add images"
            )
        self.skipped: dict[str, str] = {}
        self._images = images
        self._canvas_px = canvas_px
        self._batch_size = batch_size
        self._seed = seed
        self._source = source if source is not None else DecodedCanvases(images, canvas_px)
        self._pin_memory = pin_memory
        threads = min(usable_cores(), _MOST_WORKERS) if workers is None else workers
        self._threads = Threads(threads) if threads else None
        self._max_wait_s, self._say = max_wait_s, say or (lambda _: None)
        self._being_read: dict[int, str] = {}

    @property
    def batches_per_epoch(self) -> int:
        """How many full batches the images make."""
        return len(self._images) // self._batch_size

    def batches(
        self, epoch: int, *, start_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """The batches of an epoch, from `start_batch` on.

        Args:
            epoch: Which pass over the data.
            start_batch: How many to leave out, without reading them.
            rank: Of this process. It gets rows rank, rank + world_size, … of each batch.
            world_size: Processes that share a batch; divides the batch size.

        Raises:
            DataError: No image can be read at all, or the processes can't share a batch.
        """
        if self._batch_size % world_size:
            raise DataError(
                f"{world_size} processes cannot share a batch of {self._batch_size}: "
                f"set a batch size that is a multiple of {world_size}"
            )
        order_N = shuffled(len(self._images), seed=self._seed, epoch=epoch)
        places = [
            np.arange(batch * self._batch_size, (batch + 1) * self._batch_size)[rank::world_size]
            for batch in range(start_batch, self.batches_per_epoch)
        ]
        return self._read_ahead(epoch, order_N, places)

    def close(self) -> None:
        """Stops the threads; batches that nobody took are dropped."""
        if self._threads is not None:
            self._threads.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_ahead(
        self, epoch: int, order_N: NDArray[np.int64], places: list[NDArray[np.int64]]
    ) -> Iterator[Batch]:
        """Keeps a few batches in the making and gives them out in order."""
        waiting: deque[tuple[Batch, list[Future[None]]]] = deque()
        upcoming = iter(places)
        try:
            while True:
                while len(waiting) <= _PREFETCHED_BATCHES and (places_B := next(upcoming, None)) is not None:
                    waiting.append(self._begin(epoch, order_N, places_B))
                if not waiting:
                    return
                batch, rows = waiting.popleft()
                self._wait_for(rows)
                yield batch
        finally:
            for _, rows in waiting:
                for row in rows:
                    row.cancel()

    def _wait_for(self, rows: list[Future[None]]) -> None:
        """Waits until a batch is there, and not for ever.

        Raises:
            NoImagesCome: It was not there in time.
        """
        began_s, has_said = time.monotonic(), False
        for row in rows:
            while True:
                waited_s = time.monotonic() - began_s
                patience_s = self._max_wait_s * (1 if has_said else 0.1) - waited_s
                try:
                    row.result(timeout=max(patience_s, 0))
                    break
                except TimeoutError:
                    if row.done():  # it is the reader's own
                        raise
                sentence = self._what_is_missing(time.monotonic() - began_s)
                if has_said:
                    raise NoImagesCome(
                        f"{sentence}: is the disk or the network gone, or does it need more than "
                        "--guard.max-data-wait-s? Then go on with --resume"
                    )
                self._say(sentence)
                has_said = True

    def _what_is_missing(self, waited_s: float) -> str:
        reading = sorted(self._being_read.values())
        where = f"; {len(reading)} threads read, one of them {reading[0]}" if reading else ""
        return f"no images have come from {self._images.origin} for {waited_s:.3g} s{where}"

    def _begin(
        self, epoch: int, order_N: NDArray[np.int64], places_B: NDArray[np.int64]
    ) -> tuple[Batch, list[Future[None]]]:
        """A batch whose rows are filled by the threads, or at once if there are none."""
        size, side = len(places_B), self._canvas_px
        batch = Batch(
            torch.empty(
                size, self._source.channels, side, side, dtype=torch.uint8, pin_memory=self._pin_memory
            ),
            torch.empty(size, 2, dtype=torch.int64),
            torch.empty(size, dtype=torch.int64),
        )
        arguments = [(batch, row, epoch, order_N, int(place)) for row, place in enumerate(places_B)]
        if self._threads is None:
            for argument in arguments:
                self._fill(*argument)
            return batch, []
        return batch, [self._threads.submit(partial(self._fill, *argument)) for argument in arguments]

    def _fill(self, batch: Batch, row: int, epoch: int, order_N: NDArray[np.int64], place: int) -> None:
        """Reads the image of a place, or its stand-in, into a row."""
        for index in self._candidates(epoch, order_N, place):
            if self._images.names[index] in self.skipped:
                continue
            self._being_read[threading.get_ident()] = self._images.names[index]
            try:
                canvas = self._source.read(index)
            except UnreadableImage as error:
                self.skipped[self._images.names[index]] = str(error)
                continue
            finally:
                del self._being_read[threading.get_ident()]
            # By numpy: torch would start a team of OpenMP threads for the copy in each decoding thread.
            batch.pixels_BCHW.numpy()[row] = canvas.pixels_CHW.numpy()
            batch.sizes_px_B2.numpy()[row] = canvas.size_px
            batch.indices_B.numpy()[row] = index
            return
        name, reason = next(iter(self.skipped.items()))
        raise DataError(
            f"none of the {len(self._images)} images in {self._images.origin} can be read; {name}: {reason}"
        )

    def _candidates(self, epoch: int, order_N: NDArray[np.int64], place: int) -> Iterator[int]:
        """The image of a place, then every image once, from a point that depends on the place alone."""
        yield int(order_N[place])
        stream = streams(seed=self._seed, epoch=epoch, crop=_REPLACEMENTS, indices_B=np.array([place]))
        start = int(stream[0]) % len(order_N)
        yield from (int(index) for index in np.roll(order_N, -start))
