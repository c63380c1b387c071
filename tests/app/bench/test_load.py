"""The generator against servers whose every answer is known: one that does nothing, one that stops."""

import asyncio
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from app.bench.load import BROKEN, OK, TIMEOUT, UNREADABLE, Measured, Sample, closed_loop, open_loop
from app.bench.payloads import Payload
from app.bench.wire import Endpoint
from tests.app.running import ROOT

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
REQUEST = Payload((b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",), images=1)


@pytest.fixture(scope="module")
def null_service() -> Iterator[Endpoint]:
    with subprocess.Popen(
        [sys.executable, "-m", "app.bench.null_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield Endpoint("127.0.0.1", int(process.stdout.readline()))
        process.stdin.close()
        assert process.wait(10) == 0


@asynccontextmanager
async def answering(answers: Iterator[bytes | float | None]) -> AsyncIterator[Endpoint]:
    """A server that answers requests as told: bytes are sent, a number stops all of it, None closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            answer = next(answers)
            if answer is None:
                break
            if isinstance(answer, float):
                time.sleep(answer)  # all who are connected must wait
                answer = ANSWER
            writer.write(answer)
        writer.close()

    async def forgiving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(forgiving, "127.0.0.1", 0)
    yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    server.close()


def repeated(*answers: bytes | float | None) -> Iterator[bytes | float | None]:
    """The answers, and the last one for ever."""
    yield from answers
    while True:
        yield answers[-1]


def test_an_open_loop_sends_what_is_due_and_counts_what_is_answered(null_service: Endpoint) -> None:
    measured = asyncio.run(open_loop(null_service, [REQUEST], rate_per_s=200, duration_s=1.0, warm_up_s=0.5))
    assert len(measured.samples) == 200
    assert sorted(sample.due_s for sample in measured.samples) == pytest.approx(
        [number / 200 for number in range(200)]
    )
    assert measured.outcomes == {OK: 100}
    assert all(sample.due_s <= sample.sent_s <= sample.ended_s for sample in measured.samples)


def test_a_closed_loop_has_as_many_requests_under_way_as_clients(null_service: Endpoint) -> None:
    measured = asyncio.run(closed_loop(null_service, [REQUEST], clients=3, duration_s=0.5))
    begins_and_ends = sorted(
        [(sample.sent_s, 1) for sample in measured.samples]
        + [(sample.ended_s, -1) for sample in measured.samples]
    )
    under_way, most = 0, 0
    for _, change in begins_and_ends:
        under_way += change
        most = max(most, under_way)
    assert most == 3
    assert measured.requests_per_s == pytest.approx(len(measured.samples) / 0.5, rel=0.05)


def test_who_waits_behind_a_stop_is_counted_in_an_open_loop_and_left_out_by_a_closed_one() -> None:
    """Coordinated omission: a service that stops for 0.6 s of 1 s makes 60 of 100 users wait, not one."""

    async def both() -> tuple[Measured, Measured]:
        async with answering(repeated(ANSWER, 0.6, ANSWER)) as endpoint:
            opened = await _in_another_loop("open", endpoint)
        async with answering(repeated(ANSWER, 0.6, ANSWER)) as endpoint:
            closed = await _in_another_loop("closed", endpoint)
        return opened, closed

    async def _in_another_loop(kind: str, endpoint: Endpoint) -> Measured:
        def load() -> Measured:
            if kind == "open":
                return asyncio.run(open_loop(endpoint, [REQUEST], rate_per_s=100, duration_s=1.0))
            return asyncio.run(closed_loop(endpoint, [REQUEST], clients=1, duration_s=1.0))

        return await asyncio.get_running_loop().run_in_executor(None, load)

    opened, closed = asyncio.run(both())
    assert sum(opened.latencies_ms() > 100) >= 45
    assert sum(closed.latencies_ms() > 100) <= 5


def test_what_goes_wrong_is_counted_by_its_kind() -> None:
    answers = repeated(
        b"HTTP/1.1 429 Too Many\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Not now\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        None,
        b"220 mail.example.org ESMTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
        ANSWER[:-1],
    )

    async def load() -> Counter[str]:
        async with answering(answers) as endpoint:
            # One after the other, so that each meets its own answer; the last is never whole.
            measured = await open_loop(endpoint, [REQUEST], rate_per_s=10, duration_s=0.7, timeout_s=1.0)
        return measured.outcomes

    assert asyncio.run(load()) == {"429": 1, "503": 1, OK: 1, BROKEN: 1, UNREADABLE: 2, TIMEOUT: 1}


def test_an_address_without_a_service_is_one_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(closed_loop(Endpoint("127.0.0.1", port), [REQUEST], clients=1, duration_s=1.0))


def test_figures_are_of_the_window_only() -> None:
    def sample(due_s: float, ended_s: float, outcome: str = OK, label: str = "") -> Sample:
        return Sample(due_s, due_s + 0.001, ended_s, outcome, 2, label)

    measured = Measured(
        samples=[
            sample(0.5, 0.6),  # of the warm-up
            sample(0.9, 1.1),  # answered within the window, due before it
            sample(1.0, 1.1, label="bulk"),
            sample(2.0, 2.3),
            sample(2.5, 2.6, outcome="429"),
            sample(2.9, 3.4),  # due within, answered too late for the throughput
        ],
        warm_up_s=1.0,
        duration_s=3.0,
    )
    assert measured.requests_per_s == 3 / 2
    assert measured.images_per_s == 2 * 3 / 2
    assert measured.outcomes == {OK: 3, "429": 1}
    assert measured.error_share == 0.25
    assert measured.latency_ms(50) == pytest.approx(300)
    assert measured.latency_ms(50, label="bulk") == pytest.approx(100)
    assert measured.lateness_ms(99) == pytest.approx(1)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://127.0.0.1:8000", Endpoint("127.0.0.1", 8000)),
        ("http://[::1]:81/", Endpoint("::1", 81)),
        ("https://photos.example.org", Endpoint("photos.example.org", 443, tls=True)),
    ],
)
def test_an_address_is_read(url: str, endpoint: Endpoint) -> None:
    assert Endpoint.of(url) == endpoint


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://x/api", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is no address of a service"):
        Endpoint.of(url)
