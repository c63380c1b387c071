import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from app.errors import OutputUnavailable, TooLarge
from app.inference.config import InferenceConfig
from app.inference.engine import Engine, ImageEmbedding, ImageFailure
from app.inference.features import Array, FeatureReader, Reading
from app.inference.results import ImageFailure as Failure
from dino_core.bundle import Bundle, load_bundle
from tests.app.running import picture, write_tiny_bundle

FILES = [picture(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("features") / "tiny"))


class Started:
    """An engine that runs for the length of a block."""

    def __init__(self, bundle: Bundle, **config: int) -> None:
        self._engine = Engine(bundle, InferenceConfig(decode_threads=2, **config))  # type: ignore[arg-type]

    async def __aenter__(self) -> Engine:
        await self._engine.start()
        return self._engine

    async def __aexit__(self, *_: object) -> None:
        await self._engine.stop()


def test_wishes_of_one_batch_get_each_what_they_want(bundle: Bundle) -> None:
    async def play() -> None:
        async with Started(bundle) as engine:
            readings: list[Reading | None] = [None, "patches", "mean", "attention", "cls+mean", "cls"]
            answers = await asyncio.gather(*(engine.embed(FILES, reading=reading) for reading in readings))
            for reading, results in zip(readings, answers, strict=True):
                shapes = {one.embedding.shape for one in results if isinstance(one, ImageEmbedding)}
                assert shapes == {engine.shape_of(reading)}
            # Each by itself is the same: nothing got another's row.
            for reading, results in zip(readings, answers, strict=True):
                for file, result in zip(FILES, results, strict=True):
                    (alone,) = await engine.embed([file], reading=reading)
                    assert isinstance(alone, ImageEmbedding)
                    assert isinstance(result, ImageEmbedding)
                    np.testing.assert_allclose(result.embedding, alone.embedding, atol=2e-5, rtol=1e-4)

    asyncio.run(play())


def test_only_embeddings_are_kept(bundle: Bundle) -> None:
    async def play() -> None:
        async with Started(bundle) as engine:
            await engine.embed(FILES, reading="patches")
            assert len(engine._pipeline._cache) == 0
            await engine.embed(FILES)
            assert len(engine._pipeline._cache) == len(FILES)

    asyncio.run(play())


def test_admission_counts_the_bytes_of_the_answer(bundle: Bundle) -> None:
    files = sum(map(len, FILES))
    patches = len(FILES) * 16 * 48 * 4

    async def play(room: int) -> None:
        async with Started(bundle, max_bytes_in_flight=room) as engine:
            assert len(await engine.embed(FILES)) == len(FILES)
            assert len(await engine.embed(FILES, reading="patches")) == len(FILES)

    asyncio.run(play(files + patches))
    with pytest.raises(TooLarge, match="bytes"):
        asyncio.run(play(files + patches - 1))


def test_a_picture_that_breaks_the_network_fails_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> list[ImageEmbedding | ImageFailure]:
        async with Started(bundle) as engine:
            assert engine.features is not None
            whole = engine.features.read

            def read(reading: Reading, chunks: Sequence[Tensor]) -> Array:
                values = whole(reading, chunks)
                if len(values) > 1:
                    raise RuntimeError("the kernel bears one image at a time")
                return np.full_like(values, np.nan) if values[0, 0, 0] < threshold else values

            embedded = await engine.embed(FILES, reading="patches")
            firsts = [float(one.embedding[0, 0]) for one in embedded if isinstance(one, ImageEmbedding)]
            threshold = sorted(firsts)[1]
            monkeypatch.setattr(engine.features, "read", read)
            return await engine.embed(FILES, reading="patches")

    results = asyncio.run(play())
    failed = [one for one in results if isinstance(one, Failure)]
    assert [one.code for one in failed] == ["embedding_failed"]
    assert len(results) == len(FILES)


def test_what_is_not_there_is_said_before_any_work(tmp_path: Path) -> None:
    reader = FeatureReader(load_bundle(write_tiny_bundle(tmp_path / "tiny")))
    with pytest.raises(OutputUnavailable, match="not warmed up"):
        reader.shape_of("patches")
    reader.warm_up()
    assert reader.shape_of("patches") == (16, 48)
    assert reader.shape_of("attention") == (3, 4, 4)
    assert reader.grid_hw == (4, 4)


def test_attention_leaves_out_what_prefix_tokens_are_looked_at(bundle: Bundle) -> None:
    reader = FeatureReader(bundle)
    pixels_BCHW = torch.randint(0, 255, (10, 3, 32, 32), dtype=torch.uint8)
    maps_BAYX = reader.read("attention", [pixels_BCHW[:3], pixels_BCHW[3:]])
    with torch.inference_mode():
        weights_BATT = bundle.model.attention(pixels_BCHW)
    np.testing.assert_allclose(maps_BAYX.reshape(10, 3, 16), weights_BATT[:, :, 0, 1:].numpy(), atol=1e-6)
