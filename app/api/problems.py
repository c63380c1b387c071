"""Errors to HTTP answers (RFC 9457), once: the table below is complete, and a test says so."""

import math
from typing import Final, NamedTuple

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app import errors
from app.api import refusals
from app.errors import ServiceError

MEDIA_TYPE: Final = "application/problem+json"
OPENAI_PATHS: Final = "/v1/"


class Problem(NamedTuple):
    """How a kind of error is answered."""

    status: int
    title: str


PROBLEMS: Final[dict[type[ServiceError], Problem]] = {
    errors.TooLarge: Problem(413, "The request is larger than any may be"),
    errors.InvalidPixels: Problem(422, "The array is not pixels for this model"),
    errors.OutputUnavailable: Problem(422, "The model can't give that"),
    errors.Overloaded: Problem(429, "The service is busy"),
    errors.NotReady: Problem(503, "The service is not ready"),
    errors.DeadlineExceeded: Problem(504, "The time ran out"),
    errors.UnknownModel: Problem(404, "There is no such model"),
    errors.ModelRefused: Problem(422, "The bundle can't be served"),
    errors.ReloadUnderWay: Problem(409, "A model is being loaded already"),
    errors.UnknownCollection: Problem(404, "There is no such collection"),
    errors.CollectionExists: Problem(409, "The collection exists already"),
    errors.InvalidCollection: Problem(422, "No collection can be like that"),
    errors.FingerprintMismatch: Problem(409, "Embeddings of different models don't compare"),
    errors.InvalidVector: Problem(422, "The embedding can't be used"),
    errors.InvalidItem: Problem(422, "The item can't be kept"),
    errors.InvalidFilter: Problem(422, "The filter is malformed"),
    errors.InvalidQuery: Problem(422, "The query is out of bounds"),
    errors.UnknownItem: Problem(404, "There is no such item"),
    errors.SuccessorExists: Problem(409, "Another successor is being built"),
    errors.PredecessorChanged: Problem(409, "The collection was written to meanwhile"),
    errors.Unsupported: Problem(501, "The engine can't do this"),
    errors.InvalidImport: Problem(422, "The file can't be imported"),
    errors.UnknownSnapshot: Problem(404, "There is no such snapshot"),
    errors.NothingToReindex: Problem(409, "There is nothing to reindex"),
    errors.ComputationFailed: Problem(500, "The computation failed"),
    errors.StorageError: Problem(507, "The collections can't be written or read"),
    errors.DirectoryInUse: Problem(503, "Another process has the collections"),
    refusals.InvalidJson: Problem(400, "The body is not the JSON that this route takes"),
    refusals.InvalidMultipart: Problem(400, "The body is not valid multipart/form-data"),
    refusals.InvalidArray: Problem(400, "The body is not a NumPy array"),
    refusals.InvalidParameter: Problem(400, "A parameter has a value that it can't have"),
    refusals.UnknownParameter: Problem(400, "There is no such parameter"),
    refusals.NoImages: Problem(400, "There is nothing to work on"),
    refusals.TooManyParts: Problem(413, "The body has too many parts"),
    refusals.UploadTimeout: Problem(408, "The body did not arrive in time"),
    refusals.UnsupportedMediaType: Problem(415, "The route doesn't take this Content-Type"),
    refusals.NotAcceptable: Problem(406, "The route can't answer in a form that Accept names"),
    refusals.ImageRefused: Problem(422, "An image has no embedding"),  # its status is by its code, below
    refusals.TextRefused: Problem(400, "The model embeds images"),
    refusals.Unauthorized: Problem(401, "An API key is needed"),
    refusals.MissingScope: Problem(403, "The API key may not do this"),
    refusals.UntrustedHost: Problem(400, "The Host header names another machine"),
    refusals.CrossOrigin: Problem(403, "Pages of other sites may not do this"),
    refusals.UnknownRoute: Problem(404, "Nothing is here"),
    refusals.MethodNotAllowed: Problem(405, "The method is not for this path"),
    refusals.ClientLeft: Problem(499, "The caller left"),
    refusals.InternalError: Problem(500, "A fault of the service"),
}

# Where one image fails the request (`on_error=fail`); also the list of all codes that an image can fail with.
IMAGE_PROBLEMS: Final[dict[str, Problem]] = {
    "empty_image": Problem(422, "The image has no bytes"),
    "unsupported_format": Problem(415, "The file is in no format that the service reads"),
    "truncated_image": Problem(422, "The image ends too early"),
    "undecodable_image": Problem(422, "The image is damaged"),
    "image_too_large": Problem(413, "The image is above a limit"),
    "image_too_small": Problem(422, "The image is below a limit"),
    "aspect_ratio_too_extreme": Problem(422, "The image is too narrow"),
    "url_refused": Problem(422, "The URL is not fetched"),
    "url_not_fetched": Problem(422, "The URL gave no image"),
    "invalid_base64": Problem(400, "The image is not valid base64"),
    "embedding_failed": Problem(500, "The model gave no embedding"),
}

