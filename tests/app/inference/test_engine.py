import asyncio
import hashlib
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.errors import DeadlineExceeded, InvalidPixels, NotReady, Overloaded, TooLarge
from app.inference.batcher import DeviceLost, OutOfRoom
from app.inference.config import InferenceConfig
from app.inference.embedder import Collect
from app.inference.engine import Engine, ImageEmbedding, ImageFailure
from app.inference.headers import header_of
from app.inference.stats import EngineStats
from dino_core.preprocess import ImageHeader, ImageLimits, Preprocessing, load_pixels
from tests.app.inference.colours import PIXELS_PX, Colour, ColourEmbedder, colour_of, picture

RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)
Scenario = Callable[[Engine], Coroutine[Any, Any, None]]


def run(
    scenario: Scenario,
    embedder: ColourEmbedder,
    *,
    stats: EngineStats | None = None,
    timeout_s: float = 60,
    **config: object,
) -> None:
    """Starts an engine on the embedder, plays the scenario and stops the engine, within the timeout."""

    async def play() -> None:
        async with asyncio.timeout(timeout_s):
            options: dict[str, Any] = {"decode_threads": 2, **config}
            engine = Engine(embedder, InferenceConfig(**options), observer=stats)
            await engine.start()
            try:
                await scenario(engine)
            finally:
                embedder.open.set()
                await engine.stop()

    asyncio.run(play())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def colours(results: list[ImageEmbedding | ImageFailure]) -> list[Colour | str]:
    return [
        result.code if isinstance(result, ImageFailure) else colour_of(result.embedding) for result in results
    ]


async def device_busy(engine: Engine, embedder: ColourEmbedder) -> "asyncio.Task[Any]":
    """A task whose one image is in the middle of its launch and stays there until `embedder.open` is set."""
    embedder.open.clear()
    embedder.entered.clear()
    task = asyncio.create_task(engine.embed([picture(GREY)]))
    await until(embedder.entered.is_set)
    return task


def test_an_image_gets_its_embedding_and_what_its_file_is() -> None:
    data = picture(RED, size_px=(40, 30))

    async def scenario(engine: Engine) -> None:
        (result,) = await engine.embed([data])
        assert isinstance(result, ImageEmbedding)
        assert result.embedding.tolist() == list(RED)
        assert result.embedding.dtype == np.float32
        assert (result.width, result.height, result.format) == (40, 30, "PNG")
        assert result.sha256 == hashlib.sha256(data).hexdigest()

    run(scenario, ColourEmbedder())


