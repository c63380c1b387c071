"""What crosses the engine's border: plain data, made once per image or per model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]  # [D], one embedding
Matrix = NDArray[np.float32]  # [B, D], one embedding per row


@dataclass(frozen=True)
class ModelInfo:
    """Which model answers.

    Attributes:
        id: The bundle's name.
        fingerprint: "sha256:…" over weights, architecture, preprocessing, pooling and normalisation.
        dimensions: Length of an embedding.
        backend: The software that computes it: torch, onnxruntime or openvino.
    """

    id: str
    fingerprint: str
    dimensions: int
    backend: str = "torch"


@dataclass(frozen=True, slots=True)
class ImageEmbedding:
    """One picture's embedding and what its header says.

    Attributes:
        embedding: float32 [D], or what else was read of the picture; read-only, and perhaps a row of a larger
            array.
        width: In pixels, as stored in the file, before its orientation is applied.
        height: Likewise.
        format: "JPEG", "PNG", …
        sha256: Of the bytes sent, in hexadecimal.
    """

    embedding: NDArray[np.float32]
    width: int
    height: int
    format: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ImageFailure:
    """Why one picture has no embedding; its neighbours in the request have theirs.

    Attributes:
        code: Those of `dino_core.errors.ImageError`, or "embedding_failed".
        title: One sentence for people; holds no decoder's text.
        limit: The bound that was broken, if there is one.
        actual: What the picture has, in the unit of the limit.
    """

    code: str
    title: str
    limit: int | None = None
    actual: int | None = None
