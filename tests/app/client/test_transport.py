"""When a client asks again: against servers that are busy, away, broken or something else. Nobody sleeps."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from app.client import (
    AsyncClient,
    Busy,
    Client,
    CollectionSummary,
    Conflict,
    Invalid,
    NoService,
    NotAllowed,
    NotFound,
    ServiceFailed,
    ServiceRefused,
    TimedOut,
    TooLarge,
)
from tests.app.running import ROOT

JITTER = 1.25  # a pause is never shorter than was asked for, and at most so much longer
NOBODY = "http://127.0.0.1:9"

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody sleeps here; the list says for how long somebody would have. Servers in other threads do."""
    pauses: list[float] = []
    here, sleep, sleep_of_asyncio = threading.get_ident(), time.sleep, asyncio.sleep

    def nap(seconds: float) -> None:
        if threading.get_ident() == here:
            pauses.append(seconds)
        else:
            sleep(seconds)

    async def pause(seconds: float) -> None:
        if threading.get_ident() == here:
            pauses.append(seconds)
        else:
            await sleep_of_asyncio(seconds)

    monkeypatch.setattr(time, "sleep", nap)
    monkeypatch.setattr(asyncio, "sleep", pause)
    return pauses


class Server:
    """Gives such answers, in turn, the last one for ever; an empty status breaks the connection."""

    def __init__(self, answers: list[Answer]) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.asked.append((self.command, self.path, dict(self.headers)))
                status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
                if not status:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET
            do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


Serving = Callable[..., Server]


@pytest.fixture
def serving() -> Iterator[Serving]:
    servers: list[Server] = []

    def start(*answers: Answer) -> Server:
        servers.append(Server(list(answers)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def collections(client_kind: str, url: str, **options: float) -> list[CollectionSummary]:
    """Asks once, with either client."""
    if client_kind == "blocking":
        with Client(url, **options) as client:  # type: ignore[arg-type]
            return client.collections()

    async def ask() -> list[CollectionSummary]:
        async with AsyncClient(url, **options) as client:  # type: ignore[arg-type]
            return await client.collections()

    return asyncio.run(ask())


def problem(code: str, **members: object) -> bytes:
    return json.dumps({"code": code, "detail": "no", "request_id": "r1", **members}).encode()


BREAKS: Answer = (0, {}, b"")
NO_COLLECTIONS: Answer = (200, {}, b'{"data": []}')
both = pytest.mark.parametrize("kind", ["blocking", "asynchronous"])


def assert_pauses(pauses: list[float], asked: list[float]) -> None:
    assert len(pauses) == len(asked), pauses
    assert all(low <= pause <= low * JITTER for pause, low in zip(pauses, asked, strict=True)), pauses


@both
def test_a_busy_service_is_asked_again_when_it_said_and_not_by_all_at_once(
    kind: str, serving: Serving, hurried: list[float]
) -> None:
    server = serving(
        (429, {"Retry-After": "3", "Retry-After-Ms": "2100"}, problem("overloaded")),
        (503, {"Retry-After": "2"}, b""),
        NO_COLLECTIONS,
    )
    assert collections(kind, server.url) == []
    assert_pauses(hurried, [2.1, 2.0])
    hurried.clear()
    for _ in range(5):
        collections(kind, serving((503, {"Retry-After": "1"}, b""), NO_COLLECTIONS).url)
    assert len(set(hurried)) == 5


@both
def test_patience_has_an_end(kind: str, serving: Serving, hurried: list[float]) -> None:
    server = serving((429, {"Retry-After": "7"}, problem("overloaded")))
    with pytest.raises(Busy, match="overloaded") as busy:
        collections(kind, server.url, patience_s=5.0)
    assert (busy.value.retry_after_s, busy.value.request_id) == (7, "r1")
    assert hurried == []


@both
def test_nobody_at_the_address_is_said_after_some_tries(kind: str, hurried: list[float]) -> None:
    with pytest.raises(NoService, match=r"no service answers at http://127.0.0.1:9"):
        collections(kind, NOBODY)
    assert_pauses(hurried, [0.25, 0.5, 1.0])


def test_who_does_not_want_to_wait_does_not(hurried: list[float]) -> None:
    with Client(NOBODY) as nobody, pytest.raises(NoService):
        nobody.info(retry=False)
    assert hurried == []


def test_a_service_that_is_away_is_waited_for_as_long_as_was_said(
    hurried: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: sum(hurried))
    with Client(NOBODY, absence_s=10.0) as nobody, pytest.raises(NoService):
        nobody.info()
    assert_pauses(hurried[:5], [0.25, 0.5, 1.0, 2.0, 2.0])
    assert 10 <= sum(hurried) <= 10 + 2 * JITTER


def test_what_broke_is_sent_again_only_where_twice_is_as_good_as_once(
    serving: Serving, hurried: list[float]
) -> None:
    server = serving(BREAKS, NO_COLLECTIONS)
    with Client(server.url) as client:
        assert client.collections() == []
    server = serving(BREAKS, (201, {}, b"{}"))
    with Client(server.url) as client, pytest.raises(NoService):
        client.create_collection("photos")
    assert len(server.asked) == 1
    # A service that is busy says that it did nothing: then it is safe.
    made = b'{"name": "a", "fingerprint": "f", "dimensions": 2, "items": 0, "searchable": true}'
    server = serving((503, {"Retry-After": "0"}, b""), (201, {}, made))
    with Client(server.url) as client:
        assert client.create_collection("a").name == "a"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Invalid),
        (401, NotAllowed),
        (404, NotFound),
        (408, TimedOut),
        (409, Conflict),
        (413, TooLarge),
        (415, Invalid),
        (418, ServiceRefused),
        (429, Busy),
        (500, ServiceFailed),
        (504, TimedOut),
        (507, ServiceFailed),
    ],
)
def test_each_kind_of_refusal_is_an_error_of_its_own(
    status: int, kind: type[ServiceRefused], serving: Serving
) -> None:
    server = serving((status, {}, problem("a_code", limit=3, actual=4)))
    with Client(server.url) as client, pytest.raises(ServiceRefused) as refused:
        client.collections()
    assert type(refused.value) is kind
    assert (refused.value.status, refused.value.code, refused.value.detail) == (status, "a_code", "no")
    assert (refused.value.members["limit"], refused.value.members["actual"]) == (3, 4)


