"""`POST /embed`: images to embeddings, each image failing or succeeding for itself.

Dimension key: B images
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from app.api import answers
from app.api.body import SentImage, Upload, read_upload, require_images
from app.api.embedded import image_answer, reading_of, row_of, value_bytes
from app.api.openapi import answer_of, body_of, example
from app.api.refusals import ImageRefused
from app.api.schemas import EmbedAnswer, EmbedParameters, OnError, parse
from app.api.state import State, StateDep, in_worker, served_model, timed, while_connected
from app.api.urgency import expect_room, urgency
from app.inference.engine import Engine
from app.inference.features import Reading
from app.inference.lanes import Lane
from app.inference.results import ImageEmbedding, ImageFailure, ModelInfo
from app.served_models import ServedModel

router = APIRouter(tags=["embeddings"])


@dataclass(frozen=True)
class _Wish:
    """What a request asks for, checked.

    Attributes:
        shape: Of one image's values.
        media_type: Of the answer.
    """

    parameters: EmbedParameters
    model: ServedModel
    reading: Reading | None
    shape: tuple[int, ...]
    media_type: str
    on_error: OnError


@router.post(
    "/embed",
    summary="Embed images",
    responses={200: answer_of(EmbedAnswer, answers.JSON, answers.MSGPACK, answers.NPY)},
    openapi_extra=body_of(EmbedParameters, arrays=True)
    | example("curl -F images=@cat.jpg -F images=@dog.jpg {origin}/embed"),
)
async def embed(request: Request, state: StateDep) -> Response:
    """Embeds one image or many.

    Parameters stand in the query, in a form, or in the JSON body. Each image of a list has its embedding or
    its own error; with `Accept: application/x-npy` failed rows are NaN and `X-Failed-Items` counts them.
    """
    media_type = answers.negotiate(request, answers.JSON, answers.NPY, answers.MSGPACK)
    expect_room(request, state)
    with timed(state, "receive"):
        upload = await read_upload(request, state, arrays=True)
    parameters = parse(EmbedParameters, upload.parameters)
    model = served_model(state, parameters.model)
    reading = reading_of(parameters, model.manifest)
    require_images(upload)
    shape = model.engine.shape_of(reading)
    answers.refuse_large(upload.count * math.prod(shape), value_bytes=value_bytes(parameters, media_type))
    with timed(state, "embed"):
        results = await while_connected(request, _embed_upload(state, model, upload, reading, parameters))
    wish = _Wish(parameters, model, reading, shape, media_type, on_error(parameters.on_error, upload))
    if reading is None:
        return _answer(results, wish)
    return await in_worker(state, _answer, results, wish)  # it may be large


async def embed_images(
    state: State,
    engine: Engine,
    images: Sequence[SentImage],
    *,
    reading: Reading | None = None,
    timeout_s: float | None = None,
    priority: Lane | None = None,
) -> list[ImageEmbedding | ImageFailure]:
    """Embeds the images that are files, and leaves in their places those that failed before.

    Args:
        state: Of the request, with what its headers say of its urgency.
        engine: Of the request's model.
        images: In order.
        reading: As for `Engine.embed`.
        timeout_s: As its parameters say.
        priority: Likewise.

    Raises:
        TooLarge: See `Engine.embed`, and so Overloaded, NotReady and DeadlineExceeded.
    """
    urgent = urgency(state, priority=priority, timeout_s=timeout_s)
    embedded = iter(
        await engine.embed(
            [image for image in images if isinstance(image, bytes)],
            reading=reading,
            lane=urgent.lane,
            deadline_s=urgent.deadline_s,
        )
    )
    return [next(embedded) if isinstance(image, bytes) else image for image in images]


def on_error(asked: OnError | None, upload: Upload) -> OnError:
    """The caller's choice; by default one image by itself fails its request, and one of a list doesn't."""
    return asked or ("fail" if upload.single else "item")


def check_failures(results: Sequence[object], choice: OnError) -> None:
    """Refuses a request with a failed image, where the caller wants all or nothing.

    Raises:
        ImageRefused: The first failure.
    """
    for index, result in enumerate(results):
        if choice == "fail" and isinstance(result, ImageFailure):
            raise ImageRefused(result, index=index)


def failure_answer(index: int, failure: ImageFailure) -> dict[str, Any]:
    """One image's error, as it stands in its place."""
    return {"index": index, "error": image_error(failure)}


def image_error(failure: ImageFailure) -> dict[str, Any]:
    """Why an image has no result, as answers say it."""
    error = {"code": failure.code, "title": failure.title, "limit": failure.limit, "actual": failure.actual}
    return {name: value for name, value in error.items() if value is not None}


def model_answer(model: ModelInfo) -> dict[str, Any]:
    """The `model` member of every answer."""
    return {"id": model.id, "fingerprint": model.fingerprint, "dimensions": model.dimensions}


async def _embed_upload(
    state: State, model: ServedModel, upload: Upload, reading: Reading | None, parameters: EmbedParameters
) -> list[ImageEmbedding | ImageFailure]:
    if upload.pixels is None:
        return await embed_images(
            state,
            model.engine,
            upload.images,
            reading=reading,
            timeout_s=parameters.timeout,
            priority=parameters.priority,
        )
    urgent = urgency(state, priority=parameters.priority, timeout_s=parameters.timeout)
    rows = await model.engine.embed_pixels(
        upload.pixels, reading=reading, lane=urgent.lane, deadline_s=urgent.deadline_s
    )
    return [_pixels_result(row, model.engine.input_px) for row in rows]


def _pixels_result(row: NDArray[np.float32], size_px: int) -> ImageEmbedding | ImageFailure:
    if not np.isfinite(row).all():
        return ImageFailure("embedding_failed", "The model gave no embedding for this image.")
    return ImageEmbedding(row, size_px, size_px, "NPY", sha256="")


def _answer(results: list[ImageEmbedding | ImageFailure], wish: _Wish) -> Response:
    rows = [row_of(result, wish.parameters) for result in results]
    check_failures(rows, wish.on_error)
    failed = sum(isinstance(row, ImageFailure) for row in rows)
    if wish.media_type == answers.NPY:
        missing = np.full(wish.shape, np.nan, wish.parameters.dtype)
        stacked = np.stack([missing if isinstance(row, ImageFailure) else row for row in rows])
        return answers.npy(stacked, failed=failed)
    as_text = wish.parameters.encoding == "base64" and wish.media_type == answers.JSON
    content = _about(wish) | {
        "usage": {"images": len(results), "failed": failed},
        "data": [
            failure_answer(index, row)
            if isinstance(row, ImageFailure)
            else {"index": index} | image_answer(result, row, as_text=as_text)
            for index, (result, row) in enumerate(zip(results, rows, strict=True))
        ],
    }
    return answers.structured_piecewise(content, wish.media_type)


def _about(wish: _Wish) -> dict[str, Any]:
    """What an answer says beside its images."""
    about: dict[str, Any] = {"model": model_answer(wish.model.info), "dtype": wish.parameters.dtype}
    reading, features = wish.reading, wish.model.engine.features
    if features is None or reading is None or reading == "attention":
        return about | {"pool": wish.model.manifest.pooling}
    if reading == "patches":
        height, width = features.grid_hw or (0, 0)
        return about | {"grid": {"height": height, "width": width}}
    # Another pooling is another embedding, and must not get into a collection under the name of this one.
    about["model"] |= {
        "fingerprint": features.fingerprint(reading, normalise=wish.parameters.normalize),
        "dimensions": wish.shape[0],
    }
    return about | {"pool": reading}
