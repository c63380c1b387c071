"""From an admitted picture to its row: hash, decode, slot, batch. Runs on threads; knows no event loop.

    picture ─► decode pool ─► cache: stored? shared? ─► slot of the ring ─► batcher ─► embedder
                    └──────────────────┴── settled ◄──────────────────────────┘

Every picture that is submitted is settled exactly once, whatever happens to it.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from app.inference.batcher import Batcher, BatcherConfig, DeviceLost, Dropped, OutOfRoom, size_below
from app.inference.cache import EmbeddingCache
from app.inference.decode import DecodePool
from app.inference.embedder import Embedder, batch_sizes
from app.inference.features import Array, FeatureReader, Reading
from app.inference.results import ImageFailure
from app.inference.ring import PixelRing, RingClosed
from app.inference.stats import Observer
from app.inference.threads import use_native_threads, yield_to_the_loop
from app.inference.work import Picture, Row, Work
from dino_core.errors import ImageError
from dino_core.preprocess import ImageLimits, load_pixels

logger = logging.getLogger(__name__)

Outcome = Row | Dropped | DeviceLost
Settlement = tuple[list[Picture], Outcome]

_CHEAP_PICTURE_S: Final = 2e-3  # of all the model's threads: about as long as a photograph takes to decode
_GATHERED_LAUNCHES: Final = 16
_LONGEST_GATHER_S: Final = 16e-3
_UNFORESEEN = ImageFailure("undecodable_image", "The image could not be decoded.")
_NO_EMBEDDING = ImageFailure(
    "embedding_failed", "The model gave no embedding for this image; others of the request are not affected."
)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Threads and bounds of the pipeline.

    Attributes:
        decode_threads: Threads that decode.
        decode_beside: How many of them at once beside a model that needs the same cores for longer than they
            do; None for all.
        compute_threads: Native threads of the device thread: what computes where the device is the CPU.
        cache_rows: Embeddings to keep by content.
        limits: What a picture may ask of a decoder.
    """

    decode_threads: int
    decode_beside: int | None = None
    compute_threads: int
    cache_rows: int
    limits: ImageLimits


