"""Good, bad, cancelled and slow callers together, for as long as is told: nothing of the service may grow.

The normal suite has 20 seconds of it. This is the soak, and it says what it saw:

    DINO_SOAK_S=3600 python -m pytest -m load -o log_cli=true -o log_cli_level=info tests/app/test_soak.py
"""

import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from tests.app.api.serving import multipart, photo, zeros_png
from tests.app.running import Service, running_service, write_tiny_bundle

SOAK_S = float(os.environ.get("DINO_SOAK_S", "600"))
SHORT_S = 20.0
CLIENTS = 8
SAMPLES = 40  # of memory, over the time
WARM_UP_SHARE = 0.4  # of the time: caches, arenas and pools of threads fill
MOST_GROWTH_MB = 12.0

logger = logging.getLogger(__name__)
proc_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


class Clients:
    """Callers of every sort, until they are told to end.

    Attributes:
        outcomes: How often each sort of call ended how.
        faults: What must never be.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        sorts: list[Callable[[httpx.Client, random.Random], str]] = [
            *([self._good] * 6),
            self._bad,
            self._mixed,
            self._impatient,
            self._leaver,
            self._slow,
            self._adder,
        ]
        with httpx.Client(base_url=self._url, timeout=60) as http:
            while not self._ended.is_set():
                call = rng.choice(sorts)
                try:
                    outcome = f"{call.__name__[1:]} {call(http, rng)}"
                except Exception as error:
                    outcome = f"{call.__name__[1:]} {type(error).__name__}"
                    with self._lock:
                        self.faults.append(f"{call.__name__[1:]}: {error!r}")
                with self._lock:
                    self.outcomes[outcome] += 1

    def _embed(self, http: httpx.Client, images: list[bytes], query: str = "") -> httpx.Response:
        answer = http.post("/embed" + query, files=multipart(images))
        assert answer.status_code in {200, 413, 415, 422, 429, 504}, answer.text
        return answer

    def _good(self, http: httpx.Client, rng: random.Random) -> str:
        """One picture or some, of which many are known already."""
        images = [photo(rng.randrange(400)) for _ in range(rng.choice((1, 1, 1, 4, 16)))]
        answer = self._embed(http, images, f"?priority={rng.choice(('interactive', 'bulk'))}")
        if answer.status_code == 200:
            assert answer.json()["usage"] == {"images": len(images), "failed": 0}
        return str(answer.status_code)

    def _bad(self, http: httpx.Client, rng: random.Random) -> str:
        bad = [b"", b"no picture", photo(rng.randrange(400))[:300], zeros_png(30_000, 30_000)]
        return str(self._embed(http, [rng.choice(bad)], "?on_error=fail").status_code)

    def _mixed(self, http: httpx.Client, rng: random.Random) -> str:
        """A bad picture costs its neighbours nothing."""
        answer = self._embed(http, [photo(rng.randrange(400)), b"no picture", photo(rng.randrange(400))])
        if answer.status_code == 200:
            assert ["error" in item for item in answer.json()["data"]] == [False, True, False]
        return str(answer.status_code)

    def _impatient(self, http: httpx.Client, rng: random.Random) -> str:
        images = [photo(1_000 + rng.randrange(100_000)) for _ in range(32)]
        return str(self._embed(http, images, "?timeout=0.05").status_code)

    def _leaver(self, http: httpx.Client, rng: random.Random) -> str:
        images = [photo(1_000 + rng.randrange(100_000)) for _ in range(16)]
        try:
            http.post("/embed", files=multipart(images), timeout=httpx.Timeout(20, read=rng.random() / 20))
        except httpx.TimeoutException:
            return "left"
        return "answered"

    def _slow(self, http: httpx.Client, rng: random.Random) -> str:
        """Begins a body, sends a piece now and then, and leaves or ends."""
        address = urlsplit(self._url)
        body = photo(rng.randrange(400))
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=30) as caller:
            head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            caller.sendall(f"{head}Content-Type: image/jpeg\r\n\r\n".encode())
            for start in range(0, len(body), 700):
                if rng.random() < 0.05:
                    return "left"
                caller.sendall(body[start : start + 700])
                time.sleep(0.01)
            return caller.recv(65536).split(b" ")[1].decode()

    def _adder(self, http: httpx.Client, rng: random.Random) -> str:
        """The same few items again and again, so that the collection itself doesn't grow."""
        seed = rng.randrange(50)
        answer = http.post(
            "/collections/default/items", files=multipart([photo(seed)]), data={"ids": [str(seed)]}
        )
        assert answer.status_code in {200, 429}, answer.text
        return str(answer.status_code)


def state_of(pid: int) -> tuple[float, int, int]:
    """Resident megabytes, threads and open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = dict(line.split(":", 1) for line in status.splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(numbers["VmRSS"].split()[0]) / 1024, int(numbers["Threads"]), files


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    bundle = write_tiny_bundle(tmp_path / "tiny")
    # Small budgets, so that refusals are among what happens; a small cache, so that it is full soon.
    flags = ("--max-concurrent-images", "64", "--max-client-batch-size", "32", "--cache-size", "200")
    with running_service(bundle, tmp_path / "data", *flags) as one:
        yield one


@proc_only
@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(SHORT_S, id="short"),
        pytest.param(SOAK_S, id="soak", marks=[pytest.mark.load, pytest.mark.timeout(SOAK_S + 300)]),
    ],
)
def test_nothing_grows_under_callers_of_every_sort(service: Service, duration_s: float) -> None:
    samples: list[tuple[float, float, int, int]] = []
    began_s = time.monotonic()
    with Clients(service.url) as clients:
        while (passed_s := time.monotonic() - began_s) < duration_s:
            samples.append((passed_s, *state_of(service.process.pid)))
            time.sleep(duration_s / SAMPLES)
    assert not clients.faults, clients.faults[:5]
    assert {"good 200", "bad 415", "leaver left"} <= set(clients.outcomes), clients.outcomes

    with httpx.Client(base_url=service.url, timeout=20) as http:
        end_s = time.monotonic() + 20
        while 'dino_serve_inflight_images{model="tiny"} 0.0' not in http.get("/metrics").text:
            assert time.monotonic() < end_s, "something is never given back"
            time.sleep(0.05)
        assert http.get("/health/live").status_code == http.get("/health/ready").status_code == 200
        assert http.post("/embed", files=multipart([photo(1)])).status_code == 200

    late = np.array([sample for sample in samples if sample[0] >= WARM_UP_SHARE * duration_s])
    passed_s, resident_mb, threads, files = late.T
    mb_per_s, _ = np.polyfit(passed_s, resident_mb, 1)
    grown_mb = mb_per_s * (passed_s[-1] - passed_s[0])
    logger.info("%s", dict(clients.outcomes))
    logger.info("resident %.0f to %.0f MB, slope %.1f MB/h", resident_mb[0], resident_mb[-1], 3600 * mb_per_s)
    logger.info("threads %d to %d, files %d to %d", threads.min(), threads.max(), files.min(), files.max())
    assert grown_mb < MOST_GROWTH_MB, f"memory grows by {mb_per_s * 3600:.0f} MB an hour"
    assert threads[-5:].max() <= threads[:5].max() + 1
    assert files[-5:].max() <= files.min() + 3 * CLIENTS