@pytest.mark.parametrize(
    "answer", [(200, {}, b"<html>"), (404, {}, b'{"error": 1}'), (200, {}, b'{"model": 3}'), (200, {}, b"[]")]
)
def test_something_else_at_the_address_is_said_to_be_something_else(answer: Answer, serving: Serving) -> None:
    with Client(serving(answer).url) as client, pytest.raises(NoService, match="not a dinoserve"):
        client.info()


def test_address_and_key_come_from_the_environment_unless_they_are_given(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving(NO_COLLECTIONS)
    monkeypatch.setenv("DINO_SERVE_URL", server.url + "/")
    monkeypatch.setenv("DINO_SERVE_API_KEY", "from-outside")
    with Client() as client:
        client.collections()
        assert client.base_url == server.url
    with Client(server.url, api_key="given") as client:
        client.collections()
    assert [headers["Authorization"] for _, _, headers in server.asked] == [
        "Bearer from-outside",
        "Bearer given",
    ]
    with Client(NOBODY) as client:
        assert client.base_url == NOBODY
    monkeypatch.delenv("DINO_SERVE_URL")
    assert Client().base_url == "http://127.0.0.1:8000"


def test_priority_and_model_go_with_what_embeds_and_with_nothing_else(serving: Serving) -> None:
    server = serving((200, {}, b'{"data": []}'))
    with Client(server.url, priority="bulk", model="other") as client:
        client.embed([])
        client.collections()
    with Client(server.url, timeout_s=7) as client:
        client.embed([])
    paths = [path for _, path, _ in server.asked]
    assert "priority=bulk" in paths[0]
    assert "model=other" in paths[0]
    assert "?" not in paths[1]
    assert "timeout=7" in paths[2]
    assert "priority" not in paths[2]


def test_the_client_needs_httpx_and_numpy_and_nothing_else() -> None:
    program = """
import sys
before = set(sys.modules)
import app.client
stdlib = sys.stdlib_module_names
found = {name.partition(".")[0] for name in set(sys.modules) - before} - set(stdlib)
allowed = {"app", "httpx", "httpcore", "h11", "anyio", "sniffio", "idna", "certifi", "numpy"}
allowed |= {"typing_extensions"}  # of anyio's
# What httpx's own command line would use, if it is there, is no need of ours.
optional = {"click", "rich", "pygments", "markdown_it", "mdurl", "h2", "brotli", "zstandard", "socksio"}
sys.exit(", ".join(sorted(name for name in found - allowed - optional if not name.startswith("_"))) or None)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
