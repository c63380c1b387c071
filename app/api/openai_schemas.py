"""The wire contract of `/v1`, which is OpenAI's."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class OpenAIEmbeddingsRequest(BaseModel):
    """`POST /v1/embeddings`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """Its id, as `GET /v1/models` lists it."""
    input: Any = Field(None, json_schema_extra={"type": ["string", "object", "array"]})
    """An image, or a list of them: a data URI, base64, `{"image": …}`, `{"type": "image_url", "image_url":
    {"url": …}}`, `{"image_base64": …}`, or `{"content": [one of these]}`."""
    messages: list[dict[str, Any]] | None = None
    """In place of `input`, a conversation with one image in its content."""
    encoding_format: Literal["float", "base64"] = "float"
    """Numbers, or base64 of little-endian float32."""
    dimensions: int | None = None
    """The model's own; others are refused."""
    modality: Literal["image"] | None = None
    """Of the input; there is only one."""
    user: str | None = None
    """Taken, and of no effect."""


class OpenAIEmbedding(BaseModel):
    """One image's embedding."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class OpenAIUsage(BaseModel):
    """One token for each image."""

    prompt_tokens: int
    total_tokens: int


class OpenAIEmbeddingsAnswer(BaseModel):
    """Of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class OpenAIModel(BaseModel):
    """One model."""

    id: str
    object: Literal["model"]
    created: int
    """Always 0: bundles don't say when they were made."""
    owned_by: str


class OpenAIModelsAnswer(BaseModel):
    """Of `GET /v1/models`."""

    object: Literal["list"]
    data: list[OpenAIModel]


class OpenAIError(BaseModel):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str
    """Stable, as everywhere in this service; the texts are not."""


class OpenAIErrorAnswer(BaseModel):
    """Every error below `/v1`."""

    error: OpenAIError
