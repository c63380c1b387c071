"""How the service ends: real processes, real signals, real callers."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.app.api.serving import multipart, photo
from tests.app.inference.colours import picture
from tests.app.misbehaving_child import HANG, KILL_THREAD, LOSE_DEVICE
from tests.app.running import Service, running_service, write_tiny_bundle

MISBEHAVING = "tests.app.misbehaving_child"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def until(condition: Callable[[], bool], *, timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.01)


def status(service: Service, path: str) -> int:
    return httpx.get(service.url + path, timeout=20).status_code


def embed(service: Service, image: bytes, *, timeout_s: float = 60) -> httpx.Response:
    return httpx.post(service.url + "/embed", files=multipart([image]), timeout=timeout_s)


def in_flight(service: Service, images: int) -> bool:
    line = f'dino_serve_inflight_images{{model="tiny"}} {images}.0'
    return line in httpx.get(service.url + "/metrics", timeout=20).text


def test_a_lame_duck_is_not_ready_and_answers_and_what_it_acknowledged_is_there(
    bundle: Path, tmp_path: Path
) -> None:
    acknowledged: list[str] = []
    cut: list[Exception] = []
    stopping = threading.Event()

    def client(service: Service, number: int) -> None:
        """Adds pictures over new connections until none is taken any more."""
        for seed in range(10_000):
            name = f"{number}-{seed}"
            try:
                answer = httpx.post(
                    f"{service.url}/collections/default/items",
                    files=multipart([photo(seed)]),
                    data={"ids": [name]},
                    timeout=60,
                )
            except httpx.ConnectError:
                return  # what is refused at the door is not lost: its caller goes elsewhere
            except httpx.HTTPError as error:
                cut.append(error)
                return
            assert answer.status_code == 200, answer.text
            acknowledged.append(name)
            if stopping.is_set():
                time.sleep(0.01)

    flags = ("--lame-duck-seconds", "1.5")
    with running_service(bundle, tmp_path / "data", *flags) as service, ThreadPoolExecutor(4) as clients:
        asked = [clients.submit(client, service, number) for number in range(4)]
        until(lambda: len(acknowledged) > 10)
        service.process.send_signal(signal.SIGTERM)
        stopping.set()
        until(lambda: status(service, "/health/ready") == 503)
        before = len(acknowledged)
        assert status(service, "/health/live") == 200
        assert embed(service, photo(1)).status_code == 200
        until(lambda: len(acknowledged) > before + 4)  # new connections, too
        assert service.process.wait(60) == 0
        for one in asked:
            one.result()
    # As the door closes, a connection in it may be reset: its caller was told nothing.
    assert len(cut) <= len(asked)
    with running_service(bundle, tmp_path / "data") as service:
        answer = httpx.post(f"{service.url}/collections/default/items/get", json={"ids": acknowledged})
        assert None not in answer.json()["data"]


def test_ctrl_c_does_without_the_lame_duck_and_a_long_request_is_finished(
    bundle: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with running_service(bundle, tmp_path / "data", "--lame-duck-seconds", "600") as service:
        files = [multipart([photo(1000 * client + seed) for seed in range(100)]) for client in range(4)]
        asked = [pool.submit(httpx.post, service.url + "/embed", files=one, timeout=60) for one in files]
        until(lambda: 'route="/embed"' in httpx.get(service.url + "/metrics").text)
        service.process.send_signal(signal.SIGINT)
        assert [one.result().status_code for one in asked] == [200] * 4
        assert service.process.wait(30) == 0


def test_a_second_signal_ends_at_once(bundle: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    flags = ("--drain-seconds", "600", "--lame-duck-seconds", "0")
    with running_service(bundle, tmp_path / "data", *flags, module=MISBEHAVING) as service:
        hanging = pool.submit(embed, service, picture(HANG))
        until(lambda: in_flight(service, 1))
        service.process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match="timed out"):
            service.process.wait(1)  # it waits for the answer, which never comes
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(10) == -signal.SIGTERM
        assert isinstance(hanging.exception(), httpx.HTTPError)


def test_what_is_not_answered_in_the_drain_time_is_refused_and_the_process_ends_well(
    bundle: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    flags = ("--drain-seconds", "1", "--lame-duck-seconds", "0")
    with running_service(bundle, tmp_path / "data", *flags, module=MISBEHAVING) as service:
        hanging = pool.submit(embed, service, picture(HANG))
        until(lambda: in_flight(service, 1))
        behind = pool.submit(embed, service, photo(1))
        until(lambda: in_flight(service, 2))
        service.process.send_signal(signal.SIGTERM)
        for one in (hanging, behind):
            answer = one.result()
            assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert service.process.wait(30) == 0


@pytest.mark.parametrize(
    ("order", "says"), [(LOSE_DEVICE, "illegal memory access"), (KILL_THREAD, "the end of a thread")]
)
def test_a_lost_engine_refuses_who_waits_and_ends_the_process_for_its_supervisor(
    bundle: Path, tmp_path: Path, order: tuple[int, int, int], says: str
) -> None:
    with running_service(bundle, tmp_path / "data", module=MISBEHAVING) as service:
        assert embed(service, photo(1)).status_code == 200
        answer = embed(service, picture(order))
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert service.process.wait(30) == 1
    log = "".join(service.log)
    assert says in log
    assert "this process ends, to be started again" in log
