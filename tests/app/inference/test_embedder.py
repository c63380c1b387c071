import asyncio
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from app.inference.config import InferenceConfig
from app.inference.cuda import CudaEmbedder
from app.inference.embedder import Embedder, TorchEmbedder, batch_sizes
from app.inference.engine import Engine, ImageEmbedding, ImageFailure, make_embedder
from dino_core.backbones import make_backbone
from dino_core.bundle import Bundle, load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BundleError
from dino_core.planes import eight_bit_planes
from dino_core.preprocess import Preprocessing, load_pixels

MIN_COSINE = 0.9999  # what the product promises; the batch decides the order of sums, so that bits differ
CROP_PX = 32


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    backbone = make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=CROP_PX,
        model_kwargs={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
    )
    model = EmbeddingModel(
        backbone, preprocessing=Preprocessing(resize_px=36, crop_px=CROP_PX), pooling="cls"
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_bundle(path, model, provenance={}, card="# A tiny network of random weights\n")
    return path


@pytest.fixture(scope="module")
def bundle(bundle_dir: Path) -> Bundle:
    return load_bundle(bundle_dir)


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    """Sixty-four pictures, JPEG and PNG by turns, of different sizes: noise over a gradient."""
    rng = np.random.default_rng(0)
    files = []
    for index in range(64):
        height_px, width_px = rng.integers(30, 90, 2)
        gradient = np.linspace(0, 150, width_px)[None, :, None] * rng.random(3)
        pixels = (gradient + rng.random((height_px, width_px, 3)) * 100).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG" if index % 2 else "JPEG")
        files.append(file.getvalue())
    return files


@pytest.fixture(scope="module")
def references_ND(bundle: Bundle, files: list[bytes]) -> NDArray[np.float32]:
    """What evaluation computes: one picture at a time, through dino_core alone."""
    with torch.inference_mode():
        rows = [bundle.model(load_pixels(data, bundle.manifest.preprocessing)[None])[0] for data in files]
    return torch.stack(rows).numpy()


def row(result: ImageEmbedding | ImageFailure) -> NDArray[np.float32]:
    assert isinstance(result, ImageEmbedding), result
    return result.embedding


def assert_each_its_own(rows_ND: NDArray[np.float32], references_ND: NDArray[np.float32]) -> None:
    cosines = (rows_ND * references_ND).sum(axis=1)
    assert cosines.min() >= MIN_COSINE, f"image {cosines.argmin()} has cosine {cosines.min()}"
    nearest = (rows_ND @ references_ND.T).argmax(axis=1)
    assert nearest.tolist() == list(range(len(rows_ND))), "the test's pictures must tell themselves apart"


def test_served_alone_in_a_batch_of_64_and_among_32_callers_each_image_gets_its_reference(
    bundle: Bundle, files: list[bytes], references_ND: NDArray[np.float32]
) -> None:
    async def play() -> None:
        engine = Engine(bundle, InferenceConfig(max_batch=16, decode_threads=2, cache_rows=0))
        await engine.start()
        alone = [row((await engine.embed([data]))[0]) for data in files]
        together = [row(result) for result in await engine.embed(files)]
        rng = random.Random(0)
        found: dict[int, NDArray[np.float32]] = {}

        async def caller() -> None:
            for _ in range(6):
                chosen = rng.sample(range(len(files)), rng.randrange(1, 6))
                results = await engine.embed([files[index] for index in chosen])
                for index, result in zip(chosen, results, strict=True):
                    found[index] = row(result)
                    assert found[index] @ references_ND[index] >= MIN_COSINE

        await asyncio.gather(*(caller() for _ in range(32)))
        await engine.stop()
        assert_each_its_own(np.stack(alone), references_ND)
        assert_each_its_own(np.stack(together), references_ND)
        assert len(found) > 60

    asyncio.run(asyncio.wait_for(play(), 120))


def test_pixels_of_the_models_size_give_the_same_as_their_file(
    bundle: Bundle, files: list[bytes], references_ND: NDArray[np.float32]
) -> None:
    pixels_BCHW = torch.stack([load_pixels(data, bundle.manifest.preprocessing) for data in files])

    async def play() -> None:
        engine = Engine(bundle, InferenceConfig(decode_threads=1))
        await engine.start()
        assert engine.input_px == CROP_PX
        rows_BD = await engine.embed_pixels(pixels_BCHW.permute(0, 2, 3, 1).numpy())
        await engine.stop()
        assert_each_its_own(rows_BD, references_ND)

    asyncio.run(asyncio.wait_for(play(), 120))


def test_the_engine_says_which_model_answers(bundle: Bundle) -> None:
    model = Engine(bundle).model
    assert (model.id, model.dimensions) == ("tiny", 48)
    assert model.fingerprint == bundle.manifest.fingerprint


@pytest.mark.parametrize("count", range(1, 9))
def test_chunks_and_batch_size_do_not_change_rows(
    bundle: Bundle, files: list[bytes], references_ND: NDArray[np.float32], count: int
) -> None:
    embedder: Embedder = TorchEmbedder(bundle)
    pixels = [load_pixels(data, bundle.manifest.preprocessing) for data in files[:count]]
    rows_BD = embedder.launch(torch.stack(pixels).tensor_split(min(count, 3)))()
    assert rows_BD.dtype == np.float32
    assert rows_BD.shape == (count, 48)
    assert ((rows_BD * references_ND[:count]).sum(axis=1) >= MIN_COSINE).all()


def test_the_device_of_the_weights_chooses_the_embedder(bundle: Bundle) -> None:
    embedder = make_embedder(bundle, max_batch=3)
    assert isinstance(embedder, TorchEmbedder)
    assert embedder.max_batch == 3


@pytest.mark.parametrize(
    ("max_batch", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (64, (1, 2, 4, 8, 16, 32, 64))]
)
def test_batch_sizes_are_powers_of_two_and_the_largest(max_batch: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes(max_batch) == sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnCuda:
    # bfloat16 has 8 bits of mantissa: rows differ from float32 by up to some 1e-2, cosines by its square.
    MIN_COSINE_BFLOAT16 = 0.999

    def test_padded_graphs_give_the_references(
        self, bundle_dir: Path, files: list[bytes], references_ND: NDArray[np.float32]
    ) -> None:
        bundle = load_bundle(bundle_dir, device="cuda")
        embedder = CudaEmbedder(bundle, max_batch=16)
        for count in (1, 3, 16, 5, 16):
            pixels_BCHW = torch.stack(
                [load_pixels(data, bundle.manifest.preprocessing) for data in files[:count]]
            ).pin_memory()
            rows_BD = embedder.launch([pixels_BCHW[:1], pixels_BCHW[1:]])()
            assert ((rows_BD * references_ND[:count]).sum(axis=1) >= self.MIN_COSINE_BFLOAT16).all()

    def test_two_batches_in_flight_do_not_mix(
        self, bundle_dir: Path, files: list[bytes], references_ND: NDArray[np.float32]
    ) -> None:
        bundle = load_bundle(bundle_dir, device="cuda")
        embedder = CudaEmbedder(bundle, max_batch=8)
        pixels = [load_pixels(data, bundle.manifest.preprocessing) for data in files]
        batches = [torch.stack(pixels[start : start + 8]).pin_memory() for start in range(0, 64, 8)]
        waiting = embedder.launch([batches[0]])
        rows = []
        for batch in batches[1:]:
            following = embedder.launch([batch])
            rows.append(waiting())
            waiting = following
        rows.append(waiting())
        cosines = (np.concatenate(rows) * references_ND).sum(axis=1)
        assert cosines.min() >= self.MIN_COSINE_BFLOAT16

    def test_a_launch_between_two_others_writes_over_neither(
        self, bundle_dir: Path, files: list[bytes], references_ND: NDArray[np.float32]
    ) -> None:
        # A failed batch's halves run while its follower is in flight.
        bundle = load_bundle(bundle_dir, device="cuda")
        embedder = CudaEmbedder(bundle, max_batch=4)
        pixels = [load_pixels(data, bundle.manifest.preprocessing)[None].pin_memory() for data in files[:8]]
        embedder.launch([pixels[0]])()
        follower = embedder.launch([pixels[1]])
        for index in range(2, 8):
            assert embedder.launch([pixels[index]])()[0] @ references_ND[index] >= self.MIN_COSINE_BFLOAT16
        assert follower()[0] @ references_ND[1] >= self.MIN_COSINE_BFLOAT16

    def test_the_engine_serves_each_its_own(
        self, bundle_dir: Path, files: list[bytes], references_ND: NDArray[np.float32]
    ) -> None:
        async def play() -> None:
            engine = Engine(load_bundle(bundle_dir, device="cuda"), InferenceConfig(max_batch=16))
            await engine.start()
            rows_ND = np.stack([row(result) for result in await engine.embed(files)])
            await engine.stop()
            assert ((rows_ND * references_ND).sum(axis=1) >= self.MIN_COSINE_BFLOAT16).all()

        asyncio.run(asyncio.wait_for(play(), 120))


def test_a_model_of_other_channels_than_rgb_is_refused_in_a_sentence(tmp_path: Path) -> None:
    planes = eight_bit_planes(5)
    preprocessing = Preprocessing(resize_px=36, crop_px=32, mean=(0.5,) * 5, std=(0.5,) * 5, planes=planes)
    network = make_backbone("test_resnet", in_channels=5)
    write_bundle(
        tmp_path / "five",
        EmbeddingModel(network, preprocessing=preprocessing, pooling="mean"),
        provenance={},
        card="# Five\n",
    )
    with pytest.raises(BundleError, match="images of 5 channels .* the service embeds RGB pictures: use"):
        make_embedder(load_bundle(tmp_path / "five"))