def test_results_are_in_the_order_of_the_images() -> None:
    sent: list[Colour] = [(value, 255 - value, value // 2) for value in range(1, 120)]

    async def scenario(engine: Engine) -> None:
        assert colours(await engine.embed([picture(colour) for colour in sent])) == sent

    run(scenario, ColourEmbedder(max_batch=8))


def test_bad_pictures_get_their_own_errors_and_the_good_ones_their_embeddings() -> None:
    images = [
        picture(RED),
        b"",
        b"a text file",
        picture(GREEN)[:60],
        picture(BLUE, size_px=(1, 1)),
        picture(GREEN),
    ]
    stats = EngineStats()

    async def scenario(engine: Engine) -> None:
        results = colours(await engine.embed([*images, picture(GREY, size_px=(200, 200))]))
        assert results[:3] == [RED, "empty_image", "unsupported_format"]
        assert results[3] in {"truncated_image", "undecodable_image"}
        assert results[4:] == ["image_too_small", GREEN, "image_too_large"]

    run(scenario, ColourEmbedder(), limits=ImageLimits(max_pixels=10_000), stats=stats)
    assert stats.totals["images_total", "embedded"] == 2
    assert stats.totals["images_total", "failed"] == 5
    assert stats.totals["image_errors_total", "unsupported_format"] == 1


def test_a_file_above_the_byte_limit_is_its_own_failure_with_limit_and_actual() -> None:
    large = picture(RED) + b"\0" * 2000

    async def scenario(engine: Engine) -> None:
        failure, other = await engine.embed([large, picture(GREEN)])
        assert isinstance(failure, ImageFailure)
        assert (failure.code, failure.limit, failure.actual) == ("image_too_large", 1000, len(large))
        assert isinstance(other, ImageEmbedding)

    run(scenario, ColourEmbedder(), max_image_bytes=1000)


def test_a_request_without_images_and_one_with_only_bad_ones_are_answered() -> None:
    async def scenario(engine: Engine) -> None:
        assert await engine.embed([]) == []
        assert colours(await engine.embed([b"", b"x"])) == ["empty_image", "unsupported_format"]

    run(scenario, ColourEmbedder())


def test_an_image_that_breaks_the_model_fails_alone() -> None:
    embedder = ColourEmbedder(max_batch=8)
    embedder.poison = BLUE

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        others = asyncio.create_task(engine.embed([picture(RED), picture(BLUE), picture(GREEN)]))
        neighbour = asyncio.create_task(engine.embed([picture((1, 2, 3))]))
        await until(lambda: engine.gauges()["queue_depth"] == 4)
        embedder.open.set()
        assert colours(await others) == [RED, "embedding_failed", GREEN]
        assert colours(await neighbour) == [(1, 2, 3)]
        assert colours(await busy) == [GREY]
        assert engine.alive
        assert engine.ready

    run(scenario, embedder)


class SmallMemory(ColourEmbedder):
    """Has room for two pictures at once."""

    def __init__(self, *, full_at: str) -> None:
        super().__init__(max_batch=8)
        self.full_at = full_at
        self.full_launches = 0  # the start has two: one to warm up, and one to measure
        self.tried: list[int] = []

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        size = sum(len(chunk) for chunk in chunks)
        if self.full_launches < 2 and self.full_at != "warm-up":
            self.full_launches += size == self.max_batch
            return super().launch(chunks)
        self.tried.append(size)
        if size <= 2:
            return super().launch(chunks)
        if self.full_at == "collect":
            return self._refuse
        return self._refuse()

    def _refuse(self) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("full_at", ["launch", "collect", "warm-up"])
def test_a_device_without_memory_for_a_batch_gets_smaller_ones(full_at: str) -> None:
    embedder = SmallMemory(full_at=full_at)
    sent: list[Colour] = [(value, 7, 7) for value in range(1, 41)]

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        waiting = asyncio.create_task(engine.embed([picture(colour) for colour in sent]))
        await until(lambda: engine._pipeline.batcher.depth >= 8)
        embedder.open.set()
        assert colours(await waiting) == sent
        assert colours(await busy) == [GREY]
        assert engine.ready

    run(scenario, embedder)
    refused = [size for size in embedder.tried if size > 2]
    assert refused == ([4] if full_at == "warm-up" else [8, 4])


def test_a_model_that_does_not_fit_at_all_fails_the_start() -> None:
    class TooLarge(ColourEmbedder):
        def launch(self, chunks: Sequence[Tensor]) -> Collect:
            raise torch.OutOfMemoryError("CUDA out of memory")

    async def play() -> None:
        engine = Engine(TooLarge(), InferenceConfig(decode_threads=2))
        with pytest.raises(OutOfRoom):
            await engine.start()
        assert not engine.ready

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_row_that_is_not_finite_is_its_images_failure() -> None:
    embedder = ColourEmbedder()
    embedder.nan = GREEN

    async def scenario(engine: Engine) -> None:
        sent = [picture(RED), picture(GREEN), picture(BLUE)]
        assert colours(await engine.embed(sent)) == [RED, "embedding_failed", BLUE]
        embedder.nan = None
        assert colours(await engine.embed(sent)) == [RED, GREEN, BLUE], "the failure was not kept"

    run(scenario, embedder)


def test_embeddings_of_another_length_than_the_models_reach_nobody() -> None:
    embedder = ColourEmbedder()
    embedder.cut = GREEN

    async def scenario(engine: Engine) -> None:
        sent = [picture(RED), picture(GREEN), picture(BLUE)]
        assert colours(await engine.embed(sent)) == [RED, "embedding_failed", BLUE]

    run(scenario, embedder)


def test_a_lost_device_fails_who_waits_refuses_who_comes_and_turns_alive_false() -> None:
    embedder = ColourEmbedder()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        waiting = asyncio.create_task(engine.embed([picture(RED), b"no picture"]))
        await until(lambda: engine.gauges()["queue_depth"] == 1)
        embedder.error = DeviceLost()
        embedder.open.set()
        for task in (busy, waiting):
            with pytest.raises(NotReady, match="device was lost"):
                await task
        assert not engine.alive
        assert not engine.ready
        with pytest.raises(NotReady, match="restarted"):
            await engine.embed([picture(RED)])

    run(scenario, embedder)


def test_a_batch_that_hangs_turns_alive_false() -> None:
    embedder = ColourEmbedder()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        await until(lambda: not engine.alive)
        embedder.open.set()
        await busy
        assert engine.alive

    run(scenario, embedder, stall_s=0.1)


def test_a_dead_decoder_turns_alive_false_and_its_picture_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise SystemExit("a decoder's end")

    monkeypatch.setattr("app.inference.pipeline.load_pixels", die)

    async def scenario(engine: Engine) -> None:
        assert colours(await engine.embed([picture(RED)])) == ["undecodable_image"]
        await until(lambda: not engine.alive)

    run(scenario, ColourEmbedder())


def test_a_decoder_that_fails_in_an_unforeseen_way_costs_one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_on_red(data: bytes, preprocessing: Preprocessing, *, limits: ImageLimits) -> Tensor:
        if data == picture(RED):
            raise ZeroDivisionError
        return load_pixels(data, preprocessing, limits=limits)

    monkeypatch.setattr("app.inference.pipeline.load_pixels", fail_on_red)

    async def scenario(engine: Engine) -> None:
        for _ in range(40):  # more than there are slots: each failure gives its slot back
            sent = [picture(GREEN), picture(RED), picture(BLUE)]
            assert colours(await engine.embed(sent)) == [GREEN, "undecodable_image", BLUE]
        assert engine.ready

    run(scenario, ColourEmbedder(max_batch=2), cache_rows=0)


def test_a_cancelled_callers_images_are_never_launched() -> None:
    embedder = ColourEmbedder(max_batch=2)
    stats = EngineStats()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        gone = [picture((value, 0, 7)) for value in range(30)]  # more than slots: some decoded, some not
        leaver = asyncio.create_task(engine.embed(gone))
        await until(lambda: engine.gauges()["inflight_images"] == 31)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        stayer = asyncio.create_task(engine.embed([picture(RED)]))
        await asyncio.sleep(0)
        embedder.open.set()
        assert colours(await stayer) == [RED]
        assert colours(await busy) == [GREY]
        await until(lambda: engine.gauges()["inflight_images"] == 0)

    run(scenario, embedder, stats=stats)
    assert embedder.launched == [GREY, RED]
    assert stats.totals["cancelled_total", ""] == 1
    assert stats.totals["images_total", "dropped"] == 30


def test_a_request_past_its_deadline_is_answered_so_and_never_launched() -> None:
    embedder = ColourEmbedder()
    stats = EngineStats()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        with pytest.raises(DeadlineExceeded, match=r"after 0\.05 s"):
            await engine.embed([picture(RED)], deadline_s=0.05)
        embedder.open.set()
        await busy
        await until(lambda: engine.gauges()["inflight_images"] == 0)

    run(scenario, embedder, stats=stats)
    assert embedder.launched == [GREY]
    assert stats.totals["deadline_exceeded_total", ""] == 1


def test_a_request_enters_whole_or_not_at_all() -> None:
    embedder = ColourEmbedder()
    stats = EngineStats()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        with pytest.raises(Overloaded) as refused:
            await engine.embed([picture(RED)] * 3)
        assert refused.value.reason == "images"
        assert refused.value.retry_after_s > 0
        assert engine.gauges()["inflight_images"] == 1
        last = asyncio.create_task(engine.embed([picture(GREEN)] * 2))
        await until(lambda: engine.gauges()["inflight_images"] == 3)
        embedder.open.set()
        assert colours(await last) == [GREEN, GREEN]
        await busy
        assert colours(await engine.embed([picture(RED)] * 3)) == [RED] * 3

    run(scenario, embedder, max_images_in_flight=3, max_images_per_request=3, stats=stats)
    assert stats.totals["rejected_total", "images"] == 1
    assert embedder.launched.count(RED) == 1, "the refused request did no work"


def test_a_request_that_could_never_enter_is_too_large() -> None:
    async def scenario(engine: Engine) -> None:
        with pytest.raises(TooLarge) as refused:
            await engine.embed([picture(RED)] * 4)
        assert (refused.value.limit, refused.value.actual) == (3, 4)

    run(scenario, ColourEmbedder(), max_images_per_request=3)


def test_identical_images_in_flight_are_computed_once_and_later_ones_not_at_all() -> None:
    embedder = ColourEmbedder(max_batch=8)
    stats = EngineStats()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        tasks = [asyncio.create_task(engine.embed([picture(RED), picture(GREEN)])) for _ in range(5)]
        await until(lambda: stats.totals["cache_hits_total", "in_flight"] == 8)
        embedder.open.set()
        for task in tasks:
            assert colours(await task) == [RED, GREEN]
        await busy
        assert colours(await engine.embed([picture(GREEN)])) == [GREEN]

    run(scenario, embedder, stats=stats)
    assert sorted(embedder.launched) == sorted([GREY, RED, GREEN])
    assert stats.totals["cache_hits_total", "stored"] == 1


def test_who_shares_an_image_still_gets_it_when_the_first_caller_leaves() -> None:
    embedder = ColourEmbedder()
    stats = EngineStats()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        leader = asyncio.create_task(engine.embed([picture(RED)]))
        await until(lambda: engine.gauges()["queue_depth"] == 1)
        follower = asyncio.create_task(engine.embed([picture(RED)]))
        await until(lambda: stats.totals["cache_hits_total", "in_flight"] == 1)
        leader.cancel()
        await asyncio.sleep(0)
        embedder.open.set()
        assert colours(await follower) == [RED]
        await busy

    run(scenario, embedder, stats=stats)


def test_an_interactive_picture_overtakes_bulk_that_has_filled_decoders_and_slots() -> None:
    embedder = ColourEmbedder(max_batch=2)

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        of_bulk: list[Colour] = [(value, 5, 5) for value in range(1, 41)]
        bulk = asyncio.create_task(engine.embed([picture(colour) for colour in of_bulk], lane="bulk"))
        batcher = engine._pipeline.batcher
        await until(lambda: batcher.depth == 4)  # as much of bulk as may be begun: two batches
        one = asyncio.create_task(engine.embed([picture(RED)]))
        await until(lambda: batcher.depth == 5)
        embedder.open.set()
        assert colours(await one) == [RED]
        assert colours(await bulk) == of_bulk
        assert colours(await busy) == [GREY]

    run(scenario, embedder, decode_threads=1)
    assert embedder.batches[:2] == [[GREY], [RED]]


def test_bulk_moves_on_though_interactive_pictures_always_wait() -> None:
    embedder = ColourEmbedder(max_batch=1)

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        bulk = asyncio.create_task(
            engine.embed([picture((value, 5, 5)) for value in range(1, 4)], lane="bulk")
        )
        many = asyncio.create_task(engine.embed([picture((value, 9, 9)) for value in range(1, 101)]))
        await until(lambda: engine.gauges()["inflight_images"] == 104)
        embedder.open.set()
        await bulk
        assert not many.done()
        await asyncio.gather(many, busy)

    run(scenario, embedder)


def test_bulk_leaves_room_for_interactive_requests() -> None:
    embedder = ColourEmbedder()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        bulk = asyncio.create_task(
            engine.embed([picture((value, 5, 5)) for value in range(1, 6)], lane="bulk")
        )
        await until(lambda: engine.gauges()["inflight_bulk_images"] == 5)
        with pytest.raises(Overloaded, match="bulk requests"):
            await engine.embed([picture(BLUE)], lane="bulk")
        one = asyncio.create_task(engine.embed([picture(RED)] * 4))
        await until(lambda: engine.gauges()["inflight_images"] == 10)
        embedder.open.set()
        await asyncio.gather(busy, bulk, one)
        assert engine.gauges()["inflight_bulk_images"] == 0

    run(scenario, embedder, max_images_in_flight=10, max_images_per_request=10)


def test_a_bulk_picture_that_an_interactive_caller_also_waits_for_becomes_interactive() -> None:
    embedder = ColourEmbedder(max_batch=1)
    stats = EngineStats()

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        bulk = asyncio.create_task(engine.embed([picture(BLUE), picture(RED)], lane="bulk"))
        await until(lambda: engine._pipeline.batcher.depth == 2)
        joins = asyncio.create_task(engine.embed([picture(RED)]))
        await until(lambda: stats.totals["cache_hits_total", "in_flight"] == 1)
        embedder.open.set()
        assert colours(await joins) == [RED]
        assert colours(await bulk) == [BLUE, RED]
        await busy

    run(scenario, embedder, stats=stats)
    assert embedder.launched == [GREY, RED, BLUE]


def test_a_decoder_that_hangs_turns_alive_false_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def hang_on_red(data: bytes, preprocessing: Preprocessing, *, limits: ImageLimits) -> Tensor:
        if data == picture(RED):
            assert go_on.wait(timeout=20)
        return load_pixels(data, preprocessing, limits=limits)

    monkeypatch.setattr("app.inference.pipeline.load_pixels", hang_on_red)

    async def scenario(engine: Engine) -> None:
        slow = asyncio.create_task(engine.embed([picture(RED)]))
        await until(lambda: engine.gauges()["inflight_images"] == 1)
        assert colours(await engine.embed([picture(GREEN), picture(BLUE)])) == [GREEN, BLUE]
        await until(lambda: not engine.alive)
        go_on.set()
        assert colours(await slow) == [RED]
        await until(lambda: engine.alive)

    run(scenario, ColourEmbedder(), stall_s=0.3)


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("dino-")}


def test_stop_answers_what_is_under_way_and_refuses_what_comes() -> None:
    embedder = ColourEmbedder(max_batch=2)

    before = our_threads()  # other tests' services may still run in this process

    async def play() -> None:
        engine = Engine(embedder, InferenceConfig(decode_threads=2))
        with pytest.raises(NotReady, match="starting or stopping"):
            await engine.embed([picture(RED)])
        assert not engine.ready
        await engine.start()
        busy = await device_busy(engine, embedder)
        waiting = asyncio.create_task(engine.embed([picture((value, 1, 1)) for value in range(20)]))
        await until(lambda: engine.gauges()["inflight_images"] == 21)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0.01)
        with pytest.raises(NotReady):
            await engine.embed([picture(RED)])
        assert not engine.ready
        embedder.open.set()
        assert colours(await waiting) == [(value, 1, 1) for value in range(20)]
        assert colours(await busy) == [GREY]
        await stopping
        assert not our_threads() - before

    asyncio.run(asyncio.wait_for(play(), 60))


