"""Indices of shards are kept in a folder of the test's own; a web server that knows ranges."""

import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))


class FileServer(ThreadingHTTPServer):
    """Serves a folder; fails as often as it is told to, with or without ranges."""

    daemon_threads = True
    root: Path
    failures_left = 0
    knows_ranges = True
    ranges_sent = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"
    allowed: ClassVar[re.Pattern[str]] = re.compile(r"bytes=(\d+)-(\d*)")

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        server, path = self.server, self.server.root / self.path.lstrip("/")
        content = path.read_bytes() if path.is_file() else b""
        status = 200 if path.is_file() else 404
        if server.failures_left > 0:
            server.failures_left -= 1
            status, content = 503, b""
        asked = self.allowed.fullmatch(self.headers.get("Range", ""))
        total = len(content)
        self.send_response(206 if asked and server.knows_ranges and status == 200 else status)
        if asked and server.knows_ranges and status == 200:
            server.ranges_sent += 1
            first, last = int(asked[1]), min(int(asked[2] or total - 1), total - 1)
            content = content[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("Content-Length", str(len(content)))
        if server.knows_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def serve() -> Iterator[Callable[[Path], FileServer]]:
    servers: list[FileServer] = []

    def start(root: Path) -> FileServer:
        server = FileServer(("127.0.0.1", 0), _Handler)
        server.root = root
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
