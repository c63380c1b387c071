"""Backends on the CPU: each computes what torch does, the fastest is taken and named, a wrong one refused."""

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from app.inference import backends
from app.inference.backends import cpu_embedder
from app.inference.config import Backend, InferenceConfig
from app.inference.converted import onnx_of
from app.inference.embedder import BackendUnavailable, Collect, Embedder, TorchEmbedder
from app.inference.engine import Engine, make_embedder
from app.inference.onnxruntime import OnnxRuntimeEmbedder
from app.inference.openvino import OpenVinoEmbedder
from app.inference.results import Matrix
from dino_core.backbones import Backbone, make_backbone
from dino_core.bundle import Bundle, load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing

PX = 32
ATOL = 1e-5  # of unit vectors in float32, in another order of sums; measured 3e-7


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Converted models are kept between these tests, and not in the home of who runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def _written(path: Path, backbone: Backbone) -> Bundle:
    model = EmbeddingModel(
        backbone, preprocessing=Preprocessing(resize_px=36, crop_px=PX), pooling=backbone.default_pooling
    )
    write_bundle(path, model, provenance={}, card="# Random weights\n")
    return load_bundle(path)


def _vit(built_px: int) -> Backbone:
    torch.manual_seed(0)
    backbone = make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=built_px,
        model_kwargs={"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    )
    nn.init.normal_(backbone.network.get_parameter("pos_embed"))  # so large that they decide the embedding
    return backbone


def _convolutional() -> Backbone:
    torch.manual_seed(0)
    backbone = make_backbone("tf_efficientnet_lite0", image_size_px=PX)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: statistics that matter
            nn.init.uniform_(module.get_buffer("running_mean"), -0.1, 0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    return backbone


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Built for another image size, so that positions are resampled."""
    return _written(tmp_path_factory.mktemp("models") / "vit", _vit(64))


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return _written(tmp_path_factory.mktemp("models") / "convolutional", _convolutional())


def pixels(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, PX, PX), dtype=torch.uint8, generator=generator)


def needs(backend: str) -> None:
    """Skips where a package is missing. Looks without importing, as an import of openvino is not silent."""
    packages = [] if backend == "torch" else ["onnx", "onnxscript", "onnxruntime", backend]
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.mark.parametrize("network", ["vit", "convolutional"])
@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_embeddings_are_the_models_in_any_batch_and_in_any_memory_order(
    backend: Backend, network: str, request: pytest.FixtureRequest
) -> None:
    needs(backend)
    bundle: Bundle = request.getfixturevalue(network)
    with torch.inference_mode():
        expected_BD = bundle.model(pixels(9)).numpy()
    embedder = cpu_embedder(bundle, backend, max_batch=9)
    assert embedder.model.backend == backend
    for chunks in (
        [pixels(9)],
        [pixels(9).contiguous(memory_format=torch.channels_last)],  # as the ring's slots are
        [pixels(9)[:1], pixels(9)[1:4], pixels(9)[4:]],
        [pixels(9)[:1]],
    ):
        rows_BD = embedder.launch(chunks)()
        assert rows_BD.dtype == np.float32
        np.testing.assert_allclose(rows_BD, expected_BD[: len(rows_BD)], atol=ATOL)
    assert len(rows_BD) == 1


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_rows_stay_as_they_are_when_the_next_batch_is_computed(backend: Backend, vit: Bundle) -> None:
    needs(backend)
    embedder = cpu_embedder(vit, backend)
    first_BD = embedder.launch([pixels(4)])()
    before_BD = first_BD.copy()
    embedder.launch([255 - pixels(4)])()
    np.testing.assert_array_equal(first_BD, before_BD)
    first_BD.setflags(write=False)  # as the pipeline does


def test_auto_takes_what_it_measured_as_fastest_and_says_so(
    vit: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs("onnxruntime")

    def slow(self: TorchEmbedder, chunks: Sequence[Tensor]) -> Collect:
        time.sleep(0.02)
        return launch(self, chunks)

    launch = TorchEmbedder.launch
    monkeypatch.setattr(TorchEmbedder, "launch", slow)
    monkeypatch.setattr(backends, "_MEASURE_S", 0.1)
    caplog.set_level(logging.INFO, logger="app")
    engine = Engine(vit, InferenceConfig(backend="auto"))
    assert engine.model.backend in {"onnxruntime", "openvino"}
    assert f"{engine.model.backend} computes the model" in caplog.text
    assert "images/s in batches of 1 and 8: torch" in caplog.text


def test_auto_stays_with_torch_where_the_gain_is_small(vit: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnxruntime")
    measured = {"torch": {1: 1.0, 8: 8.0}, "onnxruntime": {1: 0.97, 8: 7.8}}
    monkeypatch.setattr(backends, "_least_seconds", lambda *_: measured)
    assert cpu_embedder(vit, "auto").model.backend == "torch"
    measured["onnxruntime"][8] = 6.0
    assert cpu_embedder(vit, "auto").model.backend == "onnxruntime"


class _Faulty(OnnxRuntimeEmbedder):
    """A backend with a fault in the rows that it gives."""

    fault: Callable[[Matrix], Matrix]

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        rows_BD = type(self).fault(super().launch(chunks)())
        return lambda: rows_BD


def _raises(_: Matrix) -> Matrix:
    raise RuntimeError("a backend's own text")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        pytest.param(
            lambda rows: rows[:, ::-1].copy(), r"other embeddings .* cosine -?0\.", id="other numbers"
        ),
        pytest.param(lambda rows: rows * np.nan, "cosine nan, expected 0.9999", id="NaN"),
        pytest.param(lambda rows: rows[:, :-1].copy(), r"fails on the .*\(ValueError\)", id="another shape"),
        pytest.param(_raises, r"fails on the reference pictures \(RuntimeError\)", id="an exception"),
    ],
)
def test_a_faulty_backend_is_refused_and_auto_does_without_it(
    fault: Callable[[Matrix], Matrix],
    sentence: str,
    vit: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    needs("onnxruntime")
    faulty = type("Faulty", (_Faulty,), {"fault": staticmethod(fault)})
    monkeypatch.setattr(backends, "_CONVERTED", {"onnxruntime": faulty})
    with pytest.raises(BackendUnavailable, match=sentence):
        cpu_embedder(vit, "onnxruntime")
    assert cpu_embedder(vit, "auto").model.backend == "torch"
    assert "backend onnxruntime is not used" in caplog.text


@pytest.mark.parametrize(
    ("backend", "command"),
    [("onnxruntime", r"dinoserve\[onnx\]"), ("openvino", r"dinoserve\[openvino\]")],
)
def test_a_missing_package_is_named_with_its_command(
    backend: Backend, command: str, vit: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnxruntime")
    onnx_of(vit)
    monkeypatch.setitem(sys.modules, backend, None)
    with pytest.raises(BackendUnavailable, match=rf"^{backend} is not installed: pip install '{command}'"):
        cpu_embedder(vit, backend)


@pytest.mark.parametrize("kind", [OnnxRuntimeEmbedder, OpenVinoEmbedder])
def test_what_a_runtime_cannot_load_is_refused(
    kind: type[OnnxRuntimeEmbedder] | type[OpenVinoEmbedder], vit: Bundle
) -> None:
    needs("onnxruntime" if kind is OnnxRuntimeEmbedder else "openvino")
    with pytest.raises(BackendUnavailable, match="can't load the model"):
        kind(vit, b"no model")


def test_openvino_is_imported_without_what_reports_its_use(vit: Bundle) -> None:
    needs("openvino")
    cpu_embedder(vit, "openvino")
    assert sys.modules["openvino_telemetry"] is None


def test_a_converted_model_is_kept_whole_and_bound_to_its_fingerprint(
    vit: Bundle, convolutional: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("onnxruntime")
    data = onnx_of(vit)
    conversions: list[str] = []

    def convert(model: EmbeddingModel) -> bytes:
        conversions.append(model.backbone.architecture)
        return data

    monkeypatch.setattr("app.inference.converted.to_onnx", convert)
    folder = tmp_path / "onnx"
    assert onnx_of(vit, cache=folder) == onnx_of(vit, cache=folder) == data
    assert len(conversions) == 1
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # as after a crash of the disk
    assert onnx_of(vit, cache=folder) == data
    assert len(conversions) == 2
    onnx_of(convolutional, cache=folder)
    assert conversions[-1] == "tf_efficientnet_lite0"
    assert len(list(folder.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    vit: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("app.inference.converted.to_onnx", lambda _: b"a model")
    (tmp_path / "taken").write_text("a file where a directory should be")
    caplog.set_level(logging.INFO, logger="app")
    assert onnx_of(vit, cache=tmp_path / "taken") == b"a model"
    assert "the next start converts again" in caplog.text


def test_only_the_newest_converted_models_are_kept(
    vit: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.inference.converted.to_onnx", lambda _: b"a model")
    for number in range(6):
        (tmp_path / f"{number}.onnx").write_bytes(b"another run's")
    onnx_of(vit, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert onnx_of(vit, cache=tmp_path) == b"a model"


class _OnCuda(nn.Module):
    """Says that it is on a device that this machine need not have."""

    device = torch.device("cuda")

    def parameters(self, recurse: bool = True) -> object:  # type: ignore[override]
        yield self


def test_a_cpu_backend_is_refused_for_a_model_on_cuda(vit: Bundle) -> None:
    on_cuda = Bundle(vit.path, vit.manifest, _OnCuda())  # type: ignore[arg-type]
    with pytest.raises(
        BackendUnavailable, match=r"onnxruntime computes on the CPU, .* on cuda.*--device cpu"
    ):
        make_embedder(on_cuda, backend="onnxruntime")


def test_torch_lays_a_convolutional_network_out_as_its_pixels_are(convolutional: Bundle, vit: Bundle) -> None:
    for bundle, channels_last in ((convolutional, True), (vit, False)):
        embedder: Embedder = TorchEmbedder(bundle)
        weights = [
            module.weight
            for module in bundle.model.modules()
            if isinstance(module, nn.Conv2d) and module.weight.shape[1] > 1 and module.kernel_size != (1, 1)
        ]
        assert weights
        assert all(
            weight.is_contiguous(memory_format=torch.channels_last) == channels_last for weight in weights
        )
        assert embedder.model.backend == "torch"
