"""`POST /embed`: images to embeddings, in one request or in many.

Dimension key: B images · H W pixels · D embedding
"""

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import httpx
import numpy as np
import numpy.typing as npt

from app.bounded_batches import bounded_batches
from app.client.calls import Call, content_of, json_of
from app.client.images import Image, bytes_of, image_parts
from app.client.items import Failure, failure_of

_MOST_BYTES: Final = 32 * 2**20  # of a batch's files; a larger one goes alone
_UNREADABLE: Final = "unreadable_file"


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """One image's embedding, float32 [D], and what its header says."""

    embedding: npt.NDArray[np.float32]
    width_px: int
    height_px: int
    format: str
    sha256: str


def embed(images: Sequence[Image]) -> Call[list[Embedded | Failure]]:
    """Asks for embeddings, each with what its image's header says."""
    return Call(
        method="POST",
        path="/embed",
        read=_embedded_of,
        request={
            "params": {"encoding": "base64", "on_error": "item"},
            "files": image_parts(map(bytes_of, images)),
        },
        embeds=True,
    )


def embed_array(images: Sequence[Image]) -> Call[npt.NDArray[np.float32]]:
    """Asks for embeddings as one array [B, D], NaN in the rows of images that have none."""
    return Call(
        method="POST",
        path="/embed",
        read=_array_of,
        request={
            "params": {"on_error": "item"},
            "files": image_parts(map(bytes_of, images)),
            "headers": {"Accept": "application/x-npy"},
        },
        embeds=True,
    )


def embed_pixels(pixels_BHWC: npt.NDArray[np.uint8]) -> Call[npt.NDArray[np.float32]]:
    """Asks for the embeddings [B, D] of pixels that are decoded, resized and cropped already."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(pixels_BHWC), allow_pickle=False)
    return Call(
        method="POST",
        path="/embed",
        read=_array_of,
        request={
            "params": {"on_error": "item"},
            "content": file.getvalue(),
            "headers": {"Accept": "application/x-npy", "Content-Type": "application/x-npy"},
        },
        embeds=True,
    )


def rows_of(answers: Iterable[Embedded | Failure], *, dimensions: int) -> npt.NDArray[np.float32]:
    """Answers as one array [B, D], NaN in the rows of failures."""
    missing = np.full(dimensions, np.nan, np.float32)
    rows = [missing if isinstance(answer, Failure) else answer.embedding for answer in answers]
    return np.stack(rows) if rows else np.empty((0, dimensions), np.float32)


def batches_of(images: Iterable[Image], *, most: int) -> Iterator[list[bytes | Failure]]:
    """Files read and put together to batches of bounded number and size; what can't be read is a failure."""
    return bounded_batches(
        map(_loaded, images),
        lambda loaded: len(loaded) if isinstance(loaded, bytes) else 0,
        most_bytes=_MOST_BYTES,
        most_items=most,
    )


def files_of(batch: Sequence[bytes | Failure]) -> list[bytes]:
    """Those of a batch that could be read."""
    return [one for one in batch if isinstance(one, bytes)]


def in_places(
    batch: Sequence[bytes | Failure], answers: Iterable[Embedded | Failure]
) -> list[Embedded | Failure]:
    """Answers of a batch's files, with the failures of the rest in their places."""
    following = iter(answers)
    return [next(following) if isinstance(one, bytes) else one for one in batch]


def _loaded(image: Image) -> bytes | Failure:
    try:
        return bytes_of(image)
    except OSError as error:
        return Failure(code=_UNREADABLE, title=f"{image!s} can't be read: {error.strerror}")


def _embedded_of(response: httpx.Response) -> list[Embedded | Failure]:
    return [failure_of(one) if "error" in one else _one_of(one) for one in json_of(response)["data"]]


def _one_of(one: Mapping[str, Any]) -> Embedded:
    return Embedded(
        embedding=np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4").astype(np.float32),
        width_px=one["width"],
        height_px=one["height"],
        format=one["format"],
        sha256=one["sha256"],
    )


def _array_of(response: httpx.Response) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = np.load(io.BytesIO(content_of(response)), allow_pickle=False)
    return array
