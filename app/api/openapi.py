"""What FastAPI can't see by itself: bodies that are read by Content-Type, and answers in several forms."""

from typing import Any, Final

from pydantic import BaseModel

from app.api.problems import MEDIA_TYPE
from app.api.schemas import ProblemAnswer

PROBLEM_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "A problem (RFC 9457)",
        "content": {MEDIA_TYPE: {"schema": ProblemAnswer.model_json_schema()}},
    },
    # Takes the place of FastAPI's own description of a 422, which this service never sends.
    422: {
        "description": "A problem (RFC 9457)",
        "content": {MEDIA_TYPE: {"schema": ProblemAnswer.model_json_schema()}},
    },
}

_BINARY: Final = {"type": "string", "format": "binary"}


def answer_of(model: type[BaseModel], *media_types: str) -> dict[str, Any]:
    """A response's description: JSON of a model, and other forms of the same."""
    return {
        "model": model,
        "content": {media_type: {} for media_type in media_types if media_type != "application/json"},
    }


def body_of(
    parameters: type[BaseModel], *, arrays: bool = False, json_body: type[BaseModel] | None = None
) -> dict[str, Any]:
    """The description of a body with images, and of its parameters in a query.

    Args:
        parameters: What query and form may say.
        arrays: Whether application/x-npy is taken.
        json_body: The JSON body, where it is more than the parameters and `images`.
    """
    schema = _inlined(parameters.model_json_schema())
    members = schema.get("properties", {})
    images = {"type": "array", "items": {"type": "string"}, "description": "Base64 texts or data URIs."}
    as_json = (
        _inlined(json_body.model_json_schema())
        if json_body
        else {"type": "object", "properties": {"images": images, **members}}
    )
    content = {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"images": {"type": "array", "items": _BINARY}, **members},
            }
        },
        "application/json": {"schema": as_json},
        "image/*": {"schema": _BINARY},
    }
    if arrays:
        content["application/x-npy"] = {"schema": _BINARY}
    return {
        "requestBody": {"required": True, "content": content},
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": member}
            for name, member in members.items()
        ],
    }


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without references: those of a part point to its own root, which is not the document's."""
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:  # noqa: ANN401 - any JSON
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rpartition("/")[2]])
            return {key: resolve(member) for key, member in value.items()}
        return [resolve(member) for member in value] if isinstance(value, list) else value

    resolved: dict[str, Any] = resolve(schema)
    return resolved
