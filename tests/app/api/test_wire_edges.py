"""What HTTP itself allows and forbids, over raw sockets to a service in a process of its own."""

import contextlib
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from dino_core.bundle import Bundle
from tests.app.api.serving import photo
from tests.app.running import Service, running_service

FILE = photo(1)
BOUNDARY = "edge"


@pytest.fixture(scope="module")
def service(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(bundle.path, tmp_path_factory.mktemp("edges") / "data") as running:
        yield running


@contextlib.contextmanager
def connected(service: Service) -> Iterator[socket.socket]:
    address = urlsplit(service.url)
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=20) as connection:
        yield connection


def head(*lines: str, path: str = "/embed") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode()


def answer_of(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer that is not an interim one."""
    reader = connection.makefile("rb")
    while True:
        status = int(reader.readline().split()[1])
        headers = {}
        while line := reader.readline().strip():
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if status >= 200:
            return status, reader.read(int(headers[b"content-length"]))


def still_serves(service: Service) -> bool:
    answer = httpx.post(f"{service.url}/embed", content=FILE, headers={"Content-Type": "image/jpeg"})
    return answer.status_code == 200


def test_who_expects_100_continue_is_told_to_go_on(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(
            head("Content-Type: image/jpeg", f"Content-Length: {len(FILE)}", "Expect: 100-continue")
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(FILE)
        status, body = answer_of(connection)
    assert (status, json.loads(body)["usage"]) == (200, {"images": 1, "failed": 0})


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        pytest.param(
            ["Content-Type: image/jpeg", f"Content-Length: {10**12}"], "/embed", 413, id="too large"
        ),
        pytest.param(["Content-Type: image/jpeg", "Content-Length: 9"], "/nothing", 404, id="nothing there"),
        pytest.param(["Content-Type: text/html", "Content-Length: 9"], "/embed", 415, id="another kind"),
        pytest.param(["Accept: text/html", "Content-Length: 9"], "/embed", 406, id="another form"),
    ],
)
def test_what_is_refused_by_its_head_needs_no_body(
    service: Service, headers: list[str], path: str, status: int
) -> None:
    with connected(service) as connection:
        connection.sendall(head(*headers, "Expect: 100-continue", path=path))
        first = connection.recv(1000)
    assert first.startswith(f"HTTP/1.1 {status}".encode())  # and not 100


def test_a_chunked_body_is_a_body(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(head("Content-Type: image/jpeg", "Transfer-Encoding: chunked"))
        for start in range(0, len(FILE), 100):
            piece = FILE[start : start + 100]
            connection.sendall(b"%x;extension=1\r\n%b\r\n" % (len(piece), piece))
        connection.sendall(b"0\r\nTrailer: 1\r\n\r\n")
        status, _ = answer_of(connection)
    assert status == 200


def test_a_body_that_ends_before_its_length_is_nobodys_harm(service: Service) -> None:
    with connected(service) as connection:
        connection.sendall(head("Content-Type: image/jpeg", f"Content-Length: {len(FILE) + 1}") + FILE)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1000) == b""
    assert still_serves(service)
    assert not any("Traceback" in line for line in service.log)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(["Content-Length: many"], id="no number"),
        pytest.param(["Content-Length: -1"], id="negative"),
        pytest.param(["Content-Length: 1", "Content-Length: 2"], id="two lengths"),
        pytest.param(["Transfer-Encoding: chunked", "Content-Length: 3"], id="length and chunks"),
    ],
)
def test_a_length_that_can_be_read_in_two_ways_is_refused(service: Service, headers: list[str]) -> None:
    """Or a proxy before the service and the service itself could see two different requests."""
    with connected(service) as connection:
        connection.sendall(head("Content-Type: image/jpeg", *headers) + b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert still_serves(service)


def post(service: Service, body: bytes, content_type: str, query: str = "") -> tuple[int, str]:
    answer = httpx.post(f"{service.url}/embed{query}", content=body, headers={"Content-Type": content_type})
    return answer.status_code, answer.json().get("code", "")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(b"", 400, "invalid_multipart", id="nothing"),
        pytest.param(b"--edge--\r\n", 400, "no_images", id="no part"),
        pytest.param(
            b'--edge\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n\r\n--edge--\r\n',
            200,
            "",
            id="an empty file, which fails alone",
        ),
        pytest.param(
            b"--edge\r\n\r\nx\r\n--edge--\r\n", 400, "invalid_multipart", id="a part without a name"
        ),
        pytest.param(b"--edge\r\nContent-Disp", 400, "invalid_multipart", id="cut in a header"),
        pytest.param(b"--other--\r\n", 400, "invalid_multipart", id="another boundary"),
    ],
)
def test_multipart_bodies_that_are_empty_or_broken(
    service: Service, body: bytes, status: int, code: str
) -> None:
    assert post(service, body, f"multipart/form-data; boundary={BOUNDARY}") == (status, code)


@pytest.mark.parametrize(
    "query", ["?dtype=float16&dtype=float16", "?dtype=float16&dtype=float32", "?pool=cls&pool=mean"]
)
def test_a_parameter_that_is_given_twice_is_refused(service: Service, query: str) -> None:
    assert post(service, FILE, "image/jpeg", query) == (400, "invalid_parameter")


def test_a_parameter_in_query_and_form_is_given_twice_too(service: Service) -> None:
    answer = httpx.post(
        f"{service.url}/embed?dtype=float16", data={"dtype": "float16"}, files={"images": FILE}
    )
    assert (answer.status_code, answer.json()["parameter"]) == (400, "dtype")


def test_two_requests_on_one_connection_are_two(service: Service) -> None:
    one = head("Content-Type: image/jpeg", f"Content-Length: {len(FILE)}") + FILE
    with connected(service) as connection:
        connection.sendall(one + one)
        reader = connection.makefile("rb")
        for _ in range(2):
            assert reader.readline().startswith(b"HTTP/1.1 200")
            length = 0
            while line := reader.readline().strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            assert json.loads(reader.read(length))["usage"]["images"] == 1
