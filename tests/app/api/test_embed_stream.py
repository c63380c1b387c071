"""`/embed/stream`: a line in, a line out, both ways at once."""

import contextlib
import http.client
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo
from tests.app.api.test_embed import SAME, damaged_png, embeddings_of, text_of
from tests.app.api.test_item_stream import LINES, Raw, body, results
from tests.app.inference.colours import ColourEmbedder, picture
from tests.app.running import Service, running_service

StartApi = Callable[..., Api]
STREAM = "/embed/stream"


def send(api: Api, *lines: object, **parameters: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    answer = api.http.post(STREAM, content=body(*lines), headers=LINES, params=parameters)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/x-ndjson"), answer.text
    return results(answer.content)


def test_each_line_has_its_embedding_in_order_with_its_id(api: Api) -> None:
    files = [photo(seed) for seed in range(150)]  # more than two batches
    ids: list[object] = [f"line {number}" for number in range(149)]
    lines = [{"id": key, "image": text_of(file)} for key, file in zip([*ids, 7], files, strict=True)]
    answers = send(api, *lines)
    assert [one["index"] for one in answers] == list(range(150))
    assert [one["id"] for one in answers] == [*ids, 7]
    rows = np.array([one["embedding"] for one in answers])
    np.testing.assert_allclose(rows, embeddings_of(api.bundle, files), atol=SAME)
    assert answers[0]["format"] == "JPEG"
    assert len(answers[0]["sha256"]) == 64
    assert "id" not in send(api, {"image": text_of(files[0])})[0]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(b"{", "invalid_json", id="no JSON"),
        pytest.param(b"[]", "invalid_json", id="no object"),
        pytest.param({"id": "x"}, "invalid_parameter", id="no image"),
        pytest.param({"id": "x", "image": 1}, "invalid_parameter", id="a number"),
        pytest.param({"id": "x", "image": text_of(photo(1)), "k": 1}, "unknown_parameter", id="misspelled"),
        pytest.param({"id": "x", "image": "***"}, "invalid_base64", id="no base64"),
        pytest.param({"id": "x", "image": "aGVsbG8="}, "unsupported_format", id="no picture"),
        pytest.param({"id": "x", "image": text_of(damaged_png())}, "undecodable_image", id="damaged"),
        pytest.param({"id": "x", "image": "x" * 30_000_000}, "request_too_large", id="overlong"),
    ],
)
def test_a_bad_line_is_its_own_error_and_the_stream_goes_on(api: Api, line: object, code: str) -> None:
    good = {"image": text_of(photo(1))}
    first, bad, last = send(api, good, line, good)
    assert "embedding" in first
    assert (bad["index"], bad["error"]["code"]) == (1, code)
    if isinstance(line, dict) and code != "request_too_large":
        assert bad["id"] == "x"
    assert (last["index"], last["embedding"]) == (2, first["embedding"])


def test_lines_have_the_forms_of_embed(api: Api) -> None:
    line = {"image": f"data:image/jpeg;base64,{text_of(photo(1))}"}
    for parameters in (
        {"encoding": "base64"},
        {"dtype": "float16"},
        {"pool": "mean"},
        {"output": "patches"},
        {"output": "patches", "encoding": "base64", "dtype": "float16", "normalize": "false"},
    ):
        (streamed,) = send(api, line, **parameters)
        plain = api.http.post("/embed", files=multipart([photo(1)]), params=parameters).json()["data"][0]
        assert streamed == plain


@pytest.mark.parametrize(
    ("parameters", "headers", "status"),
    [
        pytest.param({"pool": "max"}, LINES, 400, id="no pooling of ours"),
        pytest.param({"on_error": "fail"}, LINES, 400, id="there is no failing of all"),
        pytest.param([("dtype", "float16"), ("dtype", "float32")], LINES, 400, id="twice"),
        pytest.param({}, {"Content-Type": "application/json"}, 415, id="JSON"),
        pytest.param({}, LINES | {"Accept": "image/png"}, 406, id="another form"),
    ],
)
def test_what_a_stream_is_not_is_refused_before_a_line_is_read(
    api: Api,
    parameters: dict[str, str] | list[tuple[str, str | int | float | bool | None]],
    headers: dict[str, str],
    status: int,
) -> None:
    answer = api.http.post(STREAM, params=parameters, headers=headers, content=body({"image": ""}))
    assert answer.status_code == status
    assert answer.json()["status"] == status


