"""Two ways to load a service, and what was measured: in a closed loop, and at a constant rate of arrival.

    closed loop   N clients, each of which sends its next request when its last was answered. Shows the most
                  that a service can do; its latencies say little, as a slow service is asked less.
    open loop     a request every 1/R seconds, whatever became of those before. Latency counts from the
                  moment at which the request should have left, also where the generator or the service
                  kept it: nothing that users would wait for is left out ("coordinated omission").

As a library:

    endpoint = Endpoint.of("http://127.0.0.1:8000")
    payloads = embed_payloads(endpoint, generated_pictures(64))
    measured = await open_loop(endpoint, payloads, rate_per_s=200, duration_s=20)
    print(measured.images_per_s, measured.latency_ms(99), measured.outcomes)
"""

import asyncio
import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from app.bench.payloads import Payload
from app.bench.wire import Connection, Endpoint, NotHttp, connect

OK: Final = "200"
TIMEOUT: Final = "timeout"
BROKEN: Final = "connection broke"
REFUSED: Final = "no connection"
UNREADABLE: Final = "unreadable answer"
_MOST_CONNECTIONS: Final = 2_000
_PAUSE_AFTER_ERROR_S: Final = 0.01  # a client that is refused at once must not spin
# Numbers of pictures must not repeat between two runs against the same service, whose cache may remember.
_numbers: Iterator[int] = itertools.count(time.time_ns() // 1_000)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, in seconds from the beginning of the load.

    Attributes:
        due_s: When it should have left; in a closed loop, when it left.
        sent_s: When it left.
        ended_s: When its answer was whole, or it was given up.
        outcome: The status, or why there is none: "timeout", "connection broke", "no connection",
            "unreadable answer".
        images: Pictures in it.
        label: Of its payload.
    """

    due_s: float
    sent_s: float
    ended_s: float
    outcome: str
    images: int
    label: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a load showed.

    Attributes:
        samples: Of all requests, those of the warm-up too.
        warm_up_s: What began or ended before is not counted.
        duration_s: When the load stopped; answers that came later don't count as throughput.
    """

    samples: Sequence[Sample]
    warm_up_s: float
    duration_s: float

    @property
    def window_s(self) -> float:
        """How long it was measured."""
        return self.duration_s - self.warm_up_s

    @property
    def counted(self) -> list[Sample]:
        """Requests that were due in the window."""
        return [sample for sample in self.samples if self.warm_up_s <= sample.due_s < self.duration_s]

    @property
    def outcomes(self) -> Counter[str]:
        """How the window's requests ended."""
        return Counter(sample.outcome for sample in self.counted)

    @property
    def error_share(self) -> float:
        """Of the window's requests, those without a 200."""
        outcomes = self.outcomes
        return 1 - outcomes[OK] / outcomes.total() if outcomes else 0.0

    @property
    def requests_per_s(self) -> float:
        """Answered well within the window."""
        return len(self._answered()) / self.window_s

    @property
    def images_per_s(self) -> float:
        """Answered well within the window."""
        return sum(sample.images for sample in self._answered()) / self.window_s

    def latency_ms(self, percentile: float, *, label: str | None = None) -> float:
        """Of the window's requests that were answered well; NaN where there is none.

        Args:
            percentile: 0 to 100.
            label: Only of requests with it.
        """
        latencies_ms = self.latencies_ms(label=label)
        return float(np.percentile(latencies_ms, percentile)) if len(latencies_ms) else float("nan")

    def latencies_ms(self, *, label: str | None = None) -> npt.NDArray[np.float64]:
        """From due to answered, of the window's requests that were answered well."""
        return np.array(
            [
                (sample.ended_s - sample.due_s) * 1_000
                for sample in self.counted
                if sample.outcome == OK and label in {None, sample.label}
            ]
        )

    def lateness_ms(self, percentile: float) -> float:
        """How late the generator itself was: from due to sent. It is part of the latencies."""
        late_ms = [(sample.sent_s - sample.due_s) * 1_000 for sample in self.counted]
        return float(np.percentile(late_ms, percentile)) if late_ms else float("nan")

    def _answered(self) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if sample.outcome == OK and self.warm_up_s <= sample.ended_s < self.duration_s
        ]


