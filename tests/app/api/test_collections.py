import time
from collections.abc import Callable

import pytest

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]


def test_collections_are_made_listed_looked_at_and_deleted(start: StartApi, bundle: Bundle) -> None:
    api = start()
    made = api.http.post("/collections", json={"name": "holiday"})
    expected = {
        "name": "holiday",
        "fingerprint": bundle.manifest.fingerprint,
        "dimensions": 48,
        "items": 0,
        "metric": "cosine",
        "searchable": True,
        "aliases": [],
        "successor": None,
    }
    answer = made.json()
    assert abs(answer.pop("created_at") - time.time()) < 60
    assert (made.status_code, answer) == (201, expected)
    assert made.headers["Location"] == "/collections/holiday"
    names = [collection["name"] for collection in api.http.get("/collections").json()["data"]]
    assert names == ["default", "holiday"]

    api.http.post("/collections/holiday/items", files=multipart([photo(1)]))
    assert api.http.get("/collections/holiday").json()["items"] == 1
    assert api.http.get("/collections/default").json()["items"] == 0

    assert api.http.delete("/collections/holiday").status_code == 204
    assert api.http.get("/collections/holiday").json()["code"] == "unknown_collection"


def test_a_collection_of_another_model_says_that_it_can_not_be_searched(
    start: StartApi, other_bundle: Bundle
) -> None:
    api = start()
    api.catalogue.create("theirs", fingerprint=other_bundle.manifest.fingerprint, dimensions=48)
    assert api.http.get("/collections/theirs").json()["searchable"] is False


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        pytest.param("POST", "/collections", {"name": "default"}, 409, "collection_exists", id="taken"),
        pytest.param("POST", "/collections", {"name": "../up"}, 422, "invalid_collection", id="a path"),
        pytest.param("POST", "/collections", {"name": 3}, 400, "invalid_parameter", id="a number"),
        pytest.param("POST", "/collections", {}, 400, "invalid_parameter", id="no name"),
        pytest.param("POST", "/collections", [], 400, "invalid_json", id="an array"),
        pytest.param("POST", "/collections", {"name": "a", "b": 1}, 400, "unknown_parameter", id="unknown"),
        pytest.param("GET", "/collections/none", None, 404, "unknown_collection", id="not there"),
        pytest.param("DELETE", "/collections/none", None, 404, "unknown_collection", id="nothing to delete"),
        pytest.param("PATCH", "/collections", None, 405, "method_not_allowed", id="no such method"),
    ],
)
def test_what_can_not_be_done_is_refused(
    api: Api, method: str, path: str, body: object, status: int, code: str
) -> None:
    answer = api.http.request(method, path, json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_body_that_curl_calls_a_form_is_refused_by_its_content_type(api: Api) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = api.http.post("/collections", content=b'{"name": "a"}', headers=form)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "takes application/json" in answer.json()["detail"]


def test_a_chunked_body_above_the_limit_is_refused_by_counting(start: StartApi) -> None:
    api = start(max_request_bytes=2_000)
    answer = api.http.post(
        "/collections",
        content=iter([b" " * 1_500] * 2),
        headers={"Content-Type": "application/json"},
    )
    assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"", b"[" * 100_000])
def test_broken_json_is_refused_in_our_words(api: Api, content: bytes) -> None:
    answer = api.http.post("/collections", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_json")
