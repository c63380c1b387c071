from typing import get_args

import orjson
import pytest

import app.api.refusals
from app.api.problems import IMAGE_PROBLEMS, PROBLEMS, problem_response
from app.api.refusals import ImageRefused, MethodNotAllowed, Unauthorized
from app.errors import FingerprintMismatch, InvalidFilter, NotReady, Overloaded, ServiceError, TooLarge
from app.inference.results import ImageFailure
from dino_core.errors import ImageErrorCode
from tests.app.api.serving import Api, multipart, photo

assert app.api.refusals  # its classes are leaves of the tree once it is imported


def leaves(kind: type[ServiceError]) -> set[type[ServiceError]]:
    children = kind.__subclasses__()
    return set().union(*map(leaves, children)) if children else {kind}


def body_of(error: ServiceError) -> dict[str, object]:
    body: dict[str, object] = orjson.loads(
        bytes(problem_response(error, request_id="r", instance="/embed").body)
    )
    return body


def test_every_error_has_an_answer_and_no_answer_is_without_an_error() -> None:
    assert set(PROBLEMS) == leaves(ServiceError)


def test_every_error_of_an_image_has_an_answer() -> None:
    ours = {"invalid_base64", "embedding_failed", "url_refused", "url_not_fetched"}
    assert set(IMAGE_PROBLEMS) == set(get_args(ImageErrorCode)) | ours


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in PROBLEMS if kind is not ImageRefused]
    assert len(set(codes)) == len(codes)
    assert "service_error" not in codes
    assert not set(codes) & set(IMAGE_PROBLEMS)


def test_a_problem_has_the_members_of_the_rfc_and_ours() -> None:
    answer = problem_response(TooLarge("too many", limit=3, actual=4), request_id="r", instance="/embed")
    assert answer.media_type == "application/problem+json"
    assert orjson.loads(bytes(answer.body)) == {
        "type": "/docs#request_too_large",
        "title": "The request is larger than any may be",
        "status": 413,
        "detail": "too many",
        "instance": "/embed",
        "code": "request_too_large",
        "request_id": "r",
        "limit": 3,
        "actual": 4,
    }


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        pytest.param(
            Overloaded("full", retry_after_s=1.25, reason="images"),
            {"retry-after": "2", "retry-after-ms": "1250"},
            id="overloaded",
        ),
        pytest.param(NotReady("starting"), {"retry-after": "2"}, id="not ready"),
        pytest.param(Unauthorized("who?"), {"www-authenticate": "Bearer"}, id="no key"),
        pytest.param(MethodNotAllowed("no", allowed="GET"), {"allow": "GET"}, id="method"),
        pytest.param(
            FingerprintMismatch("no", expected="a", found="b"), {"x-should-retry": "false"}, id="mismatch"
        ),
    ],
)
def test_headers_tell_clients_what_to_do(error: ServiceError, headers: dict[str, str]) -> None:
    answer = problem_response(error, request_id="r", instance="/")
    assert {name: answer.headers.get(name) for name in headers} == headers


def test_an_errors_own_attributes_are_members() -> None:
    assert body_of(FingerprintMismatch("no", expected="a", found="b"))["expected"] == "a"
    assert body_of(InvalidFilter("no", path="/and/0"))["path"] == "/and/0"


def test_a_refused_image_has_the_images_code_and_place() -> None:
    failure = ImageFailure("image_too_large", "large", limit=1, actual=2)
    body = body_of(ImageRefused(failure, index=3))
    assert (body["status"], body["code"], body["index"]) == (413, "image_too_large", 3)
    assert (body["limit"], body["actual"]) == (1, 2)


def test_unknown_paths_and_methods_are_problems_too(api: Api) -> None:
    nowhere = api.http.get("/nowhere")
    assert (nowhere.status_code, nowhere.json()["code"]) == (404, "unknown_route")
    assert nowhere.headers["Content-Type"] == "application/problem+json"
    wrong = api.http.get("/embed")
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["Allow"]) == (
        405,
        "method_not_allowed",
        "POST",
    )


def test_a_slash_too_many_is_an_unknown_path(api: Api) -> None:
    answer = api.http.post("/embed/", content=b"x", headers={"Content-Type": "image/jpeg"})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_route")


def test_a_problem_names_its_request_and_every_code_is_in_the_description(api: Api) -> None:
    answer = api.http.post("/embed", files=multipart([photo(1)]), params={"k": 1})
    assert answer.json()["request_id"] == answer.headers["X-Request-Id"]
    described = {problem["code"] for problem in api.http.get("/openapi.json").json()["x-problems"]}
    assert described == {kind.code for kind in PROBLEMS if kind is not ImageRefused} | set(IMAGE_PROBLEMS)
