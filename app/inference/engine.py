"""The engine: bytes of pictures in, embeddings out, each image failing or succeeding for itself.

    embed ─► limits ─► headers ─► admission ─► pipeline (threads) ─► outbox ─► the request's one future

Everything in this file runs on the event loop's thread, but `_settled`, which only fills the outbox.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from app.errors import DeadlineExceeded, InvalidPixels, NotReady, OutputUnavailable, Overloaded, TooLarge
from app.inference.admission import BULK_SHARE, Admission, Cost
from app.inference.backends import cpu_embedder
from app.inference.batcher import DeviceLost, Dropped
from app.inference.config import Backend, InferenceConfig
from app.inference.cuda import CudaEmbedder
from app.inference.embedder import BackendUnavailable, Embedder
from app.inference.features import Array, FeatureReader, Reading
from app.inference.headers import header_of
from app.inference.lanes import Lane
from app.inference.pipeline import Outcome, Pipeline, PipelineConfig, Settlement
from app.inference.results import ImageEmbedding, ImageFailure, ModelInfo
from app.inference.stages import Passage, passages
from app.inference.stats import EngineStats, Observer
from app.inference.threads import cpu_budget, yield_to_the_loop
from app.inference.work import Picture, Request, Row
from dino_core.bundle import Bundle
from dino_core.errors import BundleError
from dino_core.preprocess import ImageHeader

__all__ = ["Engine", "ImageEmbedding", "ImageFailure", "InferenceConfig", "ModelInfo"]

_HEADERS_ON_THE_LOOP = 8  # headers take microseconds; more of them than this would keep other callers waiting
_THREAD_END_S = 5.0  # a thread that needs longer hangs, and is left behind


class Engine:
    """Embeds pictures for many callers at once.

    Args:
        model: A bundle, or an embedder of one's own.
        config: Bounds; None for the defaults.
        observer: Hears what happens; the default keeps totals in memory, as `stats`.

    Raises:
        BackendUnavailable: See `make_embedder`, and so ConversionError.
    """

    def __init__(
        self,
        model: Bundle | Embedder,
        config: InferenceConfig | None = None,
        *,
        observer: Observer | None = None,
    ) -> None:
        config = config or InferenceConfig()
        self._config = config
        self._observer: Observer = observer or EngineStats()
        if isinstance(model, Bundle):
            # On a thread of its own: threads that a backend starts are as nice as the one they come from.
            with ThreadPoolExecutor(1, initializer=yield_to_the_loop) as maker:
                self._embedder = maker.submit(
                    make_embedder,
                    model,
                    max_batch=config.max_batch,
                    backend=config.backend,
                    threads=_compute_threads(config),
                ).result()
        else:
            self._embedder = model
        self.features = FeatureReader(model) if isinstance(model, Bundle) else None
        self._admission = Admission(
            Cost(config.max_images_in_flight, config.max_bytes_in_flight, config.max_pixels_in_flight),
            bulk_capacity=_bulk_capacity(config),
            clock=time.monotonic,
        )
        self._pipeline = Pipeline(
            self._embedder,
            self._settled,
            config=_pipeline_config(config, self._embedder),
            observer=self._observer,
            features=self.features,
        )
        self._header_reader = ThreadPoolExecutor(1, thread_name_prefix="dino-headers")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting = False
        self._given_up = False
        self._requests: set[Request] = set()
        self._outbox: deque[Settlement] = deque()
        self._wake_up_is_due = False
        self._idle = asyncio.Event()

    async def start(self) -> None:
        """Starts the threads and warms the model up; the running loop is the engine's from now on.

        Raises:
            Exception: What the model raised for black pictures.
        """
        self._loop = asyncio.get_running_loop()
        await self._loop.run_in_executor(None, self._pipeline.start)
        self._accepting = True

    async def stop(self) -> None:
        """Refuses what comes, finishes what is there, up to `drain_s`, and ends the threads.

        A request that is still unanswered then fails with `NotReady`.
        """
        if self._loop is None:
            return
        self._accepting = False
        drained = await self._drain()
        await self._loop.run_in_executor(
            None, lambda: self._pipeline.close(drain=drained, timeout_s=_THREAD_END_S)
        )
        self._empty_outbox()
        self.give_up()
        await self._loop.run_in_executor(None, self._header_reader.shutdown)
        self._loop = None

    def give_up(self) -> None:
        """Refuses what comes and fails what waits, with `NotReady`: a stop has no more time."""
        self._accepting = False
        self._given_up = True
        for request in list(self._requests):
            request.fail(NotReady("the service stopped before this request was answered: send it again"))
        self._idle.set()

    @property
    def model(self) -> ModelInfo:
        """Which model answers."""
        return self._embedder.model

    @property
    def input_px(self) -> int:
        """Side of the square pictures that `embed_pixels` takes."""
        return self._embedder.preprocessing.crop_px

    @property
    def config(self) -> InferenceConfig:
        """The bounds, for those who tell callers about them."""
        return self._config

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now, if there is room."""
        return self._accepting and self.alive

    @property
    def alive(self) -> bool:
        """Whether every thread runs and none hangs. Once started, False means: restart the process."""
        return self._pipeline.alive and self._pipeline.busy_for_s() < self._config.stall_s

    @property
    def lost(self) -> bool:
        """Whether a thread has died that no stop has ended: this process will never be what it was."""
        return self._accepting and not self._pipeline.alive

    def gauges(self) -> dict[str, float]:
        """What is in the engine now, by the metrics' names without prefix."""
        return {
            "queue_depth": self._pipeline.depth,
            "inflight_batches": self._pipeline.batcher.batches_in_flight,
            "inflight_images": self._admission.held.images,
            "inflight_bulk_images": self._admission.held_by("bulk").images,
            "inflight_bytes": self._admission.held.bytes,
            "queue_pixels": self._admission.held.pixels,
            "images_per_second": self._admission.images_per_s or 0.0,
            "ready": float(self.ready),
        }

    def expect_room(self, *, lane: Lane = "interactive", deadline_s: float | None = None) -> None:
        """Refuses a caller who has not sent the images yet, if not even one image would be taken now.

        Args:
            lane: As for `embed`.
            deadline_s: The longest that it may be; None for none.

        Raises:
            Overloaded: As `embed`, and so NotReady.
        """
        self._refuse_unless_ready()
        with self._counting_refusals():
            self._admission.check(Cost(1), lane=lane, deadline_s=deadline_s)

    def shape_of(self, reading: Reading | None) -> tuple[int, ...]:
        """Shape of what `embed` gives for one image.

        Raises:
            OutputUnavailable: The model has no such thing.
        """
        if reading is None:
            return (self.model.dimensions,)
        if self.features is None:
            raise OutputUnavailable(f"the model {self.model.id!r} gives embeddings and nothing else")
        return self.features.shape_of(reading)

    async def embed(
        self,
        images: Sequence[bytes],
        *,
        reading: Reading | None = None,
        lane: Lane = "interactive",
        deadline_s: float | None = None,
    ) -> list[ImageEmbedding | ImageFailure]:
        """Embeds files.

        Args:
            images: Whole files, in any of the formats that we read.
            reading: What else to give in the embedding's place, see `shape_of`.
            lane: "bulk" for work that nobody waits for image by image: see `app.inference.lanes`.
            deadline_s: From now; None for the engine's default. Work that can't make it is dropped.

        Returns:
            For each image, in their order, its embedding or why it has none.

        Raises:
            OutputUnavailable: The model has no such thing to read.
            TooLarge: More images, bytes or pixels than any request may have.
            Overloaded: No room for the whole request now.
            NotReady: Starting, stopping, or the device is lost.
            DeadlineExceeded: The time ran out. No part of the answer is given.
        """
        deadline_s = self._config.timeout_s if deadline_s is None else deadline_s
        self._refuse_unless_ready()
        self._refuse_too_many(len(images))
        kept_bytes = self._kept_bytes(reading)
        headers = await self._headers(images)
        costs = {
            index: Cost(1, len(images[index]) + kept_bytes, header.width_px * header.height_px)
            for index, header in enumerate(headers)
            if isinstance(header, ImageHeader)
        }
        self._admit(costs.values(), lane, deadline_s)
        request = self._new_request(len(images), lane, deadline_s)
        pictures: list[Picture | None] = [None] * len(images)
        for index, header in enumerate(headers):
            if isinstance(header, ImageFailure):
                self._observer.count("images_total", label="failed")
                self._observer.count("image_errors_total", label=header.code)
                request.answer(index, header)
            else:
                pictures[index] = Picture(
                    request, index, costs[index], images[index], header, reading=reading
                )
        for picture in pictures:
            if picture is not None:
                self._pipeline.submit(picture)
        await self._answer(request, deadline_s)
        return [_result(row, picture) for row, picture in zip(request.rows, pictures, strict=True)]

    async def embed_pixels(
        self,
        pixels_BHWC: NDArray[np.uint8],
        *,
        reading: Reading | None = None,
        lane: Lane = "interactive",
        deadline_s: float | None = None,
    ) -> Array:
        """Embeds pictures that the caller has decoded, resized and cropped.

        Args:
            pixels_BHWC: uint8, RGB, `input_px` high and wide; must not change until the answer.
            reading: As for `embed`.
            lane: Likewise.
            deadline_s: Likewise.

        Returns:
            float32 [B, D], or [B, …] of the reading; NaN for images that the model gave nothing for.

        Raises:
            InvalidPixels: Another type or shape.
            TooLarge: As `embed`, and so the other three.
        """
        deadline_s = self._config.timeout_s if deadline_s is None else deadline_s
        self._refuse_unless_ready()
        size_px = self.input_px
        if pixels_BHWC.dtype != np.uint8 or pixels_BHWC.shape[1:] != (size_px, size_px, 3):
            raise InvalidPixels(
                f"the array is {pixels_BHWC.dtype} {list(pixels_BHWC.shape)}, "
                f"expected uint8 [images, {size_px}, {size_px}, 3]: RGB, resized and cropped"
            )
        self._refuse_too_many(len(pixels_BHWC))
        shape = self.shape_of(reading)
        cost = Cost(1, size_px * size_px * 3 + self._kept_bytes(reading), 0)  # nothing to decode
        self._admit([cost] * len(pixels_BHWC), lane, deadline_s)
        request = self._new_request(len(pixels_BHWC), lane, deadline_s)
        pixels_BCHW = torch.from_numpy(np.require(pixels_BHWC, requirements=["C", "W"])).permute(0, 3, 1, 2)
        for index, pixels_CHW in enumerate(pixels_BCHW):
            self._pipeline.submit_pixels(Picture(request, index, cost, reading=reading), pixels_CHW)
        await self._answer(request, deadline_s)
        rows_BD = np.full((len(pixels_BHWC), *shape), np.nan, np.float32)
        for index, row in enumerate(request.rows):
            if isinstance(row, np.ndarray):
                rows_BD[index] = row
        return rows_BD

    def _refuse_unless_ready(self) -> None:
        if not self._accepting:
            raise NotReady("the service is starting or stopping: try again in a moment")
        if not self.alive:
            raise NotReady("the model's device is lost, and the service must be restarted: try another one")

    def _refuse_too_many(self, images: int) -> None:
        limit = self._config.max_images_per_request
        if images > limit:
            raise TooLarge(
                f"the request has {images} images, at most {limit} are taken at once: split it",
                limit=limit,
                actual=images,
            )

    def _kept_bytes(self, reading: Reading | None) -> int:
        """What an image's values hold until the answer; a plain embedding counts for nothing beside it."""
        return 0 if reading is None else 4 * math.prod(self.shape_of(reading))

    async def _headers(self, images: Sequence[bytes]) -> list[ImageHeader | ImageFailure]:
        if len(images) <= _HEADERS_ON_THE_LOOP:
            return [header_of(data, self._config) for data in images]
        loop = asyncio.get_running_loop()
        headers = await loop.run_in_executor(
            self._header_reader, lambda: [header_of(data, self._config) for data in images]
        )
        self._refuse_unless_ready()  # it may have changed meanwhile
        return headers

    def _admit(self, costs: Iterable[Cost], lane: Lane, deadline_s: float | None) -> None:
        with self._counting_refusals():
            self._admission.admit(sum(costs, Cost()), lane=lane, deadline_s=deadline_s)

    @contextlib.contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except Overloaded as error:
            self._observer.count("rejected_total", label=error.reason)
            raise
        except TooLarge:
            self._observer.count("rejected_total", label="too_large")
            raise

    def _new_request(self, images: int, lane: Lane, deadline_s: float | None) -> Request:
        return Request(
            asyncio.get_running_loop().create_future(),
            images=images,
            deadline_s=math.inf if deadline_s is None else time.monotonic() + deadline_s,
            lane=lane,
        )

    async def _answer(self, request: Request, deadline_s: float | None) -> None:
        """Waits until every image of the request has its outcome."""
        self._requests.add(request)
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                await request.answered
        except TimeoutError:
            self._observer.count("deadline_exceeded_total")
            raise DeadlineExceeded(
                f"the answer was not there after {deadline_s} s: send fewer images, or allow more time"
            ) from None
        except asyncio.CancelledError:
            self._observer.count("cancelled_total")
            raise
        finally:
            request.left = True  # what is still under way is dropped where it is met
            if (listening := passages.get()) is not None:
                listening.add(Passage(began_s, request.last, time.monotonic(), len(request.rows)))
            self._requests.discard(request)

    def _settled(self, settlements: list[Settlement]) -> None:
        """Takes outcomes from any thread. One wake-up of the loop serves all that come before it runs."""
        self._outbox.extend(settlements)
        if not self._wake_up_is_due and self._loop is not None:
            self._wake_up_is_due = True
            # A closed loop has no callers left who could wait.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._empty_outbox)

    def _empty_outbox(self) -> None:
        self._wake_up_is_due = False  # first: who adds from here on asks for the next wake-up
        outcomes: Counter[str] = Counter()
        while self._outbox:
            pictures, outcome = self._outbox.popleft()
            for picture in pictures:
                outcomes[self._settle(picture, outcome)] += 1
        for outcome_name, images in outcomes.items():
            self._observer.count("images_total", images, label=outcome_name)
        if self._admission.held.images == 0:
            self._idle.set()

    def _settle(self, picture: Picture, outcome: Outcome) -> str:
        """Gives one image its outcome, and its cost back; returns the outcome's name."""
        request = picture.request
        served = not isinstance(outcome, Dropped | DeviceLost)
        self._admission.release(picture.cost, lane=request.lane, served=served)
        picture.request.last = picture.stages
        match outcome:
            case Dropped():
                return "dropped"
            case DeviceLost():
                request.fail(
                    NotReady("the model's device was lost, or the service stopped: send the request again")
                )
                return "dropped"
            case ImageFailure():
                self._observer.count("image_errors_total", label=outcome.code)
                request.answer(picture.index, outcome)
                return "failed"
            case row:
                request.answer(picture.index, row)
                return "embedded"

    async def _drain(self) -> bool:
        """Waits for what is under way; whether all of it was answered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_s):
                while self._admission.held.images and self.alive and not self._given_up:
                    self._idle.clear()
                    await self._idle.wait()
        return self._admission.held.images == 0


def make_embedder(
    bundle: Bundle, *, max_batch: int | None = None, backend: Backend = "torch", threads: int = 1
) -> Embedder:
    """The embedder for the device that the bundle's model is on.

    Args:
        bundle: Loaded.
        max_batch: None for the device's default.
        backend: What computes on a CPU.
        threads: Native threads of a launch on a CPU.

    Raises:
        BundleError: The model does not take RGB pictures.
        BackendUnavailable: The backend isn't installed, disagrees with torch, or isn't for this device.
        ConversionError: The model can't be had in the format that the backend reads.
    """
    if (planes := bundle.manifest.preprocessing.planes) is not None:
        raise BundleError(
            f"{bundle.path} takes images of {planes.channels} channels scaled from their own ranges, and the "
            "service embeds RGB pictures: use `dino-train eval` on such images, or serve another model"
        )
    sizes = {} if max_batch is None else {"max_batch": max_batch}
    device = next(bundle.model.parameters()).device.type
    if device == "cpu":
        return cpu_embedder(bundle, backend, threads=threads, **sizes)
    if backend not in ("auto", "torch"):
        raise BackendUnavailable(
            f"--backend {backend} computes on the CPU, and the model is on {device}, where torch is what is "
            "measured and tested: leave --backend out, or add --device cpu"
        )
    return CudaEmbedder(bundle, **sizes)


def _bulk_capacity(config: InferenceConfig) -> Cost:
    """A part of the budgets, and any one image fits into it."""
    return Cost(
        max(1, int(config.max_images_in_flight * BULK_SHARE)),
        max(config.max_image_bytes, int(config.max_bytes_in_flight * BULK_SHARE)),
        max(config.limits.max_pixels, int(config.max_pixels_in_flight * BULK_SHARE)),
    )


def _pipeline_config(config: InferenceConfig, embedder: Embedder) -> PipelineConfig:
    cores = config.cores or cpu_budget()
    # Pinned memory means a device of the model's own. Otherwise decoders and model share the cores.
    return PipelineConfig(
        decode_threads=config.decode_threads or cores,
        decode_beside=None if config.decode_threads or embedder.pinned else max(1, cores // 2),
        compute_threads=_compute_threads(config),
        cache_rows=config.cache_rows,
        limits=config.limits,
    )


def _compute_threads(config: InferenceConfig) -> int:
    # torch's own number knows of OMP_NUM_THREADS and of hyperthreads, yet not of a container's quota.
    return config.compute_threads or min(torch.get_num_threads(), config.cores or cpu_budget())


def _result(row: Row | None, picture: Picture | None) -> ImageEmbedding | ImageFailure:
    if isinstance(row, ImageFailure):
        return row
    assert row is not None, "a request was answered with an image missing: this is a bug"
    assert picture is not None, "an image without a picture got an embedding: this is a bug"
    assert picture.header is not None, "a file got an embedding before its header was read: this is a bug"
    header = picture.header
    return ImageEmbedding(row, header.width_px, header.height_px, header.format, sha256=picture.sha256.hex())
