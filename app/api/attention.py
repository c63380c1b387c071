"""`POST /attention`: where a vision transformer looks, as a picture or as numbers.

Dimension key: A heads · Y X patches
"""

import io
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import Response

from app.api import answers
from app.api.body import Upload, read_upload, require_images
from app.api.embed import check_failures, embed_images, model_answer
from app.api.embed_schemas import AttentionAnswer, AttentionParameters
from app.api.openapi import answer_of, body_of, example
from app.api.refusals import InvalidParameter
from app.api.schemas import parse
from app.api.state import StateDep, in_worker, served_model, timed, while_connected
from app.api.urgency import expect_room
from app.errors import TooLarge
from app.inference.features import Array
from app.inference.results import ImageEmbedding
from dino_core.heatmap import heat, heat_over
from dino_core.preprocess import ImageLimits, Preprocessing, load_pixels

router = APIRouter(tags=["embeddings"])


@router.post(
    "/attention",
    summary="See where the model looks",
    responses={200: answer_of(AttentionAnswer, answers.PNG, answers.JSON, answers.NPY, answers.MSGPACK)},
    openapi_extra=body_of(AttentionParameters)
    | example(
        "curl -F images=@cat.jpg {origin}/attention -o attention.png",
        "curl -F images=@cat.jpg -H 'Accept: application/json' {origin}/attention",
    ),
)
async def attention(request: Request, state: StateDep) -> Response:
    """Draws what the class token looks at in the last block, over the image as the network sees it.

    By Accept a PNG, or the numbers: JSON, MessagePack, or NumPy's [heads, rows, columns]. Only vision
    transformers have attention; a model of another kind answers 422 with the code `output_unavailable`.
    """
    media_type = answers.negotiate(request, answers.PNG, answers.JSON, answers.NPY, answers.MSGPACK)
    expect_room(request, state)
    with timed(state, "receive"):
        upload = await read_upload(request, state)
    parameters = parse(AttentionParameters, upload.parameters)
    model = served_model(state, parameters.model)
    engine, preprocessing = model.engine, model.manifest.preprocessing
    heads, rows, columns = engine.shape_of("attention")
    data = _only_image(upload)
    if isinstance(parameters.head, int) and parameters.head >= heads:
        raise InvalidParameter(
            f"head={parameters.head} is not there: the last is {heads - 1}", parameter="head"
        )
    with timed(state, "embed"):
        work = embed_images(
            state,
            engine,
            upload.images,
            reading="attention",
            timeout_s=parameters.timeout,
            priority=parameters.priority,
        )
        (result,) = await while_connected(request, work)
    check_failures([result], "fail")
    assert isinstance(result, ImageEmbedding), "a failed image was let through: this is a bug"
    if media_type == answers.PNG:
        drawn = await in_worker(
            state, _png, data, result.embedding, parameters, preprocessing, engine.config.limits
        )
        return Response(drawn, media_type=answers.PNG)
    maps_AYX = _chosen(result.embedding, parameters.head)
    if media_type == answers.NPY:
        return answers.npy(maps_AYX, failed=0)
    content: dict[str, Any] = {
        "model": model_answer(model.info),
        "heads": len(maps_AYX),
        "grid": {"height": rows, "width": columns},
        "attention": maps_AYX,
        "width": result.width,
        "height": result.height,
        "format": result.format,
        "sha256": result.sha256,
    }
    return answers.structured(content, media_type)


def _only_image(upload: Upload) -> bytes:
    """The one image of a request; b"" for one that failed before it was embedded.

    Raises:
        NoImages: There is none.
        TooLarge: There are more.
    """
    require_images(upload)
    if upload.count > 1:
        raise TooLarge(
            f"the request has {upload.count} images, and this route draws one", limit=1, actual=upload.count
        )
    (image,) = upload.images
    return image if isinstance(image, bytes) else b""


def _chosen(maps_AYX: Array, head: int | str | None) -> Array:
    match head:
        case None:
            return maps_AYX
        case int():
            return maps_AYX[head : head + 1].copy()
    mean_1YX: Array = maps_AYX.mean(axis=0, keepdims=True)
    return mean_1YX


def _png(
    data: bytes,
    maps_AYX: Array,
    parameters: AttentionParameters,
    preprocessing: Preprocessing,
    limits: ImageLimits,
) -> bytes:
    map_YX = _chosen(maps_AYX, "mean" if parameters.head is None else parameters.head)[0]
    if parameters.overlay:
        # Decoded a second time: the first time's pixels are the next picture's by now.
        pixels_CHW = load_pixels(data, preprocessing, limits=limits)
        drawn_HW3 = heat_over(pixels_CHW.permute(1, 2, 0).contiguous().numpy(), map_YX)
    else:
        drawn_HW3 = heat(map_YX, size_hw=(preprocessing.crop_px, preprocessing.crop_px))
    file = io.BytesIO()
    Image.fromarray(drawn_HW3).save(file, "PNG")
    return file.getvalue()
