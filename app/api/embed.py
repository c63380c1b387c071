"""`POST /embed`: images to embeddings, each image failing or succeeding for itself.

Dimension key: B images · D embedding
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from app.api import answers
from app.api.body import SentImage, Upload, read_upload, require_images
from app.api.openapi import answer_of, body_of, example
from app.api.refusals import ImageRefused, InvalidParameter
from app.api.schemas import EmbedAnswer, EmbedParameters, OnError, base64_of, parse
from app.api.state import State, StateDep, served_model, timed, while_connected
from app.api.urgency import expect_room, urgency
from app.inference.engine import Engine
from app.inference.lanes import Lane
from app.inference.results import ImageEmbedding, ImageFailure, ModelInfo
from app.served_models import ServedModel

router = APIRouter(tags=["embeddings"])

_UNIT_LENGTH_FLOOR = 1e-12  # below it a row is zero, and stays so


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
    _refuse_raw_lengths(parameters, model)
    require_images(upload)
    with timed(state, "embed"):
        results = await while_connected(request, _embed_upload(state, model, upload, parameters))
    check_failures(results, on_error(parameters.on_error, upload))
    rows = [_number_type(result, parameters) for result in results]
    failed = sum(isinstance(result, ImageFailure) for result in results)
    if media_type == answers.NPY:
        dimensions = model.info.dimensions
        missing = np.full(dimensions, np.nan, parameters.dtype)
        return answers.npy(np.stack([missing if row is None else row for row in rows]), failed=failed)
    as_text = parameters.encoding == "base64" and media_type == answers.JSON
    content = {
        "model": model_answer(model.info),
        "dtype": parameters.dtype,
        "data": [
            _item(index, result, row, as_text=as_text)
            for index, (result, row) in enumerate(zip(results, rows, strict=True))
        ],
        "usage": {"images": len(results), "failed": failed},
    }
    return answers.structured(content, media_type)


async def embed_images(
    state: State,
    engine: Engine,
    images: Sequence[SentImage],
    *,
    timeout_s: float | None = None,
    priority: Lane | None = None,
) -> list[ImageEmbedding | ImageFailure]:
    """Embeds the images that are files, and leaves in their places those that failed before.

    Args:
        state: Of the request, with what its headers say of its urgency.
        engine: Of the request's model.
        images: In order.
        timeout_s: As its parameters say.
        priority: Likewise.

    Raises:
        TooLarge: See `Engine.embed`, and so Overloaded, NotReady and DeadlineExceeded.
    """
    urgent = urgency(state, priority=priority, timeout_s=timeout_s)
    embedded = iter(
        await engine.embed(
            [image for image in images if isinstance(image, bytes)],
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
    error = {"code": failure.code, "title": failure.title, "limit": failure.limit, "actual": failure.actual}
    return {"index": index, "error": {name: value for name, value in error.items() if value is not None}}


def model_answer(model: ModelInfo) -> dict[str, Any]:
    """The `model` member of every answer."""
    return {"id": model.id, "fingerprint": model.fingerprint, "dimensions": model.dimensions}


async def _embed_upload(
    state: State, model: ServedModel, upload: Upload, parameters: EmbedParameters
) -> list[ImageEmbedding | ImageFailure]:
    if upload.pixels is None:
        return await embed_images(
            state, model.engine, upload.images, timeout_s=parameters.timeout, priority=parameters.priority
        )
    urgent = urgency(state, priority=parameters.priority, timeout_s=parameters.timeout)
    rows_BD = await model.engine.embed_pixels(upload.pixels, lane=urgent.lane, deadline_s=urgent.deadline_s)
    return [_pixels_result(row, model.engine.input_px) for row in rows_BD]


def _pixels_result(row: NDArray[np.float32], size_px: int) -> ImageEmbedding | ImageFailure:
    if not np.isfinite(row).all():
        return ImageFailure("embedding_failed", "The model gave no embedding for this image.")
    return ImageEmbedding(row, size_px, size_px, "NPY", sha256="")


def _refuse_raw_lengths(parameters: EmbedParameters, model: ServedModel) -> None:
    if not parameters.normalize and model.manifest.normalise:
        raise InvalidParameter(
            "normalize=false can't be had: this model's bundle says that its embeddings have length 1",
            parameter="normalize",
        )


def _number_type(
    result: ImageEmbedding | ImageFailure, parameters: EmbedParameters
) -> NDArray[np.floating] | None:
    """The embedding as the caller wants its numbers; None for a failure."""
    if isinstance(result, ImageFailure):
        return None
    row = result.embedding
    if parameters.normalize:
        row = row / max(float(np.linalg.norm(row)), _UNIT_LENGTH_FLOOR)
    return np.ascontiguousarray(row, dtype=parameters.dtype)


def _item(
    index: int,
    result: ImageEmbedding | ImageFailure,
    row: NDArray[np.floating] | None,
    *,
    as_text: bool,
) -> dict[str, Any]:
    if isinstance(result, ImageFailure) or row is None:
        assert isinstance(result, ImageFailure), "an image without a row did not fail: this is a bug"
        return failure_answer(index, result)
    item = {
        "index": index,
        "embedding": base64_of(row) if as_text else row,
        "width": result.width,
        "height": result.height,
        "format": result.format,
    }
    return item | ({"sha256": result.sha256} if result.sha256 else {})
