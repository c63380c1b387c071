"""The model on the CPU by OpenVINO.

Dimension key: B images · C channels · H W pixels · D embedding
"""

import importlib
import sys
from collections.abc import MutableMapping, Sequence
from types import ModuleType
from typing import cast

from torch import Tensor

from app.inference.embedder import BackendUnavailable, Collect, joined, model_info
from app.inference.results import Matrix
from dino_core.bundle import Bundle
from dino_core.onnx import INPUT


class OpenVinoEmbedder:
    """One compiled model for batches of every size.

    Args:
        bundle: Whose model it is.
        onnx: The model, converted.
        max_batch: As for `TorchEmbedder`.
        threads: Native threads of a launch.

    Raises:
        BackendUnavailable: OpenVINO is not installed, or can't load the model.
    """

    in_flight = 1
    pinned = False

    def __init__(self, bundle: Bundle, onnx: bytes, *, max_batch: int = 8, threads: int = 1) -> None:
        self.model = model_info(bundle, backend="openvino")
        self.preprocessing = bundle.manifest.preprocessing
        self.max_batch = max_batch
        openvino = _openvino()
        try:
            core = openvino.Core()
            compiled = core.compile_model(
                core.read_model(onnx),
                "CPU",
                {
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": 1,
                    # Otherwise bfloat16 where the processor has it, and embeddings differ between machines.
                    "INFERENCE_PRECISION_HINT": "f32",
                },
            )
            self._request = compiled.create_infer_request()
        except Exception as error:  # a RuntimeError of its own, mostly
            raise BackendUnavailable(
                f"OpenVINO can't load the model ({type(error).__name__}): choose another --backend"
            ) from error

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        """Computes at once; see `Embedder.launch`."""
        pixels_BCHW = joined(chunks).contiguous().numpy()
        rows_BD: Matrix = self._request.infer({INPUT: pixels_BCHW}, share_inputs=True)[0]
        return lambda: rows_BD


def _openvino() -> ModuleType:
    """Imports OpenVINO without what tells its makers of each import.

    That is a package of its own, which OpenVINO does without where it can't be imported.
    """
    modules = cast(MutableMapping[str, ModuleType | None], sys.modules)  # None is how an import is refused
    modules.setdefault("openvino_telemetry", None)
    try:
        return importlib.import_module("openvino")
    except ImportError:
        raise BackendUnavailable(
            "openvino is not installed: pip install 'dinoserve[openvino]', or choose another --backend"
        ) from None
