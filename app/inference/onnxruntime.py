"""The model on the CPU by ONNX Runtime.

Dimension key: B images · C channels · H W pixels · D embedding
"""

import importlib
from collections.abc import Sequence

from torch import Tensor

from app.inference.embedder import BackendUnavailable, Collect, joined, model_info
from app.inference.results import Matrix
from dino_core.bundle import Bundle
from dino_core.onnx import INPUT, OUTPUT


class OnnxRuntimeEmbedder:
    """One session for batches of every size.

    Args:
        bundle: Whose model it is.
        onnx: The model, converted.
        max_batch: As for `TorchEmbedder`.
        threads: Native threads of a launch, the calling one among them.

    Raises:
        BackendUnavailable: ONNX Runtime is not installed, or can't load the model.
    """

    in_flight = 1
    pinned = False

    def __init__(self, bundle: Bundle, onnx: bytes, *, max_batch: int = 8, threads: int = 1) -> None:
        self.model = model_info(bundle, backend="onnxruntime")
        self.preprocessing = bundle.manifest.preprocessing
        self.max_batch = max_batch
        try:
            onnxruntime = importlib.import_module("onnxruntime")
        except ImportError:
            raise BackendUnavailable(
                "onnxruntime is not installed: pip install 'dinoserve[onnx]', or choose another --backend"
            ) from None
        onnxruntime.disable_telemetry_events()  # Microsoft's builds for Windows report otherwise
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin while they wait for work would take the cores from the decoders.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common ancestor but this
            raise BackendUnavailable(
                f"ONNX Runtime can't load the model ({type(error).__name__}): choose another --backend"
            ) from error

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        """Computes at once; see `Embedder.launch`."""
        pixels_BCHW = joined(chunks).contiguous().numpy()
        rows_BD: Matrix = self._session.run([OUTPUT], {INPUT: pixels_BCHW})[0]
        return lambda: rows_BD
