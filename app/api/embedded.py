"""Embeddings and patches as answers have them: what to read of images, length, number type, encoding.

Dimension key: D embedding · N patches
"""

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.api import answers
from app.api.refusals import InvalidParameter
from app.api.schemas import EmbeddingForm, base64_of
from app.inference.engine import Engine
from app.inference.features import Reading
from app.inference.results import ImageEmbedding, ImageFailure
from dino_core.bundle import Manifest

Row = NDArray[np.floating]  # [D], or [N, D]

_UNIT_LENGTH_FLOOR: Final = 1e-12  # below it a row is zero, and stays so
_NUMBER_BYTES: Final = 13  # in JSON, with its comma: -0.0123456789
_NO_FLOAT16: Final = ImageFailure(
    "embedding_failed", "The numbers are beyond float16: ask for float32, or for vectors of length 1."
)


def reading_of(form: EmbeddingForm, manifest: Manifest) -> Reading | None:
    """What is to be read of each image; None for the model's own embedding.

    Raises:
        InvalidParameter: Two parameters contradict each other, or the model.
    """
    if form.output == "patches":
        if form.pool is not None:
            raise InvalidParameter(
                "pool says how patches become one vector: leave it away, or output=patches", parameter="pool"
            )
        return "patches"
    if form.pool is not None and form.pool != manifest.pooling:
        return form.pool
    if not form.normalize and manifest.normalise:
        raise InvalidParameter(
            "normalize=false can't be had: this model's bundle says that its embeddings have length 1",
            parameter="normalize",
        )
    return None


def value_bytes(form: EmbeddingForm, media_type: str) -> float:
    """What a number takes in an answer."""
    raw = np.dtype(form.dtype).itemsize
    if media_type in {answers.NPY, answers.MSGPACK}:
        return raw
    return raw * 4 / 3 if form.encoding == "base64" else _NUMBER_BYTES


def result_bytes(form: EmbeddingForm, engine: Engine, reading: Reading | None) -> int:
    """What one image takes in an answer of JSON.

    Raises:
        OutputUnavailable: The model has no such thing.
    """
    return math.ceil(math.prod(engine.shape_of(reading)) * value_bytes(form, answers.JSON))


def row_of(result: ImageEmbedding | ImageFailure, form: EmbeddingForm) -> Row | ImageFailure:
    """The vectors of an image as the caller wants them, each of length 1 if so."""
    if isinstance(result, ImageFailure):
        return result
    row = result.embedding
    if form.normalize:
        row = row / np.maximum(np.linalg.norm(row, axis=-1, keepdims=True), _UNIT_LENGTH_FLOOR)
    with np.errstate(over="ignore"):
        numbers: Row = np.ascontiguousarray(row, dtype=form.dtype)
    return numbers if np.isfinite(numbers).all() else _NO_FLOAT16


def image_answer(result: ImageEmbedding | ImageFailure, row: Row, *, as_text: bool) -> dict[str, Any]:
    """One image's part of an answer, without its place."""
    assert isinstance(result, ImageEmbedding), "an image that failed has a row: this is a bug"
    name = "embedding" if row.ndim == 1 else "patches"
    answer = {
        name: base64_of(row) if as_text else row,
        "width": result.width,
        "height": result.height,
        "format": result.format,
    }
    return answer | ({"sha256": result.sha256} if result.sha256 else {})
