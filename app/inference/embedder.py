"""The seam to the model: uint8 pixels in, embeddings out.

Dimension key: B images · C channels · H W pixels · D embedding
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor, nn

from app.inference.results import Matrix, ModelInfo
from dino_core.bundle import Bundle
from dino_core.embedding import EmbeddingModel
from dino_core.errors import DinoError
from dino_core.preprocess import Preprocessing
from dino_core.products import FastProducts, onednn_is_faster

Collect = Callable[[], Matrix]


class BackendUnavailable(DinoError):
    """The software that was asked for can't compute the model here; the message says what to do."""


class Embedder(Protocol):
    """A model on a device. One thread at a time calls it.

    Attributes:
        model: Which.
        preprocessing: What turns a file into the pixels that it takes.
        max_batch: Images of a launch, at most.
        in_flight: Launches that are worth having on the device at once: 1 where `launch` computes before it
            returns.
        pinned: Whether pixels should lie in page-locked memory.
    """

    model: ModelInfo
    preprocessing: Preprocessing
    max_batch: int
    in_flight: int
    pinned: bool

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        """Starts on a batch.

        Args:
            chunks: uint8 [B_i, C, H, W], resized and cropped; one after the other they are the batch. They
                must stay as they are until the rows are collected.

        Returns:
            What waits for the rows and returns them: float32 [B, D], in the order of the images.
        """
        ...


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, … and `max_batch`: the sizes that are warmed up, and on CUDA the only ones that run."""
    powers = [2**power for power in range(max_batch.bit_length()) if 2**power < max_batch]
    return (*powers, max_batch)


def model_info(bundle: Bundle, *, backend: str = "torch") -> ModelInfo:
    """What responses say about the bundle's model."""
    manifest = bundle.manifest
    return ModelInfo(manifest.id, manifest.fingerprint, manifest.embedding_dimension, backend)


def joined(chunks: Sequence[Tensor]) -> Tensor:
    """The chunks of a launch as one tensor [B, C, H, W]; they themselves where there is only one."""
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))


class TorchEmbedder:
    """The model on the CPU by torch, in float32, at whatever batch size is ready.

    Args:
        bundle: Loaded on the CPU. The weights of a convolutional network are laid out anew, channels last.
        max_batch: Above 8 a CPU gains little per image, and those who wait behind the batch lose.
    """

    in_flight = 1
    pinned = False

    def __init__(self, bundle: Bundle, *, max_batch: int = 8) -> None:
        self.model = model_info(bundle)
        self.preprocessing = bundle.manifest.preprocessing
        self.max_batch = max_batch
        self._network: EmbeddingModel = bundle.model
        convolutional = _weights_in(bundle.model, nn.Conv2d) > _weights_in(bundle.model, nn.Linear)
        if convolutional:
            # As the pixels come. In the other order torch turns activations around, layer by layer.
            bundle.model.to(memory_format=torch.channels_last)
        # Asks about every function call, which costs a convolutional network a tenth and gives it nothing.
        self._fast_products = not convolutional and onednn_is_faster()

    def launch(self, chunks: Sequence[Tensor]) -> Collect:
        """Computes at once; see `Embedder.launch`."""
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode())
            if self._fast_products:
                modes.enter_context(FastProducts())
            embeddings_BD: Matrix = self._network(joined(chunks)).numpy()
        return lambda: embeddings_BD


def _weights_in(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(
        weight.numel()
        for module in model.modules()
        if isinstance(module, kind)
        for weight in module.parameters(recurse=False)
    )
