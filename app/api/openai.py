"""`POST /v1/embeddings` and `GET /v1/models`, as clients made for OpenAI's service expect them."""

from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api import answers
from app.api.body import SentImage, fetched, image_from_json, read_json
from app.api.embed import check_failures, embed_images
from app.api.openai_schemas import (
    OpenAIEmbeddingsAnswer,
    OpenAIEmbeddingsRequest,
    OpenAIModel,
    OpenAIModelsAnswer,
)
from app.api.openapi import OPENAI_ERROR_RESPONSES, answer_of, example, json_body_of
from app.api.refusals import InvalidJson, InvalidParameter, NoImages, TextRefused
from app.api.schemas import base64_of, parse
from app.api.state import StateDep, in_worker, served_model, timed, while_connected
from app.fetching import ImageAddress
from app.inference.results import ImageEmbedding, ImageFailure
from app.served_models import ServedModel

router = APIRouter(prefix="/v1", tags=["for OpenAI's clients"], responses=OPENAI_ERROR_RESPONSES)

_NOT_AN_IMAGE: Final = (
    "invalid_base64",
    "unsupported_format",
)  # what becomes of a text that is taken for one
_URL_SCHEMES: Final = ("http://", "https://")


@router.post(
    "/embeddings",
    summary="Embed images, with OpenAI's clients",
    responses={200: answer_of(OpenAIEmbeddingsAnswer, answers.JSON)},
    openapi_extra=json_body_of(OpenAIEmbeddingsRequest)
    | example(
        'curl {origin}/v1/embeddings --json "{\\"model\\": \\"default\\", '
        '\\"input\\": \\"data:image/jpeg;base64,$(base64 -w0 cat.jpg)\\"}"'
    ),
)
async def create_embeddings(request: Request, state: StateDep) -> Response:
    """Embeds one image or a list of them; each is a data URI, base64, or a content part with either.

    There are no answers for single images here: one that fails is the request's error. `usage` counts one
    token for each image.
    """
    with timed(state, "receive"):
        wish = parse(OpenAIEmbeddingsRequest, await read_json(request, state))
        model = served_model(state, wish.model)
        _check_dimensions(wish.dimensions, model)
        values = _values(wish)
        images = await while_connected(request, fetched(state, await in_worker(state, _images, values)))
    if not images:
        raise NoImages("`input` is an empty list: send one image or more")
    with timed(state, "embed"):
        results = await while_connected(request, embed_images(state, model.engine, images))
    _refuse_texts(values, results)
    check_failures(results, "fail")
    content = {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64_of(result.embedding)
                if wish.encoding_format == "base64"
                else result.embedding,
            }
            for index, result in enumerate(results)
            if isinstance(result, ImageEmbedding)
        ],
        "model": model.name,
        "usage": {"prompt_tokens": len(results), "total_tokens": len(results)},
    }
    return answers.structured(content, answers.JSON)


@router.get(
    "/models",
    summary="Which models there are, for OpenAI's clients",
    response_model=OpenAIModelsAnswer,
)
async def list_models(state: StateDep) -> Response:
    """Lists what `model` may be in a request."""
    return answers.structured(
        {"object": "list", "data": [_model_answer(model) for model in state["models"].all()]}, answers.JSON
    )


@router.get(
    "/models/{model}",
    summary="Whether there is a model, for OpenAI's clients",
    response_model=OpenAIModel,
)
async def retrieve_model(model: str, state: StateDep) -> Response:
    """Describes one model."""
    return answers.structured(_model_answer(state["models"].get(model)), answers.JSON)


def _model_answer(model: ServedModel) -> dict[str, Any]:
    # A bundle doesn't record when it was made, and clients want a number.
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "dinoserve"}


def _check_dimensions(asked: int | None, model: ServedModel) -> None:
    own = model.info.dimensions
    if asked is not None and asked != own:
        raise InvalidParameter(
            f"dimensions={asked} can't be had: this model's embeddings have {own}, and it was not trained so "
            "that a part of one is an embedding too",
            parameter="dimensions",
        )


def _values(wish: OpenAIEmbeddingsRequest) -> list[object]:
    """One value for each image."""
    if (wish.input is None) == (wish.messages is None):
        raise InvalidParameter("send either `input` or `messages`", parameter="input")
    if wish.messages is not None:
        return [{"content": _contents(wish.messages)}]
    return wish.input if isinstance(wish.input, list) else [wish.input]


def _contents(messages: list[dict[str, Any]]) -> list[object]:
    """The content parts of a conversation, which has one embedding."""
    parts: list[object] = []
    for message in messages:
        content = message.get("content")
        parts += content if isinstance(content, list) else [content]
    return parts


def _images(values: list[object]) -> list[SentImage | ImageAddress]:
    return [
        image_from_json(_by_url(_file_of(value, f"/input/{index}")), pointer=f"/input/{index}")
        for index, value in enumerate(values)
    ]


def _file_of(value: object, pointer: str) -> object:
    """The text or the address of the one image in a value, whichever peer's form it has."""
    match value:
        case str():
            return value
        case int():
            raise TextRefused("the input is a list of tokens, and this model embeds images: see /docs")
        case {"content": [part]}:  # Voyage, Cohere
            return _file_of(part, pointer)
        case {"content": [*parts]}:
            raise InvalidJson(
                f"{pointer} has {len(parts)} content parts: an embedding is of one image", pointer=pointer
            )
        case {"text": str()}:
            raise TextRefused("the input has text, and this model embeds images: leave the text away")
        case {"image": str(text)} | {"image_base64": str(text)}:  # Jina, Azure; Voyage
            return text
        case {"image_url": str(text)} | {"image_url": {"url": str(text)}}:  # OpenAI, vLLM, Cohere
            return text
        case [int(), *_]:
            raise TextRefused("the input is a list of tokens, and this model embeds images: see /docs")
    raise InvalidJson(
        f'{pointer} is no image: send a data URI, base64, {{"image": …}} or a content part `image_url`',
        pointer=pointer,
    )


def _by_url(value: object) -> object:
    is_address = isinstance(value, str) and value.startswith(_URL_SCHEMES)
    return {"url": value} if is_address else value


def _refuse_texts(values: list[object], results: list[ImageEmbedding | ImageFailure]) -> None:
    """Says of a text that is no image that it was taken for one: clients of other models send words."""
    for index, (value, result) in enumerate(zip(values, results, strict=True)):
        is_bare = isinstance(value, str) and not value.startswith("data:")
        if is_bare and isinstance(result, ImageFailure) and result.code in _NOT_AN_IMAGE:
            raise TextRefused(
                f"input {index} is neither a data URI nor an image in base64; if it is text: this "
                "model embeds images"
            )