def test_stop_fails_what_it_can_not_finish_in_time() -> None:
    embedder = ColourEmbedder(max_batch=2)

    async def play() -> None:
        engine = Engine(embedder, InferenceConfig(decode_threads=2, drain_s=0.05))
        await engine.start()
        busy = await device_busy(engine, embedder)
        waiting = asyncio.create_task(engine.embed([picture((value, 1, 1)) for value in range(20)]))
        await until(lambda: engine.gauges()["inflight_images"] == 21)
        stopping = asyncio.create_task(engine.stop())
        with pytest.raises(NotReady, match="service stopped"):
            await waiting
        embedder.open.set()
        assert colours(await busy) == [GREY]
        await stopping
        assert embedder.launched == [GREY]

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_request_whose_headers_are_read_while_the_engine_stops_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def slow(data: bytes, config: InferenceConfig) -> ImageHeader | ImageFailure:
        reading.set()
        assert go_on.wait(timeout=20)
        return header_of(data, config)

    monkeypatch.setattr("app.inference.engine.header_of", slow)

    async def scenario(engine: Engine) -> None:
        late = asyncio.create_task(engine.embed([picture(RED)] * 20))  # many: read beside the loop
        await until(reading.is_set)
        stopping = asyncio.create_task(engine.stop())
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(NotReady, match="starting or stopping"):
            await late
        await stopping

    run(scenario, ColourEmbedder())