_MEMBERS = ("limit", "actual", "expected", "found", "path", "pointer", "parameter", "index")
_RETRY_NOT_READY_S = 2
_BAD_REQUESTS = (406, 415, 422)


def problem_response(error: ServiceError, *, request_id: str, instance: str) -> Response:
    """The answer to an error: a problem, or below `/v1` an error as OpenAI's clients read it.

    Args:
        error: Of a type in `PROBLEMS`.
        request_id: The answer's and the log's.
        instance: The path that was asked for.
    """
    if instance.startswith(OPENAI_PATHS):
        return _openai_response(error)
    source = error.failure if isinstance(error, refusals.ImageRefused) else error
    status, title = _problem_of(error)
    members = _members(source)
    if isinstance(error, refusals.ImageRefused):
        members["index"] = error.index
    if isinstance(error, errors.Overloaded):
        members["retry_after"] = error.retry_after_s
    body = {
        "type": f"/docs#{source.code}",
        "title": title,
        "status": status,
        "detail": error.title,
        "instance": instance,
        "code": source.code,
        "request_id": request_id,
        **members,
    }
    return Response(orjson.dumps(body), status, _headers(error, status), media_type=MEDIA_TYPE)


def item_error(error: ServiceError) -> dict[str, object]:
    """An error as it stands in the place of one item of an answer.

    Args:
        error: Of a type in `PROBLEMS`.
    """
    return {"code": error.code, "title": error.title, **_members(error)}


def install(app: FastAPI) -> None:
    """Makes the app answer every error with a problem, also those of FastAPI and of its router."""

    async def refuse(request: Request, error: Exception) -> Response:
        return problem_response(
            _ours(error, request),
            request_id=request.scope.get("state", {}).get("request_id", ""),
            instance=request.scope["path"],
        )

    for kind in (ServiceError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, refuse)


def refusal_of(findings: list[ErrorDetails]) -> ServiceError:
    """Pydantic's first finding as one of our errors.

    Args:
        findings: Of a `ValidationError`, at least one.
    """
    finding = findings[0]
    name = ".".join(str(part) for part in finding["loc"])
    message = finding["msg"].removeprefix("Value error, ")
    if finding["type"] == "extra_forbidden":
        return refusals.UnknownParameter(
            f"there is no parameter {name!r} here: see /docs for those there are", parameter=name
        )
    if finding["type"] == "missing":
        message = "it is missing"
    return refusals.InvalidParameter(f"{name}: {message}" if name else message, parameter=name)


def _openai_response(error: ServiceError) -> Response:
    """An error in OpenAI's shape."""
    # Its clients raise by status, and its service calls all that is wrong with an input a bad request.
    status, _ = _problem_of(error)
    status = 400 if status in _BAD_REQUESTS else status
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {
        "message": error.title,
        "type": "rate_limit_error" if status == 429 else kind,
        "param": _openai_parameter(error),
        "code": error.failure.code if isinstance(error, refusals.ImageRefused) else error.code,
    }
    return Response(
        orjson.dumps({"error": body}), status, _headers(error, status), media_type="application/json"
    )


def _openai_parameter(error: ServiceError) -> str | None:
    if isinstance(error, refusals.ImageRefused):
        return f"input[{error.index}]"
    return getattr(error, "parameter", None)


def _members(source: object) -> dict[str, object]:
    return {name: getattr(source, name) for name in _MEMBERS if getattr(source, name, None) is not None}


def _problem_of(error: ServiceError) -> Problem:
    if isinstance(error, refusals.ImageRefused):
        return IMAGE_PROBLEMS[error.failure.code]
    return PROBLEMS[type(error)]


def _headers(error: ServiceError, status: int) -> dict[str, str]:
    match error:
        case errors.Overloaded(retry_after_s=retry_after_s):
            # Whole seconds, as the header has them, and milliseconds for those who can wait less.
            return {
                "Retry-After": str(math.ceil(retry_after_s)),
                "Retry-After-Ms": str(math.ceil(retry_after_s * 1000)),
            }
        case errors.NotReady():
            return {"Retry-After": str(_RETRY_NOT_READY_S)}
        case refusals.Unauthorized():
            return {"WWW-Authenticate": "Bearer"}
        case refusals.MethodNotAllowed(allowed=allowed):
            return {"Allow": allowed}
    # Clients made for OpenAI's service try a 409 again, which can't help here.
    return {"X-Should-Retry": "false"} if status == 409 else {}


def _ours(error: Exception, request: Request) -> ServiceError:
    match error:
        case ServiceError():
            return error
        case RequestValidationError():
            findings = error.errors()
            # FastAPI puts where a value was, which is the query here, before its name.
            for finding in findings:
                finding["loc"] = finding["loc"][1:]
            return refusal_of(list(findings))
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "")
            return refusals.MethodNotAllowed(
                f"{request.method} is not for {request.scope['path']}: it takes {allowed}", allowed=allowed
            )
        case HTTPException(status_code=404):
            return refusals.UnknownRoute(
                f"nothing is at {request.scope['path']}: see /docs for what there is"
            )
    raise error
