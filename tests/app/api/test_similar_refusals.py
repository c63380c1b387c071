"""What can't be asked of searches, counts and listings: a clear problem each, the collection untouched."""

import base64
import json
from typing import Any

import httpx
import pytest

from tests.app.api.album import IDS, D
from tests.app.api.serving import Api

NUMBERS = [1.0] * D


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param({"id": []}, 400, "no_images", id="no ids"),
        pytest.param({"positive": []}, 400, "no_images", id="no likes"),
        pytest.param({"positive": [], "negative": ["x"]}, 422, "invalid_query", id="only dislikes"),
        pytest.param({"embedding": []}, 422, "invalid_vector", id="no numbers"),
        pytest.param({"embedding": [[]]}, 422, "invalid_vector", id="one embedding of nothing"),
        pytest.param({"embedding": ""}, 422, "invalid_vector", id="an empty text"),
        pytest.param({"embedding": "AACAPw=="}, 422, "invalid_vector", id="a text of one number"),
        pytest.param({"embedding": [NUMBERS, NUMBERS[1:]]}, 400, "invalid_parameter", id="ragged"),
        pytest.param({"embedding": [NUMBERS, 1.0]}, 400, "invalid_parameter", id="a number among lists"),
        pytest.param({"embedding": [[NUMBERS]]}, 400, "invalid_parameter", id="three axes"),
        pytest.param({"embedding": ["1"] * D}, 400, "invalid_parameter", id="texts for numbers"),
        pytest.param({"embedding": [True] * D}, 400, "invalid_parameter", id="booleans for numbers"),
        pytest.param({"embedding": [None] * D}, 400, "invalid_parameter", id="nulls for numbers"),
        pytest.param({"embedding": {"a": 1}}, 400, "invalid_parameter", id="an object"),
        pytest.param({"embedding": [[0.0] * D, NUMBERS]}, 422, "invalid_vector", id="one without direction"),
        pytest.param({"embedding": [1e39] * D}, 200, "", id="beyond float32, but of a direction"),
        pytest.param({"id": "x", "positive": ["x"]}, 400, "invalid_parameter", id="an id and likes"),
        pytest.param({"embedding": NUMBERS, "positive": ["x"]}, 400, "invalid_parameter", id="two queries"),
        pytest.param({"id": {"a": 1}}, 400, "invalid_parameter", id="an object for an id"),
        pytest.param({"id": [1]}, 400, "invalid_parameter", id="a number for an id"),
        pytest.param({"positive": "x"}, 400, "invalid_parameter", id="a text for a list of likes"),
        pytest.param({"positive": [{}]}, 400, "invalid_parameter", id="a like of nothing"),
        pytest.param(
            {"positive": [{"id": "x", "embedding": NUMBERS}]}, 400, "invalid_parameter", id="of two"
        ),
        pytest.param({"positive": [{"id": "x", "colour": 1}]}, 400, "unknown_parameter", id="unknown member"),
        pytest.param({"positive": [IDS[0], "nobody"]}, 404, "unknown_item", id="an unknown like"),
        pytest.param({"positive": [IDS[0]], "negative": ["nobody"]}, 404, "unknown_item", id="and dislike"),
        pytest.param({"positive": [{"image": "!"}]}, 400, "invalid_base64", id="a like that is no image"),
        pytest.param({"positive": [{"image": "AAAA"}]}, 415, "unsupported_format", id="nor a picture"),
        pytest.param({"positive": [[1.0, 2.0]]}, 422, "invalid_vector", id="a like of other dimensions"),
        pytest.param(
            {"positive": [{"embedding": [NUMBERS, NUMBERS]}]},
            413,
            "request_too_large",
            id="two embeddings in one like",
        ),
        pytest.param({"positive": [{"id": IDS[0], "weight": 0}]}, 400, "invalid_parameter", id="no weight"),
        pytest.param({"positive": [{"id": IDS[0], "weight": -1}]}, 400, "invalid_parameter", id="below 0"),
        pytest.param(
            {"positive": [{"id": IDS[0], "weight": 2}], "strategy": "best_score"},
            422,
            "invalid_query",
            id="a weight with best_score",
        ),
        pytest.param({"positive": IDS[:60] + IDS[:5]}, 400, "invalid_parameter", id="65 likes"),
        pytest.param(
            {"positive": IDS[:40], "negative": IDS[:40]}, 422, "invalid_query", id="80 likes and dislikes"
        ),
        pytest.param(
            {"positive": [NUMBERS, [-x for x in NUMBERS]]}, 422, "invalid_vector", id="likes that cancel out"
        ),
        pytest.param(
            {"id": IDS[0], "negative": [IDS[1]]}, 422, "invalid_query", id="negative without positive"
        ),
        pytest.param(
            {"id": IDS[0], "strategy": "best_score"}, 422, "invalid_query", id="strategy without likes"
        ),
        pytest.param({"id": IDS[0], "strategy": "worst"}, 400, "invalid_parameter", id="no such strategy"),
        pytest.param({"id": IDS[0], "k": 0}, 400, "invalid_parameter", id="k of 0"),
        pytest.param({"id": IDS[0], "k": 1_000_000}, 400, "invalid_parameter", id="k of a million"),
        pytest.param({"id": IDS[0], "k": 2.5}, 400, "invalid_parameter", id="k of two and a half"),
        pytest.param({"id": IDS[0], "offset": -1}, 400, "invalid_parameter", id="offset below 0"),
        pytest.param({"id": IDS[0], "k": 1, "offset": 1_000}, 422, "invalid_query", id="too deep"),
        pytest.param({"id": IDS[0], "threshold": 2}, 400, "invalid_parameter", id="threshold"),
        pytest.param({"id": IDS[0], "max_score": -2}, 400, "invalid_parameter", id="max_score"),
        pytest.param({"id": IDS[0], "threshold": 0.5, "max_score": 0.4}, 422, "invalid_query", id="no range"),
        pytest.param({"id": IDS[0], "diversify": 1.5}, 400, "invalid_parameter", id="diversify"),
        pytest.param({"id": IDS[0], "diversify": 0.5, "group_by": "class"}, 422, "invalid_query", id="both"),
        pytest.param({"id": IDS[0], "group_size": 2}, 422, "invalid_query", id="group_size alone"),
        pytest.param(
            {"id": IDS[0], "group_by": "class", "group_size": 0}, 400, "invalid_parameter", id="size 0"
        ),
        pytest.param(
            {"id": IDS[0], "group_by": "class", "group_size": 101}, 422, "invalid_query", id="1,010"
        ),
        pytest.param({"id": IDS[0], "group_by": ""}, 422, "invalid_query", id="no field"),
        pytest.param({"id": IDS[0], "group_by": []}, 400, "invalid_parameter", id="no keys"),
        pytest.param({"id": IDS[0], "exclude": "x"}, 400, "invalid_parameter", id="exclude is a text"),
        pytest.param(
            {"id": IDS[0], "exclude": ["x"] * 1_001}, 400, "invalid_parameter", id="too many excluded"
        ),
        pytest.param({"id": IDS * 5}, 413, "request_too_large", id="300 queries"),
        pytest.param({"id": IDS[:50], "k": 600}, 413, "request_too_large", id="30,000 neighbours"),
        pytest.param({"embedding": [[1.0] * D] * 257}, 413, "request_too_large", id="257 embeddings"),
        pytest.param({"id": IDS[0], "filter": [1]}, 400, "invalid_parameter", id="a list for a filter"),
        pytest.param({"id": IDS[0], "filter": {"field": "class"}}, 422, "invalid_filter", id="no operator"),
        pytest.param({"id": IDS[0], "filter": {"field": "nobody", "eq": 1}}, 200, "", id="a missing field"),
        pytest.param({"id": IDS[0], "filter": {"field": "class", "gt": 1}}, 200, "", id="another type"),
        pytest.param({"id": "a" * 10_000}, 404, "unknown_item", id="an id of 10 kB"),
        pytest.param({"id": "\0"}, 404, "unknown_item", id="an id that none can have"),
        pytest.param({"id": "../../x"}, 404, "unknown_item", id="an id with slashes"),
        pytest.param({"id": IDS[0], "collection": "../x"}, 404, "unknown_collection", id="no collection"),
    ],
)
def test_what_can_not_be_asked_is_refused_and_changes_nothing(
    album: Api, body: dict[str, Any], status: int, code: str
) -> None:
    before = album.catalogue.get("default").seq
    answer = album.http.post("/similar", json=body)
    assert (answer.status_code, answer.json().get("code", "")) == (status, code), answer.text
    if status == 200:
        assert answer.json()["data"][0]["neighbours"] == [] or "filter" not in body
    else:
        assert len(answer.json()["detail"]) > 10
    assert album.catalogue.get("default").seq == before


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        pytest.param(b'{"embedding": [NaN]}', 400, "invalid_json", id="NaN"),
        pytest.param(b'{"embedding": [1e999]}', 400, "invalid_json", id="a number beyond all"),
        pytest.param(b'{"id": ' + b"[" * 100_000, 400, "invalid_json", id="deep JSON"),
        pytest.param(b'{"id": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "invalid_parameter", id="deep lists"),
        pytest.param(b'{"embedding": [' + b"1," * 10_000_000 + b"1]}", 413, "request_too_large", id="20 MB"),
        pytest.param(
            b'{"embedding": "' + b"AAAA" * 20_000 + b'"}', 413, "request_too_large", id="312 in text"
        ),
        pytest.param(
            b'{"embedding": "' + base64.b64encode(bytes(30_000_000)) + b'"}',
            413,
            "request_too_large",
            id="40 MB",
        ),
    ],
)
def test_json_that_is_too_much_is_refused(album: Api, content: bytes, status: int, code: str) -> None:
    answer = album.http.post("/similar", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text[:500]


def test_a_malformed_filter_is_pointed_at(album: Api) -> None:
    broken = {"and": [{"field": "class", "eq": "cat"}, {"not": {"field": "number", "near": 3}}]}
    expected = (422, "invalid_filter", "/and/1/not/near")

    def said(answer: httpx.Response) -> tuple[int, str, str]:
        problem = answer.json()
        return answer.status_code, problem["code"], problem["path"]

    assert said(album.http.post("/similar", json={"id": IDS[0], "filter": broken})) == expected
    grouped = {"id": IDS[0], "filter": broken, "group_by": "class"}
    assert said(album.http.post("/similar", json=grouped)) == expected
    assert said(album.http.post("/collections/default/count", json={"filter": broken})) == expected
    params = {"filter": json.dumps(broken)}
    assert said(album.http.get("/collections/default/items", params=params)) == expected


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        pytest.param(
            "POST", "/collections/none/count", {"json": {}}, 404, "unknown_collection", id="unknown"
        ),
        pytest.param(
            "POST",
            "/collections/default/count",
            {"json": {"filter": 1}},
            400,
            "invalid_parameter",
            id="a number",
        ),
        pytest.param("POST", "/collections/default/count", {"json": []}, 400, "invalid_json", id="a list"),
        pytest.param("GET", "/collections/default/count", {}, 405, "method_not_allowed", id="counted by GET"),
        pytest.param(
            "GET",
            "/collections/default/items?filter=x",
            {},
            400,
            "invalid_parameter",
            id="a filter not of JSON",
        ),
        pytest.param(
            "GET",
            "/collections/default/items?filter=3",
            {},
            422,
            "invalid_filter",
            id="a number for a filter",
        ),
        pytest.param(
            "GET", "/collections/none/items?filter={}", {}, 404, "unknown_collection", id="no collection"
        ),
    ],
)
def test_what_can_not_be_counted_or_listed_is_refused(
    album: Api, method: str, path: str, options: dict[str, Any], status: int, code: str
) -> None:
    answer = album.http.request(method, path, **options)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