def test_a_model_that_fails_in_warm_up_fails_the_start_and_leaves_no_threads() -> None:
    class Broken(ColourEmbedder):
        def launch(self, chunks: Sequence[Tensor]) -> Collect:
            raise RuntimeError("no such kernel")

    before = our_threads()

    async def play() -> None:
        engine = Engine(Broken(), InferenceConfig(decode_threads=2))
        with pytest.raises(RuntimeError, match="no such kernel"):
            await engine.start()
        assert not engine.ready
        await engine.stop()
        assert not our_threads() - before

    asyncio.run(asyncio.wait_for(play(), 60))


def test_pixels_are_embedded_in_order_and_writing_protection_is_no_obstacle() -> None:
    sent: list[Colour] = [(value, 3, 250) for value in range(1, 60)]
    pixels = np.broadcast_to(np.array(sent, np.uint8)[:, None, None, :], (len(sent), PIXELS_PX, PIXELS_PX, 3))

    async def scenario(engine: Engine) -> None:
        rows = await engine.embed_pixels(pixels)
        assert [colour_of(row) for row in rows] == sent

    run(scenario, ColourEmbedder(max_batch=8))


def test_pixels_that_the_model_gives_nothing_for_are_rows_of_nan() -> None:
    embedder = ColourEmbedder()
    embedder.poison = GREEN
    pixels = np.empty((2, PIXELS_PX, PIXELS_PX, 3), np.uint8)
    pixels[:] = np.array([RED, GREEN], np.uint8)[:, None, None]

    async def scenario(engine: Engine) -> None:
        rows = await engine.embed_pixels(pixels)
        assert colour_of(rows[0]) == RED
        assert np.isnan(rows[1]).all()

    run(scenario, embedder)


