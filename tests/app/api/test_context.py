import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from app.search.collection import CollectionInfo
from app.search.embedded.library import Collections
from app.telemetry import JsonLines
from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]


class BrokenCatalogue(Collections):
    """Real collections, but for a fault in the listing."""

    def list(self) -> list[CollectionInfo]:
        raise ZeroDivisionError("the secret is swordfish")


@pytest.mark.parametrize(
    ("sent", "echoed"), [("abc-1.2_3", True), ("two words", False), ("x" * 65, False), ("", False)]
)
def test_a_harmless_request_id_is_echoed_and_any_other_is_replaced(api: Api, sent: str, echoed: bool) -> None:
    found = api.http.get("/info", headers={"X-Request-Id": sent}).headers["X-Request-Id"]
    assert (found == sent) is echoed
    assert found


def test_a_fault_of_ours_is_a_problem_that_tells_nothing(
    start: StartApi, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with BrokenCatalogue.open(tmp_path / "broken") as catalogue:
        api = start(catalogue=catalogue)
        answer = api.http.get("/collections")
        assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
        assert "swordfish" not in answer.text  # no word that a random hexadecimal id could hold
        assert "ZeroDivisionError" not in answer.text
        request_id = answer.headers["X-Request-Id"]
        assert answer.json()["request_id"] == request_id
        assert request_id in caplog.text  # with the traceback
        assert "the secret is swordfish" in caplog.text
        assert 'code="500",route="/collections"' in api.http.get("/metrics").text


def test_every_request_is_counted_by_its_route_and_not_by_its_path(start: StartApi) -> None:
    api = start()
    for name in ("a", "b"):
        api.http.get(f"/collections/{name}")
    api.http.get("/made/up")
    text = api.http.get("/metrics").text
    assert 'dino_serve_requests_total{code="404",route="/collections/{name}"} 2.0' in text
    assert 'dino_serve_requests_total{code="404",route="none"} 1.0' in text
    assert "made/up" not in text


@pytest.mark.parametrize("path", ["/", "/health", "/info", "/collections/default", "/collections/none"])
def test_head_is_get_without_a_body(api: Api, path: str) -> None:
    asked, got = api.http.head(path), api.http.get(path)
    assert (asked.status_code, asked.content) == (got.status_code, b"")
    assert asked.headers["Content-Type"] == got.headers["Content-Type"]


def test_every_answer_has_the_headers_that_guard_browsers(api: Api) -> None:
    for path in ("/", "/info", "/nowhere"):
        headers = api.http.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers
        assert "total;dur=" in headers["Server-Timing"]


def test_a_log_line_of_a_request_is_json_with_its_id(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="app.requests"):
        request_id = api.http.post("/embed", files=multipart([photo(1)])).headers["X-Request-Id"]
        api.http.get("/info")  # the line comes after its answer; by the next answer it is there
    record = next(r for r in caplog.records if r.name == "app.requests")
    line = json.loads(JsonLines().format(record))
    assert (line["request_id"], line["method"], line["path"]) == (request_id, "POST", "/embed")
    assert line["status"] == 200
    assert line["duration_ms"] > 0
