"""A model as an ONNX file for runtimes other than torch, compared with torch before it is given away.

    pixels      uint8   [batch, 3, crop_px, crop_px]   resized and cropped, RGB; any batch size
    embeddings  float32 [batch, D]                     of length 1 where the model says so

Normalisation, network, pooling and length are inside. What has to happen before, from a file to pixels, is in
the file's metadata under `preprocessing`, beside `fingerprint` and `pooling`.

Dimension key: B images · C channels · H W pixels · D embedding
"""

import importlib
import json
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dino_core.bundle import fingerprint_of, reference_embeddings
from dino_core.embedding import EmbeddingModel
from dino_core.errors import ConversionError
from dino_core.parity import MIN_AGREEMENT, agreement_on_reference

INPUT = "pixels"
OUTPUT = "embeddings"
_MAX_BYTES = 2**31 - 2**20  # what a protobuf message can hold, and room for the graph
_NEEDS = "pip install 'dinoserve[onnx]'"


def to_onnx(model: EmbeddingModel) -> bytes:
    """Converts a model, and proves that ONNX Runtime computes from the result what torch does.

    Takes seconds, and more memory than the model: torch traces the module, whatever is in it.

    Args:
        model: In float32, on the CPU.

    Returns:
        The bytes of an ONNX file.

    Raises:
        ConversionError: A package is missing, the model is too large or not in float32 on the CPU, torch
            can't express it in ONNX, or the result computes something else.
    """
    _refuse_unsuitable(model)
    onnx, onnxruntime, _ = (_package(name) for name in ("onnx", "onnxruntime", "onnxscript"))
    size_px = model.preprocessing.crop_px
    pixels_BCHW = torch.zeros((2, model.preprocessing.channels, size_px, size_px), dtype=torch.uint8)
    try:
        program = torch.onnx.export(
            model,
            (pixels_BCHW,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    except Exception as error:  # a network may hold anything, and the exporter raises anything
        raise ConversionError(
            f"torch can't express {model.backbone.architecture} in ONNX "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error
    assert program is not None, "torch.onnx.export gave nothing: this is a bug"
    file = program.model_proto
    onnx.helper.set_model_props(
        file,
        {
            "fingerprint": fingerprint_of(model),
            "pooling": model.pooling,
            "preprocessing": json.dumps(model.preprocessing.to_json()),
        },
    )
    data: bytes = file.SerializeToString()
    _check(data, model, onnxruntime)
    return data


def _refuse_unsuitable(model: EmbeddingModel) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    found = {(tensor.dtype, tensor.device.type) for tensor in tensors if tensor.is_floating_point()}
    if found - {(torch.float32, "cpu")}:
        kinds = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in found))
        raise ConversionError(f"the model is in {kinds}, expected torch.float32 on cpu: convert it before")
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size_bytes > _MAX_BYTES:
        raise ConversionError(
            f"the model has {size_bytes:,} bytes of weights, one ONNX file holds {_MAX_BYTES:,} at most"
        )


def _package(name: str) -> ModuleType:
    """Imports a package of the extra `onnx` when it is wanted, and before the work."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConversionError(f"{name} is not installed, and ONNX needs it: {_NEEDS}") from None


def _check(data: bytes, model: EmbeddingModel, onnxruntime: ModuleType) -> None:
    try:
        found = agreement_on_reference(
            _runner(data, onnxruntime), reference_embeddings(model), model.preprocessing
        )
    except Exception as error:  # a batch size that is built in, an operation that the runtime lacks, ...
        raise ConversionError(
            f"ONNX Runtime can't run what torch made of {model.backbone.architecture} "
            f"({type(error).__name__}: {_first_line(error)}); nothing was written"
        ) from error
    if not found >= MIN_AGREEMENT:  # so written that NaN is refused as well
        raise ConversionError(
            f"ONNX Runtime computes other embeddings of the reference pictures than torch does: cosine "
            f"{found:.6f}, expected {MIN_AGREEMENT} or more; nothing was written"
        )


def _runner(data: bytes, onnxruntime: ModuleType) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: pixels_BCHW.contiguous().numpy()})[0])

    return run


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