class Pipeline:
    """The threads between admission and answer.

    Args:
        embedder: The model.
        settled: Hears how pictures ended; called from any thread, and must neither block nor raise.
        config: Threads and bounds.
        observer: Hears durations and counts.
        features: What else the model says of pictures; None where it says nothing else.
    """

    def __init__(
        self,
        embedder: Embedder,
        settled: Callable[[list[Settlement]], None],
        *,
        config: PipelineConfig,
        observer: Observer,
        features: FeatureReader | None = None,
    ) -> None:
        self._embedder = embedder
        self._features = features
        self._settled = settled
        self._config = config
        self._observer = observer
        self._abandoned = False
        self._cache = EmbeddingCache(embedder.model.fingerprint, max_rows=config.cache_rows)
        # Launched batches, the next one gathering, and one slot in each decoder's hands.
        slots = (embedder.in_flight + 2) * embedder.max_batch + config.decode_threads
        self._ring = PixelRing(slots, embedder.preprocessing.crop_px, pinned=embedder.pinned)
        self._decoders: DecodePool[Work] = DecodePool(
            self._decode,
            failed=self._decode_failed,
            threads=config.decode_threads,
            # Enough to keep the device busy, and yet a batch of slots is left for interactive work.
            bulk_at_once=(embedder.in_flight + 1) * embedder.max_batch,
        )
        self.batcher: Batcher[Work, Row] = Batcher(
            self._launch,
            wanted=self._still_wanted,
            settle=self._settle_batch,
            lane_of=lambda work: work.lane,
            config=BatcherConfig(
                max_batch=embedder.max_batch,
                in_flight=embedder.in_flight,
                # A CPU's time for a batch grows with each image in it; that of a device of its own hardly.
                mixes_lanes=embedder.pinned,
            ),
            observer=observer,
        )

    def start(self) -> None:
        """Starts the threads and warms the model up; blocks until that is done.

        Raises:
            Exception: What the model raised for black pictures.
        """
        # Decoders first: a thread takes the number of native threads that was set last; see
        # `use_native_threads`.
        self._decoders.start()
        try:
            self.batcher.start(self._warm_up)
        except BaseException:
            self.close(drain=False, timeout_s=None)
            raise

    def submit(self, picture: Picture) -> None:
        """Sends a file on its way."""
        work = Work([picture])
        self._decoders.put(work, work.lane)

    def submit_pixels(self, picture: Picture, pixels_CHW: Tensor) -> None:
        """Sends pixels of the model's size on their way; they must stay as they are until settled."""
        self.batcher.put(Work([picture], pixels_CHW=pixels_CHW))

    def close(self, *, drain: bool, timeout_s: float | None) -> None:
        """Ends the threads.

        Args:
            drain: Finish what was submitted; otherwise settle it as `DeviceLost`.
            timeout_s: For each thread; one that hangs is left behind.
        """
        if not drain:
            self._abandoned = True
            self._ring.close()
        self._decoders.close(timeout_s=timeout_s)
        self.batcher.close(drain=drain, timeout_s=timeout_s)

    @property
    def alive(self) -> bool:
        """Whether all threads run."""
        return self._decoders.alive and self.batcher.alive

    def busy_for_s(self) -> float:
        """How long the oldest batch is on the device, or the slowest picture in its decoder."""
        return max(self.batcher.busy_for_s(), self._decoders.busy_for_s())

    @property
    def depth(self) -> int:
        """Pictures that wait for a decoder or for the device."""
        return self._decoders.depth + self.batcher.depth

    def _decode(self, work: Work) -> None:
        """Begins a picture's work, on a decoder's thread; an exception from here is `_decode_failed`'s."""
        started_s = time.monotonic()
        work.begun_as_bulk = work.lane == "bulk"
        if self._abandoned:
            return self._end(work, DeviceLost())
        if not self._still_wanted(work):
            return self._end(work, Dropped())
        (picture,) = work.pictures  # nobody has joined yet
        picture.sha256 = hashlib.sha256(picture.data).digest()
        found = self._cache.join(picture, work)
        if found is work:
            return self._fill_slot(work, picture.data, time.monotonic() - started_s)
        self._end_bulk(work)
        if isinstance(found, Work):
            if work.lane == "interactive":
                self.batcher.promote()
            return self._observer.count("cache_hits_total", label="in_flight")
        self._observer.count("cache_hits_total", label="stored")
        return self._settled([([picture], found)])

    def _fill_slot(self, work: Work, data: bytes, hash_s: float) -> None:
        try:
            work.slot = self._ring.acquire()
            work.stages.decoding_s = time.monotonic()
            cpu_began_s = time.thread_time()
            # The wait may have been long.
            if not self._still_wanted(work):
                return self._end(work, Dropped())
            pixels_CHW = load_pixels(data, self._embedder.preprocessing, limits=self._config.limits)
            self._ring.pixels_RCHW[work.slot].copy_(pixels_CHW)
        except RingClosed:
            return self._end(work, DeviceLost())
        except ImageError as error:
            return self._end(
                work, ImageFailure(error.code, error.title, limit=error.limit, actual=error.actual)
            )
        work.stages.decoded_s = time.monotonic()
        # The wait for a slot is no decoding: it counts as waiting for the device, which frees slots.
        self._observer.observe("decode_seconds", hash_s + work.stages.decoded_s - work.stages.decoding_s)
        self._observer.count("decode_cpu_seconds_total", time.thread_time() - cpu_began_s)
        return self.batcher.put(work)

    def _decode_failed(self, work: Work) -> None:
        self._end(work, _UNFORESEEN)

    def _still_wanted(self, work: Work) -> bool:
        return self._cache.still_wanted(work, time.monotonic())

    def _warm_up(self) -> None:
        yield_to_the_loop()
        use_native_threads(self._config.compute_threads)
        for size in batch_sizes(self._embedder.max_batch):
            try:
                self._launch_s(size)
            except OutOfRoom:
                if size == 1:
                    raise
                smaller = size_below(size)
                logger.warning(
                    "the device has no memory for %d images at once: at most %d go together", size, smaller
                )
                self.batcher.limit(smaller)
                break
        if not self._embedder.pinned:
            self._share_the_cores()
        if self._features is not None:
            self._features.warm_up()

    def _share_the_cores(self) -> None:
        """Measures the model, whose cores the decoders take, too.

        A model that costs more than decoding needs its cores undisturbed, and decoders keep it busy from half
        of them. One that costs less waits for the decoders, which then take all; and as a launch costs more
        than the pictures in it, the pictures of a busy moment go together.
        """
        most = self.batcher.room
        single_s, full_s = self._launch_s(1), self._launch_s(most)
        if full_s / most > _CHEAP_PICTURE_S:
            if self._config.decode_beside is not None:
                self._decoders.limit(self._config.decode_beside)
            return
        launch_s = single_s - full_s / most
        self.batcher.gather(
            min(_GATHERED_LAUNCHES * max(launch_s, 0.0), _LONGEST_GATHER_S), self._decoders.waits
        )

    def _launch_s(self, size: int) -> float:
        crop_px = self._embedder.preprocessing.crop_px
        black_BCHW = torch.zeros((size, 3, crop_px, crop_px), dtype=torch.uint8)
        began_s = time.monotonic()
        with _naming_lack_of_room():
            self._embedder.launch([black_BCHW])()
        return time.monotonic() - began_s

    def _launch(self, works: list[Work]) -> Callable[[], list[Row]]:
        """Starts the model on a batch: all that want the same of it together, mostly the embedding."""
        launched_s = time.monotonic()
        for work in works:
            work.stages.launched_s = launched_s
        places_of: dict[Reading | None, list[int]] = {}
        for place, work in enumerate(works):
            places_of.setdefault(work.reading, []).append(place)
        launched = [
            (places, self._launch_alike([works[place] for place in places], reading))
            for reading, places in places_of.items()
        ]

        def collect() -> list[Row]:
            rows: list[Row] = [_NO_EMBEDDING] * len(works)
            for places, collect_alike in launched:
                for place, row in zip(places, collect_alike(), strict=True):
                    rows[place] = row
            return rows

        return collect

    def _launch_alike(self, works: list[Work], reading: Reading | None) -> Callable[[], list[Row]]:
        """Starts the model on the works' pixels, in the order of slots, so that copies are few."""
        by_slot = sorted((work.slot, place) for place, work in enumerate(works) if work.slot is not None)
        sent = [(work.pixels_CHW, place) for place, work in enumerate(works) if work.pixels_CHW is not None]
        chunks = self._ring.chunks(slot for slot, _ in by_slot)
        chunks += [pixels_CHW[None] for pixels_CHW, _ in sent]
        places = [place for _, place in by_slot] + [place for _, place in sent]
        if reading is not None:
            features = self._features
            assert features is not None, "features were let in that the model can't give: this is a bug"
            # Computed when collected: what was launched before is safe from what this may raise. A lack of
            # memory is no measure of how many embeddings have room, so it isn't named.
            return lambda: _rows_in_place(features.read(reading, chunks), places)
        with _naming_lack_of_room():
            collect = self._embedder.launch(chunks)
        if self._embedder.pinned:  # such a device runs these sizes and no other
            size = next(size for size in batch_sizes(self._embedder.max_batch) if size >= len(works))
            self._observer.count("padding_images_total", size - len(works))

        shape = (len(places), self._embedder.model.dimensions)

        def rows() -> list[Row]:
            with _naming_lack_of_room():
                return _rows_in_place(_of_shape(collect(), shape), places)

        return rows

    def _settle_batch(self, works: list[Work], outcomes: list[Row | Exception]) -> None:
        settlements: list[Settlement] = []
        computed_s = time.monotonic()
        for work, outcome in zip(works, outcomes, strict=True):
            work.stages.computed_s = computed_s
            match outcome:
                case Dropped() | DeviceLost() | ImageFailure():
                    settlements.append(self._finish(work, outcome))
                case Exception():
                    settlements.append(self._finish(work, _NO_EMBEDDING))
                case _:
                    settlements.append(self._finish(work, outcome))
        self._settled(settlements)

    def _end(self, work: Work, outcome: Outcome) -> None:
        self._settled([self._finish(work, outcome)])

    def _finish(self, work: Work, outcome: Outcome) -> Settlement:
        """Takes the work out of the cache's flight and the ring; from then on nobody can join it."""
        self._cache.finish(work, outcome if isinstance(outcome, np.ndarray) else None)
        if work.slot is not None:
            self._ring.release(work.slot)
        self._end_bulk(work)
        for picture in work.pictures:
            picture.stages = work.stages
        return work.pictures, outcome

    def _end_bulk(self, work: Work) -> None:
        if work.begun_as_bulk:
            work.begun_as_bulk = False
            self._decoders.bulk_ended()


def _of_shape(rows_BD: Array, shape: tuple[int, int]) -> Array:
    """The rows, if they are what was promised: the batcher then looks for the entry that is to blame."""
    if rows_BD.shape != shape or rows_BD.dtype != np.float32:
        raise ValueError(
            f"the model gave {rows_BD.dtype} {list(rows_BD.shape)}, expected float32 {list(shape)}"
        )
    return rows_BD


@contextmanager
def _naming_lack_of_room() -> Iterator[None]:
    """Tells the batcher in its own words that the device's memory, or the host's, is full."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfRoom("there is no memory for a batch of this size") from error


def _rows_in_place(rows_BD: Array, places: list[int]) -> list[Row]:
    """Rows in the order of the works; a row that isn't finite is its own image's failure."""
    rows_BD.setflags(write=False)  # several callers may get the same row
    finite_B = np.asarray(np.isfinite(rows_BD).all(axis=tuple(range(1, rows_BD.ndim))))
    in_place: list[Row] = [_NO_EMBEDDING] * len(places)
    for row, is_finite, place in zip(rows_BD, finite_B, places, strict=True):
        if is_finite:
            in_place[place] = row
    return in_place
