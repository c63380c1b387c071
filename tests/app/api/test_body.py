"""What a body may be, and the error of each that it may not be."""

import http.client
import io
import socket
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]
BOUNDARY = "boundary"
# One byte of the 100 that its head promises.
BEGUN = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: 100\r\n\r\nx"


def form(*parts: str, end: bool = True) -> bytes:
    text = "".join(f"--{BOUNDARY}\r\n{part}\r\n" for part in parts) + (f"--{BOUNDARY}--\r\n" if end else "")
    return text.encode()


def part(name: str, value: str, *, filename: str | None = None) -> str:
    attributes = f'; filename="{filename}"' if filename else ""
    return f'Content-Disposition: form-data; name="{name}"{attributes}\r\n\r\n{value}'


def post(api: Api, body: bytes, content_type: str) -> tuple[int, dict[str, object]]:
    answer = api.http.post("/embed", content=body, headers={"Content-Type": content_type})
    return answer.status_code, answer.json()


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}]), allow_pickle=True)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros(3))
    return file.getvalue()


def npy_header(text: str) -> bytes:
    """A .npy of no more than its head."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def plain(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        pytest.param(b"x", "text/plain", 415, "unsupported_media_type", id="text"),
        pytest.param(b"x", "", 415, "unsupported_media_type", id="no type"),
        pytest.param(b"{", "application/json", 400, "invalid_json", id="broken JSON"),
        pytest.param(b"[]", "application/json", 400, "invalid_json", id="a JSON array"),
        pytest.param(b'{"images": "x"}', "application/json", 400, "invalid_json", id="images no array"),
        pytest.param(b'{"images": [3]}', "application/json", 400, "invalid_json", id="an image no text"),
        pytest.param(
            b'{"images": [{"url": "http://x"}]}', "application/json", 400, "invalid_json", id="by URL"
        ),
        pytest.param(b'{"images": []}', "application/json", 400, "no_images", id="no image"),
        pytest.param(
            b'{"images": [], "colour": 1}', "application/json", 400, "unknown_parameter", id="misspelled"
        ),
        pytest.param(
            b'{"images": [], "dtype": "int8"}', "application/json", 400, "invalid_parameter", id="bad value"
        ),
        pytest.param(b"x", "multipart/form-data", 400, "invalid_multipart", id="no boundary"),
        pytest.param(
            b"x", f"multipart/form-data; boundary={'b' * 300}", 400, "invalid_multipart", id="long boundary"
        ),
        pytest.param(
            b"x", f"multipart/form-data; boundary={BOUNDARY}", 400, "invalid_multipart", id="no parts"
        ),
        pytest.param(
            form(part("images", "x", filename="a"), end=False),
            f"multipart/form-data; boundary={BOUNDARY}",
            400,
            "invalid_multipart",
            id="cut short",
        ),
        pytest.param(
            form("Content-Disposition: form-data\r\n\r\nx"),
            f"multipart/form-data; boundary={BOUNDARY}",
            400,
            "invalid_multipart",
            id="a part without a name",
        ),
        pytest.param(
            form(part("picture", "x", filename="a")),
            f"multipart/form-data; boundary={BOUNDARY}",
            400,
            "unknown_parameter",
            id="a file elsewhere",
        ),
        pytest.param(
            form(part("dtype", "x" * 70_000)),
            f"multipart/form-data; boundary={BOUNDARY}",
            400,
            "invalid_parameter",
            id="a long text",
        ),
        pytest.param(
            form(part("dtype", "float16"), part("dtype", "float32")),
            f"multipart/form-data; boundary={BOUNDARY}",
            400,
            "invalid_parameter",
            id="given twice",
        ),
        pytest.param(
            form(*[part("dtype", "float16")] * 1200),
            f"multipart/form-data; boundary={BOUNDARY}",
            413,
            "too_many_parts",
            id="1,200 parts",
        ),
        pytest.param(
            form(part("dtype", "x")).replace(b"\r\nx\r\n", b"\r\n\xff\r\n"),
            f"multipart/form-data; boundary={BOUNDARY}",
            400,
            "invalid_parameter",
            id="no UTF-8",
        ),
        pytest.param(b"x", "application/x-npy", 400, "invalid_array", id="no array"),
        pytest.param(plain(np.array(3, np.uint8)), "application/x-npy", 422, "invalid_pixels", id="0-d"),
        *(
            pytest.param(
                npy_header(text), "application/x-npy", 400, "invalid_array", id=f"header {text[:10]}"
            )
            for text in (
                "{'a': '''",
                "{'a': (",
                "(" * 9_000,
                "{[]: 1}",
                "{'descr': (), 'fortran_order': False, 'shape': (1,)}",
            )
        ),
        pytest.param(pickled(), "application/x-npy", 400, "invalid_array", id="a pickle"),
        pytest.param(zipped(), "application/x-npy", 400, "invalid_array", id="a zip archive"),
        pytest.param(
            plain(np.zeros((1, 32, 32, 3)))[:-5], "application/x-npy", 400, "invalid_array", id="cut array"
        ),
        pytest.param(
            plain(np.zeros((1, 32, 32, 3))), "application/x-npy", 422, "invalid_pixels", id="no bytes"
        ),
        pytest.param(
            plain(np.zeros((1, 8, 8, 3), np.uint8)), "application/x-npy", 422, "invalid_pixels", id="small"
        ),
        pytest.param(
            plain(np.zeros((0, 32, 32, 3), np.uint8)), "application/x-npy", 400, "no_images", id="none"
        ),
    ],
)
def test_a_body_that_is_not_what_it_says_is_refused(
    api: Api, body: bytes, content_type: str, status: int, code: str
) -> None:
    found_status, problem = post(api, body, content_type)
    assert (found_status, problem["code"]) == (status, code)
    assert problem["status"] == status
    assert problem["detail"]


def test_parameters_may_stand_in_the_query_or_in_the_form(api: Api) -> None:
    in_form = api.http.post("/embed", files=multipart([photo(1)]), data={"encoding": "base64"}).json()
    in_query = api.http.post("/embed?encoding=base64", files=multipart([photo(1)])).json()
    assert in_form["data"] == in_query["data"]
    assert isinstance(in_form["data"][0]["embedding"], str)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"form": 5}),
        ("/embed", {"form": [["dtype", "float16"]]}),
        ("/collections/default/items?ids=a", {"items": [], "ids": "x"}),
        ("/collections/default/items?ids=a", {"items": []}),
    ],
)
def test_a_json_body_has_no_members_but_its_own(api: Api, path: str, body: dict[str, object]) -> None:
    answer = api.http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["parameter"] in {"form", "ids"}


def test_an_unknown_parameter_of_a_query_is_refused_by_name(api: Api) -> None:
    answer = api.http.post("/embed?normalise=true", files=multipart([photo(1)]))
    assert (answer.status_code, answer.json()["code"]) == (400, "unknown_parameter")
    assert answer.json()["parameter"] == "normalise"


def test_a_request_with_too_many_images_is_refused_whole(start: StartApi) -> None:
    api = start(max_client_batch_size=3)
    answer = api.http.post("/embed", files=multipart([photo(1)] * 4))
    assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")
    assert (answer.json()["limit"], answer.json()["actual"]) == (3, 4)


def test_a_body_above_the_limit_is_refused_by_its_length_before_it_is_read(start: StartApi) -> None:
    api = start(max_request_bytes=2000)
    host, port = api.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.putrequest("POST", "/embed")
    connection.putheader("Content-Type", "image/jpeg")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders()  # and not one byte of the body
    answer = connection.getresponse()
    assert answer.status == 413
    assert b'"limit":2000,"actual":1000000' in answer.read()
    connection.close()


def test_a_chunked_body_above_the_limit_is_refused_by_counting(start: StartApi) -> None:
    api = start(max_request_bytes=2000)

    def chunks() -> Iterator[bytes]:
        for _ in range(5):
            yield bytes(1000)

    answer = api.http.post("/embed", content=chunks(), headers={"Content-Type": "image/jpeg"})
    assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")


def test_a_body_that_trickles_is_refused_in_time(start: StartApi) -> None:
    api = start(upload_timeout_s=0.3)
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(BEGUN)
        started_s = time.monotonic()
        answer = connection.recv(10_000)
        assert b" 408 " in answer.partition(b"\r\n")[0]
        assert b'"upload_timeout"' in answer
        assert time.monotonic() - started_s < 10


def test_a_caller_who_leaves_in_the_middle_of_a_body_harms_nobody(api: Api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(BEGUN)
    assert api.http.post("/embed", files=multipart([photo(1)])).status_code == 200


@pytest.mark.parametrize(
    ("accept", "found"),
    [
        ("*/*", "application/json"),
        ("application/*", "application/json"),
        ("application/x-msgpack", "application/msgpack"),
        ("application/x-npy;q=0.5, application/msgpack", "application/msgpack"),
        ("text/html, application/x-npy;q=0.9, */*;q=0.1", "application/x-npy"),
        ("application/json;q=0, application/x-npy", "application/x-npy"),
        ("text/html", None),
        ("application/json;q=nonsense", None),
    ],
)
def test_the_answer_is_what_the_caller_likes_best(api: Api, accept: str, found: str | None) -> None:
    answer = api.http.post("/embed", files=multipart([photo(1)]), headers={"Accept": accept})
    if found is None:
        assert (answer.status_code, answer.json()["code"]) == (406, "not_acceptable")
    else:
        assert answer.headers["Content-Type"] == found


def test_a_boundary_may_come_in_pieces(api: Api) -> None:
    file = photo(1)
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n'
    body = head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()

    def single_bytes() -> Iterator[bytes]:
        yield body[:120]
        yield body[120:-30]
        for byte in body[-30:]:
            yield bytes([byte])

    answer = api.http.post(
        "/embed",
        content=single_bytes(),
        headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
    )
    whole = api.http.post("/embed", files=multipart([file]))
    assert answer.json()["data"][0]["sha256"] == whole.json()["data"][0]["sha256"]
