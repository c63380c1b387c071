"""NDJSON in, NDJSON out: over a raw socket where the two ways at once matter."""

import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo
from tests.app.inference.colours import ColourEmbedder

StartApi = Callable[..., Api]
ITEMS = "/collections/default/items"
LINES = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def empty(start: StartApi) -> Api:
    return start()


def image(seed: int) -> str:
    return base64.b64encode(photo(seed)).decode()


def vector(seed: int, *, dimensions: int = 48) -> list[float]:
    row: list[float] = np.random.default_rng(seed).normal(size=dimensions).astype(np.float32).tolist()
    return row


def body(*lines: object) -> bytes:
    return b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )


def results(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.splitlines()]


def send(api: Api, *lines: object, **parameters: str) -> list[dict[str, Any]]:
    answer = api.http.post(ITEMS, content=body(*lines), headers=LINES, params=parameters)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/x-ndjson")
    return results(answer.content)


def test_each_line_has_its_own_result_in_order(empty: Api) -> None:
    lines = [
        {"id": "a", "image": image(1), "metadata": {"x": 1}, "source": "here"},
        {"image": image(2)},
        {"id": "a", "image": image(1), "metadata": {"x": 1}, "source": "here"},
    ]
    first, second, third = send(empty, *lines)
    assert first == {"index": 0, "id": "a", "status": "added"}
    assert (second["index"], second["status"], len(second["id"])) == (1, "added", 64)
    assert third == {"index": 2, "id": "a", "status": "unchanged"}
    assert [result["status"] for result in send(empty, *lines)] == ["unchanged"] * 3
    item = empty.http.get(f"{ITEMS}/a").json()
    assert (item["metadata"], item["source"]) == ({"x": 1}, "here")
    assert empty.http.get(f"{ITEMS}/a/thumbnail").headers["Content-Type"] == "image/webp"
    found = empty.http.post("/similar?k=1", files=multipart([photo(2)])).json()
    assert found["data"][0]["neighbours"][0]["id"] == second["id"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(b"{", "invalid_json", id="no JSON"),
        pytest.param(b"[]", "invalid_json", id="no object"),
        pytest.param(b"\xff\xfe", "invalid_json", id="no text"),
        pytest.param({"id": "x"}, "invalid_parameter", id="neither image nor embedding"),
        pytest.param({"id": "x", "image": "", "embedding": [1.0]}, "invalid_parameter", id="both"),
        pytest.param({"id": "x", "image": image(1), "no": 1}, "unknown_parameter", id="misspelled"),
        pytest.param({"id": "x", "image": "***"}, "invalid_base64", id="no base64"),
        pytest.param({"id": "x", "image": "aGVsbG8="}, "unsupported_format", id="no picture"),
        pytest.param({"id": "", "image": image(1)}, "invalid_item", id="no id"),
        pytest.param({"id": "x", "image": image(1), "source": "\0"}, "invalid_item", id="source"),
        pytest.param(
            {"id": "x", "image": image(1), "metadata": {"a": "x" * 20_000}}, "invalid_item", id="large"
        ),
        pytest.param({"id": "x", "embedding": vector(1)}, "invalid_parameter", id="whose embedding"),
        pytest.param({"id": "x", "image": "x" * 30_000_000}, "request_too_large", id="overlong"),
        pytest.param(b"[" * 100_000, "invalid_json", id="deep"),
    ],
)
def test_a_bad_line_is_its_own_error_and_the_stream_goes_on(api: Api, line: object, code: str) -> None:
    good = [{"id": f"good{number}", "image": image(number)} for number in range(2)]
    first, bad, last = send(api, good[0], line, good[1])
    assert "status" in first
    assert (bad["index"], bad["error"]["code"]) == (1, code)
    assert last["index"] == 2
    assert "status" in last
    assert api.http.get(f"{ITEMS}/x").status_code == 404


def test_embeddings_join_the_collection_of_their_model(empty: Api) -> None:
    fingerprint = empty.bundle.manifest.fingerprint
    packed = base64.b64encode(np.asarray(vector(2), "<f4").tobytes()).decode()
    lines = [{"id": "list", "embedding": vector(1)}, {"id": "packed", "embedding": packed}]
    assert [one["status"] for one in send(empty, *lines, fingerprint=fingerprint)] == ["added", "added"]
    answer = empty.http.post(ITEMS, content=body(*lines), headers=LINES | {"X-Fingerprint": fingerprint})
    assert [one["status"] for one in results(answer.content)] == ["unchanged", "unchanged"]
    found = empty.http.post("/similar", json={"embedding": vector(2), "k": 1}).json()["data"][0]["neighbours"]
    assert found[0]["id"] == "packed"
    assert found[0]["score"] == pytest.approx(1.0, abs=1e-5)
    with_image = send(empty, {"id": "image", "image": image(1)}, fingerprint=fingerprint)
    assert with_image[0]["status"] == "added"