@pytest.mark.parametrize(
    "pixels",
    [
        pytest.param(np.zeros((1, PIXELS_PX, PIXELS_PX, 3), np.float32), id="floats"),
        pytest.param(np.zeros((1, 3, PIXELS_PX, PIXELS_PX), np.uint8), id="channels first"),
        pytest.param(np.zeros((PIXELS_PX, PIXELS_PX, 3), np.uint8), id="no batch axis"),
        pytest.param(np.zeros((), np.uint8), id="a number"),
    ],
)
def test_an_array_that_is_no_batch_of_pixels_is_refused(pixels: NDArray[np.uint8]) -> None:
    async def scenario(engine: Engine) -> None:
        with pytest.raises(InvalidPixels, match=rf"expected uint8 \[images, {PIXELS_PX}, {PIXELS_PX}, 3\]"):
            await engine.embed_pixels(pixels)

    run(scenario, ColourEmbedder())


def test_a_batch_wakes_the_loop_once() -> None:
    embedder = ColourEmbedder(max_batch=16)

    async def scenario(engine: Engine) -> None:
        busy = await device_busy(engine, embedder)
        tasks = [asyncio.create_task(engine.embed([picture((value, 9, 9))])) for value in range(16)]
        await until(lambda: engine.gauges()["queue_depth"] == 16)
        wake_ups = 0
        empty_outbox = engine._empty_outbox

        def counted() -> None:
            nonlocal wake_ups
            wake_ups += 1
            empty_outbox()

        engine._empty_outbox = counted  # type: ignore[method-assign]
        embedder.open.set()
        await asyncio.gather(busy, *tasks)
        assert 1 <= wake_ups <= len(embedder.batches) < 17

    run(scenario, embedder)