async def closed_loop(
    endpoint: Endpoint,
    payloads: Sequence[Payload],
    *,
    clients: int,
    duration_s: float,
    warm_up_s: float = 0.0,
    timeout_s: float = 30.0,
) -> Measured:
    """Loads a service with clients that wait for their answers.

    Args:
        endpoint: Of the service.
        payloads: Sent in turns.
        clients: Requests that are under way at each moment.
        duration_s: Of the load, warm-up included.
        warm_up_s: Not counted.
        timeout_s: After it a request is given up.

    Raises:
        OSError: Nobody listens there.
    """
    turns = itertools.cycle(payloads)
    async with _sender(endpoint, timeout_s) as sender:

        async def client() -> None:
            while (now_s := sender.now_s()) < duration_s:
                if await sender.send(next(turns), due_s=now_s) != OK:
                    await asyncio.sleep(_PAUSE_AFTER_ERROR_S)

        await asyncio.gather(*(client() for _ in range(clients)))
    return Measured(samples=sender.samples, warm_up_s=warm_up_s, duration_s=duration_s)


async def open_loop(
    endpoint: Endpoint,
    payloads: Sequence[Payload],
    *,
    rate_per_s: float,
    duration_s: float,
    warm_up_s: float = 0.0,
    timeout_s: float = 30.0,
) -> Measured:
    """Loads a service with requests that come when they come.

    Args:
        endpoint: Of the service.
        payloads: Sent in turns.
        rate_per_s: Requests a second, evenly spaced.
        duration_s: Of the load, warm-up included. The answers of what was sent are waited for beyond it.
        warm_up_s: Not counted.
        timeout_s: After it, counted from when it was due, a request is given up.

    Raises:
        OSError: Nobody listens there.
    """
    turns = itertools.cycle(payloads)
    loop = asyncio.get_running_loop()
    stopped = threading.Event()
    async with _sender(endpoint, timeout_s) as sender, asyncio.TaskGroup() as under_way:

        def arrive(due_s: float) -> None:
            under_way.create_task(sender.send(next(turns), due_s=due_s))

        def keep_time() -> None:
            for number in range(round(rate_per_s * duration_s)):
                due_s = number / rate_per_s
                if (early_s := due_s - sender.now_s()) > 0:
                    time.sleep(early_s)
                if stopped.is_set():
                    return
                loop.call_soon_threadsafe(arrive, due_s)

        try:
            # On a thread: a loop's own timers are exact to a millisecond, which would be in each latency.
            await loop.run_in_executor(None, keep_time)
        finally:
            stopped.set()
    return Measured(samples=sender.samples, warm_up_s=warm_up_s, duration_s=duration_s)


class _Sender:
    """Connections that are opened when none is free, and what came back over them."""

    def __init__(self, endpoint: Endpoint, *, timeout_s: float) -> None:
        self.samples: list[Sample] = []
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        self._idle: list[Connection] = []
        self._room = asyncio.Semaphore(_MOST_CONNECTIONS)
        self._began_s = time.perf_counter()

    def now_s(self) -> float:
        """From the beginning."""
        return time.perf_counter() - self._began_s

    async def open(self) -> None:
        """Opens a first connection, so that an address without a service is one error and not a thousand."""
        self._idle.append(await connect(self._endpoint))
        self._began_s = time.perf_counter()

    async def send(self, payload: Payload, *, due_s: float) -> str:
        """Sends one request, and notes and returns what became of it."""
        sent_s = due_s
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s - (self.now_s() - due_s)), self._room:
                connection = await self._connection()
                sent_s = self.now_s()
                outcome = str(await connection.ask(payload.numbered(_numbers)))
        except TimeoutError:
            outcome = TIMEOUT
        except NotHttp:
            outcome = UNREADABLE
        except OSError:
            outcome = REFUSED if connection is None else BROKEN
        self.samples.append(Sample(due_s, sent_s, self.now_s(), outcome, payload.images, payload.label))
        if connection is not None:
            self._give_back(connection, outcome)
        return outcome

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> Connection:
        # The one that was used last: fewer connections, as a real pool would have.
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return await connect(self._endpoint)

    def _give_back(self, connection: Connection, outcome: str) -> None:
        if outcome != TIMEOUT and connection.usable:
            self._idle.append(connection)
        else:
            connection.close()


@contextlib.asynccontextmanager
async def _sender(endpoint: Endpoint, timeout_s: float) -> AsyncIterator[_Sender]:
    sender = _Sender(endpoint, timeout_s=timeout_s)
    await sender.open()
    try:
        yield sender
    finally:
        sender.close()