@pytest.mark.parametrize(
    "embedding",
    [[1.0, 2.0], [0.0] * 48, [1e300] * 48, "AAAA", base64.b64encode(b"\xff" * 192).decode()],
    ids=["short", "zero", "infinite", "bytes", "NaN"],
)
def test_an_embedding_that_can_not_be_used_fails_alone(api: Api, embedding: object) -> None:
    fingerprint = api.bundle.manifest.fingerprint
    lines = [{"id": "x", "embedding": embedding}, {"id": "fine", "embedding": vector(1)}]
    bad, fine = send(api, *lines, fingerprint=fingerprint)
    assert bad["error"]["code"] in {"invalid_vector", "invalid_parameter"}
    assert fine["status"] in {"added", "unchanged"}


def test_embeddings_of_another_model_are_refused_with_both_fingerprints(empty: Api) -> None:
    line = {"id": "x", "embedding": vector(1)}
    for sent in (
        {"content": body(line), "headers": LINES, "params": {"fingerprint": "sha256:other"}},
        {"json": {"items": [line]}, "params": {"fingerprint": "sha256:other"}},
        {"json": {"items": [line], "fingerprint": "sha256:other"}},
        {"json": {"items": [line]}, "headers": {"X-Fingerprint": "sha256:other"}},
        {"files": multipart([photo(1)]), "params": {"fingerprint": "sha256:other"}},
    ):
        answer = empty.http.post(ITEMS, **sent)
        assert (answer.status_code, answer.json()["code"]) == (409, "fingerprint_mismatch")
        assert answer.json()["found"] == "sha256:other"
        assert answer.json()["expected"] == empty.bundle.manifest.fingerprint
    assert empty.http.get("/collections/default").json()["items"] == 0
    both = empty.http.post(
        f"{ITEMS}?fingerprint=sha256:a", content=b"", headers=LINES | {"X-Fingerprint": "sha256:b"}
    )
    assert both.status_code == 400


def test_embeddings_in_a_json_body_join_too(empty: Api) -> None:
    items = [{"id": "v", "embedding": vector(1)}, {"id": "i", "image": image(1)}]
    said = {"items": items, "fingerprint": empty.bundle.manifest.fingerprint}
    data = empty.http.post(ITEMS, json=said).json()["data"]
    assert [one["status"] for one in data] == ["added", "added"]
    without = empty.http.post(ITEMS, json={"items": items[:1]})
    assert (without.status_code, without.json()["parameter"]) == (400, "fingerprint")
    wrong = empty.http.post(ITEMS, json=said | {"items": [{"id": "v", "embedding": [1.0]}]})
    assert (wrong.status_code, wrong.json()["code"]) == (422, "invalid_vector")


def test_another_models_collection_takes_its_embeddings_and_no_pictures(
    start: StartApi, other_bundle: Bundle
) -> None:
    api, theirs = start(), other_bundle.manifest.fingerprint
    api.catalogue.create("theirs", fingerprint=theirs, dimensions=48)
    path = "/collections/theirs/items"
    lines = body({"id": "v", "embedding": vector(1)}, {"id": "i", "image": image(1)})
    refused = api.http.post(path, content=lines, headers=LINES)
    assert (refused.status_code, refused.json()["code"]) == (409, "fingerprint_mismatch")
    taken = results(api.http.post(f"{path}?fingerprint={theirs}", content=lines, headers=LINES).content)
    assert taken[0]["status"] == "added"
    assert taken[1]["error"]["code"] == "fingerprint_mismatch"


def test_a_stream_may_be_longer_than_any_other_body(start: StartApi) -> None:
    api = start(max_request_bytes=100_000, max_image_bytes=50_000)
    fingerprint = api.bundle.manifest.fingerprint
    lines = [{"id": f"{number}", "embedding": vector(number)} for number in range(700)]
    sent = body(*lines)
    assert len(sent) > 300_000
    answer = api.http.post(f"{ITEMS}?fingerprint={fingerprint}", content=sent, headers=LINES)
    assert [one["index"] for one in results(answer.content)] == list(range(700))
    assert api.http.get("/collections/default").json()["items"] == 700
    for path, headers in (
        (ITEMS, {"Content-Type": "application/json"}),
        ("/embed", LINES),
        ("/similar", LINES),
    ):
        assert api.http.post(path, content=sent, headers=headers).status_code == 413


