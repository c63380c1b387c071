"""An ONNX file computes what torch does, whatever the batch, size and length; or it isn't given away."""

import json
import sys
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dino_core import onnx as conversion
from dino_core.backbones import Backbone, Pooling, make_backbone
from dino_core.bundle import fingerprint_of, reference_embeddings
from dino_core.embedding import EmbeddingModel
from dino_core.errors import ConversionError
from dino_core.onnx import to_onnx
from dino_core.parity import reference_pixels
from dino_core.preprocess import Preprocessing
from dino_core.vit import PositionInterpolation

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

PREPROCESSING = Preprocessing(resize_px=40, crop_px=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TINY_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
# Float32 in another order of sums; measured 2e-7 at most.
ATOL = 1e-5


def vit(
    *,
    built_px: int = 32,
    pooling: Pooling = "cls",
    normalise: bool = True,
    positions: PositionInterpolation = "official",
) -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=built_px,
        model_kwargs=TINY_VIT,
        position_interpolation=positions,
    )
    nn.init.normal_(backbone.network.get_parameter("pos_embed"))  # so large that they decide the embedding
    return EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling=pooling, normalise=normalise)


def convolutional(architecture: str = "resnet10t") -> EmbeddingModel:
    torch.manual_seed(0)
    backbone = make_backbone(architecture, image_size_px=32)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: statistics that matter
            nn.init.uniform_(module.get_buffer("running_mean"), -0.1, 0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    return EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling=backbone.default_pooling)


def run(data: bytes, pixels_BCHW: Tensor) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    rows_BD: NDArray[np.float32] = session.run(["embeddings"], {"pixels": pixels_BCHW.numpy()})[0]
    return rows_BD


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(convolutional, id="residual network"),
        pytest.param(lambda: convolutional("tf_efficientnet_lite0"), id="depthwise, asymmetric padding"),
        pytest.param(vit, id="ViT at its own size"),
        pytest.param(lambda: vit(pooling="cls+mean", normalise=False), id="two poolings, length as it comes"),
        pytest.param(lambda: vit(built_px=64), id="positions resampled as DINO does"),
        pytest.param(lambda: vit(built_px=64, positions="bicubic"), id="positions resampled by size"),
        pytest.param(lambda: vit(built_px=64, positions="antialias"), id="positions resampled as timm does"),
    ],
)
def test_embeddings_are_those_of_torch_in_batches_of_any_size(make: Callable[[], EmbeddingModel]) -> None:
    model = make()
    data = to_onnx(model)
    pixels_BCHW = torch.randint(
        0, 256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    expected_BD = model(pixels_BCHW)
    scale = expected_BD.abs().max().item()
    for size in (1, 2, 3, 9):
        rows_BD = run(data, pixels_BCHW[:size])
        assert rows_BD.dtype == np.float32
        np.testing.assert_allclose(rows_BD / scale, expected_BD[:size].numpy() / scale, atol=ATOL)


def test_the_file_says_what_goes_in_and_how_pictures_become_it() -> None:
    model = vit()
    file = onnx.load_model_from_string(to_onnx(model))
    onnx.checker.check_model(file)
    properties = {entry.key: entry.value for entry in file.metadata_props}
    assert Preprocessing.from_json(json.loads(properties["preprocessing"])) == PREPROCESSING
    assert properties["fingerprint"] == fingerprint_of(model)
    assert properties["pooling"] == "cls"
    (pixels,) = file.graph.input
    assert pixels.name == "pixels"
    dims = pixels.type.tensor_type.shape.dim
    assert dims[0].dim_param == "batch"
    assert [dim.dim_value for dim in dims[1:]] == [3, 32, 32]


def test_a_conversion_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()

    def another_models(_: EmbeddingModel) -> Tensor:
        return reference_embeddings(vit(normalise=False))

    monkeypatch.setattr(conversion, "reference_embeddings", another_models)
    with pytest.raises(ConversionError, match=r"other embeddings of the reference pictures.*nothing was"):
        to_onnx(model)


class _Unforeseen(nn.Module):
    """A network with a step that depends on the values that it computes."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled = images_BCHW.mean(dim=(2, 3))
        return pooled.flip(1) if pooled.sum() > 0 else pooled


def test_a_network_that_cannot_be_traced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()
    monkeypatch.setattr(Backbone, "forward", lambda _, images: _Unforeseen()(images))
    with pytest.raises(ConversionError, match="torch can't express vit_tiny_patch16_224 in ONNX"):
        to_onnx(model)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_brings_it(
    package: Literal["onnx", "onnxscript", "onnxruntime"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConversionError, match=rf"^{package} is not installed.*pip install 'dinoserve\[onnx\]"
    ):
        to_onnx(vit())


def test_half_precision_is_refused() -> None:
    model = vit()
    model.backbone.to(torch.bfloat16)
    with pytest.raises(ConversionError, match="torch.bfloat16 on cpu, torch.float32 on cpu, expected"):
        to_onnx(model)


def test_reference_pixels_are_what_the_bundle_compares_by() -> None:
    pixels_BCHW = reference_pixels(PREPROCESSING)
    assert pixels_BCHW.shape == (8, 3, 32, 32)
    assert pixels_BCHW.dtype == torch.uint8