def test_every_caller_gets_its_own_under_load_with_leavers_bad_images_and_duplicates() -> None:
    embedder = ColourEmbedder(max_batch=8)
    embedder.poison = (13, 13, 13)
    stats = EngineStats()
    rng = random.Random(0)

    def some_image() -> tuple[bytes, Colour | str]:
        match rng.randrange(10):
            case 0:
                return b"not a picture", "unsupported_format"
            case 1:
                return picture((13, 13, 13)), "embedding_failed"
            case 2:
                return picture(RED), RED  # in many requests at once
            case _:
                colour = (rng.randrange(1, 256), rng.randrange(256), rng.randrange(256))
                return picture(colour), colour if colour != embedder.poison else "embedding_failed"

    async def caller(engine: Engine, *, leaves: bool) -> bool:
        chosen = [some_image() for _ in range(rng.randrange(1, 6))]
        task = asyncio.create_task(engine.embed([data for data, _ in chosen]))
        if leaves:
            await asyncio.sleep(rng.random() * 0.01)
            task.cancel()
        try:
            assert colours(await task) == [expected for _, expected in chosen]
        except asyncio.CancelledError:
            return False
        return True

    async def scenario(engine: Engine) -> None:
        async def client() -> list[bool]:
            return [await caller(engine, leaves=rng.random() < 0.3) for _ in range(12)]

        answered = [each for one in await asyncio.gather(*(client() for _ in range(32))) for each in one]
        assert sum(answered) > len(answered) // 2
        await until(lambda: engine.gauges()["inflight_images"] == 0)
        gauges = engine.gauges()
        assert gauges["inflight_bytes"] == gauges["queue_pixels"] == gauges["queue_depth"] == 0
        ring = engine._pipeline._ring
        assert ring.free == len(ring.pixels_RCHW), "every slot came back"

    run(scenario, embedder, stats=stats)
    assert len(embedder.batches) < len(embedder.launched), "nothing was ever batched"