def test_who_may_not_ask_is_refused_before_a_line_is_read(start: StartApi, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-many-characters\n")
    api = start(api_key_file=keys)

    with Raw(api) as raw:  # nothing of the body is sent
        assert raw.read_head().startswith("HTTP/1.1 401")


class Raw:
    """A request whose body is sent, and whose answer is read, as a test likes."""

    def __init__(self, api: Api, *, path: str = ITEMS, headers: str = "") -> None:
        address = urlsplit(api.url)
        assert address.hostname is not None
        self._socket = socket.create_connection((address.hostname, address.port or 80), timeout=20)
        self._socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/x-ndjson\r\n"
            f"Transfer-Encoding: chunked\r\n{headers}\r\n".encode()
        )
        self._read = b""

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self._socket.sendall(b"0\r\n\r\n")

    def read_until(self, what: bytes) -> bytes:
        while what not in self._read:
            piece = self._socket.recv(65_536)
            assert piece, f"the connection was closed before {what!r}: {self._read!r}"
            self._read += piece
        before, _, self._read = self._read.partition(what)
        return before + what

    def read_head(self) -> str:
        return self.read_until(b"\r\n\r\n").decode()


def test_results_come_while_lines_are_still_sent(empty: Api) -> None:
    with Raw(empty) as raw:
        for number in range(3):
            raw.send(body({"id": f"{number}", "image": image(number)}))
            if number == 0:
                assert raw.read_head().startswith("HTTP/1.1 200")
            raw.read_until(b'{"index":%d,"id":"%d","status":"added"}\n' % (number, number))
            # Acknowledged is on disk, and found.
            assert empty.http.get(f"{ITEMS}/{number}").status_code == 200
        raw.end()
        raw.read_until(b"0\r\n\r\n")


def test_a_line_that_does_not_come_ends_the_stream_and_says_so(start: StartApi) -> None:
    api = start(upload_timeout_s=0.5)
    with Raw(api) as raw:
        raw.send(body({"id": "a", "image": image(1)}) + b'{"id": "never ends')
        raw.read_head()
        raw.read_until(b'"status":"added"}\n')
        said = raw.read_until(b"0\r\n\r\n")
    assert b'{"error":{"code":"upload_timeout"' in said
    assert api.http.get("/collections/default").json()["items"] == 1


def test_a_stream_may_take_longer_than_the_time_for_a_body_as_long_as_lines_come(start: StartApi) -> None:
    api = start(upload_timeout_s=0.6)
    with Raw(api) as raw:
        for number in range(5):
            raw.send(body({"id": f"{number}", "image": image(number)}))
            time.sleep(0.3)
        raw.end()
        raw.read_until(b'"index":4,"id":"4","status":"added"}\n')


def test_a_caller_who_leaves_stops_the_work(start: StartApi) -> None:
    embedder = ColourEmbedder(max_batch=4)
    api = start(embedder=embedder)
    embedder.open.clear()
    with Raw(api) as raw:
        raw.send(body(*({"id": f"{number}", "image": image(number)} for number in range(200))))
        assert embedder.entered.wait(20)
    deadline_s = time.monotonic() + 20
    while (
        time.monotonic() < deadline_s
        and 'cancelled_total{model="colours"} 0' in api.http.get("/metrics").text
    ):
        time.sleep(0.02)
    embedder.open.set()
    while api.engine.gauges()["inflight_images"] and time.monotonic() < deadline_s:
        time.sleep(0.02)
    # Of 200 pictures the batch at work was computed, and perhaps the one behind it; nothing was kept.
    assert len(embedder.batches) <= 3
    assert api.http.get("/collections/default").json()["items"] == 0
    assert send(api, {"id": "another", "image": image(1)})[0]["status"] == "added"


def test_a_caller_who_takes_no_results_is_not_read_from(start: StartApi) -> None:
    api = start(upload_timeout_s=30)
    fingerprint = api.bundle.manifest.fingerprint
    line = b"{\n" * 10_000  # each answer is 30 times longer than its line
    sent = 0

    with Raw(api, path=f"{ITEMS}?fingerprint={fingerprint}") as raw:
        raw._socket.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while sent < 200_000_000:
                raw.send(line)
                sent += len(line)
    assert sent < 20_000_000  # buffers of sockets on both ways; without bounds all would be taken


def test_many_streams_at_once_lose_nothing(empty: Api) -> None:
    fingerprint = empty.bundle.manifest.fingerprint
    done: dict[int, list[dict[str, Any]]] = {}

    def stream(caller: int) -> None:
        lines = [{"id": f"{caller}-{number}", "embedding": vector(number)} for number in range(200)]
        done[caller] = send(empty, *lines, fingerprint=fingerprint)

    threads = [threading.Thread(target=stream, args=(caller,)) for caller in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([one["status"] for one in done[caller]] == ["added"] * 200 for caller in range(4))
    assert empty.http.get("/collections/default").json()["items"] == 800
