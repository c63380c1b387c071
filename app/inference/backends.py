"""Chooses what computes the model on a CPU: the fastest, as measured here and now, that agrees with torch.

Which one that is depends on the network and on the processor: with a small convolutional network ONNX Runtime
makes three times the images a second that torch does, with a ViT hardly more (docs/decisions/0017).

Dimension key: B images · C channels · H W pixels · D embedding
"""

import importlib.util
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from app.inference.config import Backend
from app.inference.converted import onnx_of
from app.inference.embedder import BackendUnavailable, Embedder, TorchEmbedder
from app.inference.onnxruntime import OnnxRuntimeEmbedder
from app.inference.openvino import OpenVinoEmbedder
from app.inference.threads import use_native_threads
from dino_core.bundle import Bundle, reference_embeddings
from dino_core.errors import DinoError
from dino_core.parity import MIN_AGREEMENT, agreement_on_reference
from dino_core.preprocess import Preprocessing

_CONVERTED: Final[Mapping[str, type[OnnxRuntimeEmbedder] | type[OpenVinoEmbedder]]] = {
    "onnxruntime": OnnxRuntimeEmbedder,
    "openvino": OpenVinoEmbedder,
}
_MEASURE_S: Final = 1.2  # of each backend
_MAX_ROUNDS: Final = 40
_WORTH: Final = 1.05  # a faster one must be faster by this, for torch has the fewest parts that can fail

logger = logging.getLogger(__name__)


def cpu_embedder(bundle: Bundle, backend: Backend, *, max_batch: int = 8, threads: int = 1) -> Embedder:
    """The model on the CPU by the backend that is asked for, or by the fastest.

    Args:
        bundle: Loaded on the CPU.
        backend: "auto" takes seconds: conversion, if that wasn't done before, and about one for each backend.
        max_batch: The largest batch, which is also what is measured, beside single images.
        threads: Native threads of a launch.

    Raises:
        BackendUnavailable: The one that is asked for isn't installed, fails, or disagrees with torch.
        ConversionError: The model can't be had in the format that the backend reads.
    """
    # On a thread of its own, as the number of native threads is a thread's property.
    with ThreadPoolExecutor(1, thread_name_prefix="dino-choice") as executor:
        return executor.submit(_choose, bundle, backend, max_batch, threads).result()


def _choose(bundle: Bundle, backend: Backend, max_batch: int, threads: int) -> Embedder:
    use_native_threads(threads)
    by_torch = TorchEmbedder(bundle, max_batch=max_batch)
    if backend == "torch":
        return by_torch
    expected_BD = reference_embeddings(bundle.model)
    if backend != "auto":
        return _agreeing(backend, bundle, expected_BD, max_batch=max_batch, threads=threads)
    candidates: dict[str, Embedder] = {"torch": by_torch}
    for name in _CONVERTED:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            candidates[name] = _agreeing(name, bundle, expected_BD, max_batch=max_batch, threads=threads)
        except DinoError as error:
            logger.warning("backend %s is not used: %s", name, error)
    return _fastest(candidates, bundle.manifest.preprocessing, max_batch=max_batch, threads=threads)


def _agreeing(name: str, bundle: Bundle, expected_BD: Tensor, *, max_batch: int, threads: int) -> Embedder:
    """The backend, if it computes the reference pictures as torch does."""
    embedder = _CONVERTED[name](bundle, onnx_of(bundle), max_batch=max_batch, threads=threads)
    try:
        found = agreement_on_reference(
            lambda pixels_BCHW: torch.from_numpy(embedder.launch([pixels_BCHW])()),
            expected_BD,
            bundle.manifest.preprocessing,
        )
    except Exception as error:  # foreign software may raise anything
        raise BackendUnavailable(
            f"{name} fails on the reference pictures ({type(error).__name__}): choose another --backend"
        ) from error
    if not found >= MIN_AGREEMENT:  # so written that NaN is refused as well
        raise BackendUnavailable(
            f"{name} computes other embeddings of the reference pictures than torch does: cosine "
            f"{found:.6f}, expected {MIN_AGREEMENT} or more; choose another --backend"
        )
    return embedder


def _fastest(
    candidates: Mapping[str, Embedder], preprocessing: Preprocessing, *, max_batch: int, threads: int
) -> Embedder:
    if len(candidates) == 1:
        logger.info("torch computes the model: no other backend is here")
        return candidates["torch"]
    sizes = sorted({1, max_batch})
    pixels = {size: torch.zeros((size, 3, *[preprocessing.crop_px] * 2), dtype=torch.uint8) for size in sizes}
    least_s = _least_seconds(candidates, pixels)
    per_image_s = {name: sum(seconds[size] / size for size in sizes) for name, seconds in least_s.items()}
    quickest = min(per_image_s, key=lambda name: per_image_s[name] * (1 if name == "torch" else _WORTH))
    logger.info(
        "%s computes the model, on %d threads. Measured, images/s in batches of %s: %s",
        quickest,
        threads,
        " and ".join(map(str, sizes)),
        "; ".join(
            f"{name} {' and '.join(f'{size / seconds[size]:.1f}' for size in sizes)}"
            for name, seconds in least_s.items()
        ),
    )
    return candidates[quickest]


def _least_seconds(
    candidates: Mapping[str, Embedder], pixels: Mapping[int, Tensor]
) -> dict[str, dict[int, float]]:
    """The least time of a launch, by backend and batch size.

    They take turns, so that what else the machine does meets them all, and the least is what each can do.
    """
    least_s: dict[str, dict[int, float]] = {}
    for name, embedder in candidates.items():
        least_s[name] = {}
        for size, pixels_BCHW in pixels.items():
            embedder.launch([pixels_BCHW])()  # the first of a size allocates and chooses kernels
            least_s[name][size] = float("inf")
    began_s = time.perf_counter()
    for _ in range(_MAX_ROUNDS):
        for name, embedder in candidates.items():
            for size, pixels_BCHW in pixels.items():
                start_s = time.perf_counter()
                embedder.launch([pixels_BCHW])()
                least_s[name][size] = min(least_s[name][size], time.perf_counter() - start_s)
        if time.perf_counter() - began_s > _MEASURE_S * len(candidates):
            break
    return least_s