def test_results_come_while_lines_are_still_sent(api: Api) -> None:
    with Raw(api, path=STREAM) as raw:
        for number in range(3):
            raw.send(body({"id": number, "image": text_of(photo(number))}))
            if number == 0:
                assert raw.read_head().startswith("HTTP/1.1 200")
            raw.read_until(b'{"index":%d,"id":%d,"embedding":' % (number, number))
        raw.end()
        raw.read_until(b"0\r\n\r\n")


def test_a_caller_who_leaves_stops_the_work(start: StartApi) -> None:
    embedder = ColourEmbedder(max_batch=4)
    api = start(embedder=embedder)
    embedder.open.clear()
    with Raw(api, path=STREAM) as raw:
        raw.send(body(*({"image": text_of(picture((number, 1, 2)))} for number in range(200))))
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
    assert len(embedder.batches) <= 3  # the batch at work, and perhaps the one behind it


def test_a_caller_who_takes_no_results_is_not_read_from(start: StartApi) -> None:
    api = start(upload_timeout_s=30)
    sent = 0
    line = b"{\n" * 10_000
    with Raw(api, path=STREAM) as raw:
        raw._socket.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while sent < 200_000_000:
                raw.send(line)
                sent += len(line)
    assert sent < 20_000_000  # buffers of sockets on both ways; without bounds all would be taken


def test_interactive_requests_are_answered_while_a_stream_runs(start: StartApi) -> None:
    api = start(embedder=ColourEmbedder(max_batch=4))
    stop = threading.Event()

    def lines() -> Iterator[bytes]:
        number = 0
        while not stop.is_set() and number < 100_000:
            yield body({"image": text_of(picture((number % 250, number // 250 % 250, 1)))})
            number += 1

    streaming = threading.Thread(target=lambda: sum(1 for _ in exchange(api.url, lines())))
    streaming.start()
    try:
        for number in range(20):
            answer = api.http.post("/embed", files=multipart([picture((number, 251, 3))]))
            assert answer.status_code == 200, answer.text
        assert streaming.is_alive()
    finally:
        stop.set()
        streaming.join()


@pytest.fixture
def service(bundle: Bundle, tmp_path: Path) -> Iterator[Service]:
    with running_service(bundle.path, tmp_path / "data") as running:
        yield running


def resident_mb(service: Service) -> float:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found.group(1)) / 1000


def exchange(url: str, lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Sends a body and reads its answer at the same time, as httpx over HTTP/1.1 doesn't."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=60)
    connection.putrequest("POST", STREAM)
    connection.putheader("Content-Type", LINES["Content-Type"])
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()

    def send_all() -> None:
        for piece in lines:
            connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        connection.send(b"0\r\n\r\n")

    sending = threading.Thread(target=send_all)
    sending.start()
    with contextlib.closing(connection), connection.getresponse() as answer:
        assert answer.status == 200
        for line in answer:
            yield json.loads(line)
        sending.join()


def stream_many(service: Service, count: int) -> list[float]:
    """Streams good and bad lines, checks each result, and samples the service's memory on the way."""
    images = [text_of(photo(seed)).encode() for seed in range(50)]
    memory_mb: list[float] = []

    def lines() -> Iterator[bytes]:
        for start in range(0, count, 500):
            yield b"".join(
                b'{"id":%d,"image":"%b"}\n' % (number, images[number % 50])
                if number % 10
                else b'{"id":%d}\n' % number
                for number in range(start, start + 500)
            )

    number = 0
    for result in exchange(service.url, lines()):
        assert (result["index"], result["id"]) == (number, number)
        assert ("error" in result) == (number % 10 == 0)
        number += 1
        if number % (count // 10) == 0:
            memory_mb.append(resident_mb(service))
    assert number == count
    return memory_mb


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_thousands_of_lines_take_no_more_memory_than_hundreds(service: Service) -> None:
    memory_mb = stream_many(service, 20_000)
    # 20,000 lines have 40 MB of text and answers of 20 MB: kept, either would be seen.
    assert memory_mb[-1] - memory_mb[1] < 15


@pytest.mark.load
@pytest.mark.timeout(3600)
def test_a_million_lines_take_no_more_memory_than_thousands(service: Service) -> None:
    memory_mb = stream_many(service, 1_000_000)
    assert memory_mb[-1] - memory_mb[1] < 15
