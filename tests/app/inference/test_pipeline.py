import os
import sys
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from app.inference.embedder import Collect
from app.inference.pipeline import Pipeline, PipelineConfig, Settlement
from app.inference.stats import EngineStats
from app.inference.work import Picture, Work
from dino_core.preprocess import ImageLimits, Preprocessing, load_pixels
from tests.app.inference.colours import Colour, ColourEmbedder, colour_of, picture
from tests.app.inference.test_cache import picture_of

CONFIG = PipelineConfig(decode_threads=1, compute_threads=3, cache_rows=0, limits=ImageLimits())


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Watching(ColourEmbedder):
    """Notes how its pixels come and with how many native threads it computes."""

    def __init__(self) -> None:
        super().__init__(max_batch=8)
        self.chunk_sizes: list[list[int]] = []
        self.native_threads: set[int] = set()

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        self.chunk_sizes.append([len(chunk) for chunk in chunks])
        self.native_threads.add(torch.get_num_threads())
        return super().launch(chunks)


def test_neighbouring_slots_go_as_one_chunk_whatever_the_order_of_their_works_and_rows_come_back_in_it() -> (
    None
):
    embedder = Watching()
    pipeline = Pipeline(embedder, lambda _: None, config=CONFIG, observer=EngineStats())
    colours: list[Colour] = [(1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (5, 0, 0)]
    works = [Work([picture_of(b"")], slot=slot) for slot in (7, 3, 2, 4)]
    works.insert(1, Work([picture_of(b"")], pixels_CHW=torch.empty((3, 16, 16), dtype=torch.uint8)))
    for work, colour in zip(works, colours, strict=True):
        pixels_CHW = work.pixels_CHW if work.slot is None else pipeline._ring.pixels_RCHW[work.slot]
        assert pixels_CHW is not None
        pixels_CHW[:] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    rows = pipeline._launch(works)()
    assert [colour_of(row) for row in rows if isinstance(row, np.ndarray)] == colours
    assert embedder.chunk_sizes == [[3, 1, 1]]


def test_decoders_have_one_native_thread_each_and_the_device_thread_those_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_decoders: set[int] = set()

    def watched(data: bytes, preprocessing: Preprocessing, *, limits: ImageLimits) -> Tensor:
        of_decoders.add(torch.get_num_threads())
        return load_pixels(data, preprocessing, limits=limits)

    monkeypatch.setattr("app.inference.pipeline.load_pixels", watched)
    embedder = Watching()
    settled: list[Picture] = []
    done = threading.Event()

    def settle(settlements: list[Settlement]) -> None:
        settled.extend(each for pictures, _ in settlements for each in pictures)
        done.set()

    pipeline = Pipeline(embedder, settle, config=CONFIG, observer=EngineStats())
    pipeline.start()
    pipeline.submit(picture_of(picture((9, 8, 7))))
    assert done.wait(timeout=20)
    pipeline.close(drain=True, timeout_s=20)
    assert of_decoders == {1}
    assert embedder.native_threads == {3}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness is the process's")
def test_decoders_and_the_device_thread_are_nicer_than_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    niceness: dict[str, int] = {}

    def note(name: str) -> None:
        niceness[name] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def watched(data: bytes, preprocessing: Preprocessing, *, limits: ImageLimits) -> Tensor:
        note("decoder")
        return load_pixels(data, preprocessing, limits=limits)

    class Noting(Watching):
        def launch(self, chunks: Sequence[Tensor]) -> Collect:
            note("device")
            return super().launch(chunks)

    monkeypatch.setattr("app.inference.pipeline.load_pixels", watched)
    done = threading.Event()
    pipeline = Pipeline(Noting(), lambda _: done.set(), config=CONFIG, observer=EngineStats())
    pipeline.start()
    pipeline.submit(picture_of(picture((9, 8, 7))))
    assert done.wait(timeout=20)
    pipeline.close(drain=True, timeout_s=20)
    note("loop")
    assert niceness["decoder"] == niceness["device"] == min(niceness["loop"] + 5, 19)


def test_every_batch_size_is_warmed_up_before_the_first_picture() -> None:
    embedder = Watching()
    pipeline = Pipeline(embedder, lambda _: None, config=CONFIG, observer=EngineStats())
    pipeline.start()
    pipeline.close(drain=True, timeout_s=20)
    assert embedder.chunk_sizes == [[1], [2], [4], [8], [1], [8]]  # the last two are measured
