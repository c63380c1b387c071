"""What FastAPI can't see by itself: bodies that are read by Content-Type, and answers in several forms."""

from typing import Any, Final

from fastapi import FastAPI
from pydantic import BaseModel

from app.api.guard import LINES_MEDIA_TYPE
from app.api.openai_schemas import OpenAIErrorAnswer
from app.api.problems import IMAGE_PROBLEMS, MEDIA_TYPE, PROBLEMS
from app.api.refusals import ImageRefused
from app.api.schemas import ProblemAnswer

_PROBLEM: Final = {
    "description": "A problem (RFC 9457)",
    "content": {MEDIA_TYPE: {"schema": ProblemAnswer.model_json_schema()}},
}
# The second takes the place of FastAPI's own description of a 422, which this service never sends.
PROBLEM_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {"default": _PROBLEM, 422: _PROBLEM}
OPENAI_ERROR_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"description": "An error, in OpenAI's shape", "model": OpenAIErrorAnswer}
    for status in ("default", 422)
}

_BINARY: Final = {"type": "string", "format": "binary"}


def answer_of(model: type[BaseModel], *media_types: str) -> dict[str, Any]:
    """A response's description: JSON of a model, and other forms of the same."""
    others: dict[str, Any] = {
        media_type: {} for media_type in media_types if media_type != "application/json"
    }
    return {"model": model, "content": others}


def example(*commands: str) -> dict[str, Any]:
    """An operation's examples, for a shell; `{origin}` is where the service is."""
    return {"x-codeSamples": [{"lang": "shell", "source": command} for command in commands]}


def body_of(
    parameters: type[BaseModel],
    *,
    arrays: bool = False,
    json_body: type[BaseModel] | None = None,
    line: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """The description of a body with images, and of its parameters in a query.

    Args:
        parameters: What query and form may say.
        arrays: Whether application/x-npy is taken.
        json_body: The JSON body, where it is more than the parameters and `images`.
        line: Of NDJSON, where the route takes it.
    """
    members = _inlined(parameters.model_json_schema()).get("properties", {})
    images = {"type": "array", "items": {"type": "string"}, "description": "Base64 texts or data URIs."}
    files = {"type": "array", "items": _BINARY, "description": "Files; the field is repeated."}
    as_json = {"type": "object", "properties": {"images": images, **members}}
    content: dict[str, Any] = {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"images": files, **members}}},
        "application/json": {"schema": _inlined(json_body.model_json_schema()) if json_body else as_json},
        "image/*": {"schema": _BINARY},
    }
    if line:
        content[LINES_MEDIA_TYPE] = {"schema": _inlined(line.model_json_schema())}
    if arrays:
        content["application/x-npy"] = {"schema": _BINARY}
    return {
        "requestBody": {"required": True, "content": content},
        "parameters": _in_query(members),
    }


def lines_of(model: type[BaseModel]) -> dict[str, Any]:
    """A response's description: NDJSON, whose lines are of a model."""
    return {
        "description": "A line for each line",
        "content": {LINES_MEDIA_TYPE: {"schema": _inlined(model.model_json_schema())}},
    }


def lines_body_of(line: type[BaseModel], parameters: type[BaseModel]) -> dict[str, Any]:
    """The description of a body of NDJSON, and of the parameters in its query."""
    members = _inlined(parameters.model_json_schema()).get("properties", {})
    schema = _inlined(line.model_json_schema())
    return {
        "requestBody": {"required": True, "content": {LINES_MEDIA_TYPE: {"schema": schema}}},
        "parameters": _in_query(members),
    }


def json_body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The description of a body that is JSON."""
    schema = _inlined(model.model_json_schema())
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_problems(app: FastAPI) -> None:
    """Adds the table of errors to the app's description, for `/docs`."""
    by_code = {kind.code: problem for kind, problem in PROBLEMS.items() if kind is not ImageRefused}
    app.openapi()["x-problems"] = [
        {"code": code, "status": problem.status, "title": problem.title}
        for code, problem in sorted((by_code | IMAGE_PROBLEMS).items())
    ]


def _in_query(members: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "required": False, "schema": member} for name, member in members.items()
    ]


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
