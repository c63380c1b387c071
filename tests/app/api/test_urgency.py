import base64
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import orjson
import pytest

from tests.app.api.serving import Api, multipart, photo
from tests.app.inference.colours import ColourEmbedder

StartApi = Callable[..., Api]


@contextlib.contextmanager
def asked(api: Api, embedder: ColourEmbedder, path: str, **request: Any) -> Iterator[None]:  # noqa: ANN401
    """A request that is under way, as the device is busy until the block ends."""
    embedder.open.clear()
    caller = threading.Thread(target=lambda: api.http.post(path, **request))
    caller.start()
    try:
        deadline_s = time.monotonic() + 20
        while not api.engine.gauges()["inflight_images"]:
            assert time.monotonic() < deadline_s, "the request did not come"
            time.sleep(0.005)
        yield
    finally:
        embedder.open.set()
        caller.join()


def lines(*images: bytes) -> bytes:
    return b"".join(orjson.dumps({"image": base64.b64encode(image).decode()}) + b"\n" for image in images)


@pytest.mark.parametrize(
    ("path", "headers", "is_bulk"),
    [
        pytest.param("/embed", {}, False, id="nothing said"),
        pytest.param("/embed", {"X-Priority": "bulk"}, True, id="header"),
        pytest.param("/embed?priority=bulk", {}, True, id="parameter"),
        pytest.param("/embed?priority=interactive", {"X-Priority": "bulk"}, False, id="parameter first"),
        pytest.param("/similar", {"X-Priority": "bulk"}, True, id="search"),
        pytest.param("/similar", {}, False, id="search, nothing said"),
        pytest.param("/collections/default/items", {"X-Priority": "bulk"}, True, id="adding"),
        pytest.param("/collections/default/items", {}, False, id="adding, nothing said"),
    ],
)
def test_a_request_says_its_lane(start: StartApi, path: str, headers: dict[str, str], is_bulk: bool) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder)
    with asked(api, embedder, path, files=multipart([photo(1)]), headers=headers):
        assert api.engine.gauges()["inflight_bulk_images"] == is_bulk


def test_a_stream_of_items_is_bulk(start: StartApi) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder)
    headers = {"Content-Type": "application/x-ndjson", "X-Priority": "interactive"}
    body = lines(photo(1), photo(2))
    with asked(api, embedder, "/collections/default/items", content=body, headers=headers):
        assert api.engine.gauges()["inflight_bulk_images"] == 2


@pytest.mark.parametrize(
    ("query", "headers", "settings"),
    [
        pytest.param("", {"X-Request-Timeout-Ms": "150"}, {}, id="header"),
        pytest.param("?timeout=0.15", {"X-Request-Timeout-Ms": "60000"}, {}, id="the parameter is shorter"),
        pytest.param("?timeout=60", {"X-Request-Timeout-Ms": "150"}, {}, id="the header is shorter"),
        pytest.param("?timeout=60", {}, {"max_request_timeout_s": 0.15}, id="the service's longest"),
        pytest.param("", {}, {"request_timeout_s": 0.15}, id="the service's own"),
    ],
)
@pytest.mark.parametrize("path", ["/embed", "/similar", "/collections/default/items"])
def test_a_deadline_is_the_shortest_of_what_is_said_and_allowed(
    start: StartApi, path: str, query: str, headers: dict[str, str], settings: dict[str, Any]
) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder, **settings)
    embedder.open.clear()
    answer = api.http.post(path + query, files=multipart([photo(1)]), headers=headers)
    embedder.open.set()
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    assert "after 0.15 s" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("header", "value"),
    [("X-Priority", "urgent"), ("X-Request-Timeout-Ms", "soon"), ("X-Request-Timeout-Ms", "0")],
)
def test_a_header_that_says_nonsense_is_refused_by_its_name(api: Api, header: str, value: str) -> None:
    answer = api.http.post("/embed", files=multipart([photo(1)]), headers={header: value})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")
    assert header.lower() in answer.json()["detail"].lower()


def test_a_request_that_finds_no_room_is_refused_before_its_body_is_here(start: StartApi) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder, max_concurrent_images=1, max_client_batch_size=1)
    host, port = api.url.removeprefix("http://").split(":")
    with asked(api, embedder, "/embed", files=multipart([photo(1)])):
        with socket.create_connection((host, int(port)), timeout=20) as caller:
            caller.sendall(
                b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n"
                b"Content-Length: 5000000\r\n\r\nthe first bytes"
            )
            answer = caller.recv(65536)
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: " in answer.lower()
        # A connection goes on after a refusal, though a body came that nobody read.
        with httpx.Client(base_url=api.url) as http:
            for _ in range(3):
                refused = http.post("/embed", content=bytes(1_000_000), headers={"Content-Type": "image/png"})
                assert refused.status_code == 429
            assert http.get("/health/ready").status_code == 200
    assert api.http.post("/embed", files=multipart([photo(2)])).status_code == 200


def test_searching_by_what_needs_no_engine_goes_on_when_it_is_full(start: StartApi) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder, max_concurrent_images=1, max_client_batch_size=1)
    with asked(api, embedder, "/embed", files=multipart([photo(1)])):
        answer = api.http.post("/similar", json={"id": "nobody"})
        assert answer.json()["code"] == "unknown_item"
