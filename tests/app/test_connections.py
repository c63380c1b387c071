"""Heads of requests that never end, against a real uvicorn."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.cli import server_config
from app.connections import BoundedHeads
from app.settings import Settings, load

HEAD = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Hasty(BoundedHeads):
    head_timeout_s = 0.5
    head_max_bytes = 4096


class Patient(BoundedHeads):
    head_timeout_s = 3600.0  # so that only the size ends a head
    head_max_bytes = 4096


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    while message.get("more_body"):
        message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.fixture
def port() -> Iterator[int]:
    with serving(Hasty) as port:
        yield port


@contextlib.contextmanager
def serving(connections: type[BoundedHeads]) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(hello, http=connections, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        yield connection


def until_closed(connection: socket.socket) -> bytes:
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_who_says_nothing_is_not_waited_for(port: int) -> None:
    with connected(port) as connection:
        assert until_closed(connection) == b""


def test_a_head_that_trickles_is_cut_off(port: int) -> None:
    with connected(port) as connection, contextlib.suppress(ConnectionError):
        for byte in HEAD[:-1] * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)  # each byte comes soon, the head doesn't
    with connected(port) as connection:
        connection.sendall(HEAD)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")  # others never noticed


def test_a_second_head_that_trickles_is_cut_off_too(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(HEAD)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(HEAD[:20])
        assert until_closed(connection) in {b"", b"hi"}


def test_headers_without_end_are_refused() -> None:
    with serving(Patient) as port, connected(port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(HEAD[:-2])
            for _ in range(1000):
                connection.sendall(b"X-More: and more\r\n" * 100)
        assert until_closed(connection)[:13] in {b"HTTP/1.1 431 ", b""}  # a reset may outrun the answer


def test_a_slow_body_is_not_a_slow_head(port: int) -> None:
    body = b"x" * 20_000  # also larger than any head
    with connected(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20000\r\n\r\n")
        connection.sendall(body[:10_000])
        time.sleep(1.0)
        connection.sendall(body[10_000:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def test_the_service_has_such_connections() -> None:
    settings = load(Settings, [], prog="dino-serve run")
    assert server_config(FastAPI(), settings).http is BoundedHeads
