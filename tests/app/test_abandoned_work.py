"""Work that nobody waits for any more, in a real process: dropped before it costs anything, and counted."""

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.app.api.serving import multipart, photo
from tests.app.inference.colours import picture
from tests.app.misbehaving_child import GATE, WAIT
from tests.app.running import Service, running_service, write_tiny_bundle

PICTURES = 200


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While it is not there, the device is busy with the pictures that wait for it."""
    path = tmp_path / "gate"
    monkeypatch.setenv(GATE, str(path))
    return path


@pytest.fixture
def service(tmp_path: Path, gate: Path) -> Iterator[Service]:
    """A new one: it has measured nothing yet, and so refuses nobody for a deadline that can't be kept."""
    bundle = write_tiny_bundle(tmp_path / "tiny")
    with running_service(bundle, tmp_path / "data", module="tests.app.misbehaving_child") as one:
        yield one


class Figures:
    """What the service counted since this was made."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._before = self._read()

    def __getitem__(self, name: str) -> float:
        return self._read().get(name, 0.0) - self._before.get(name, 0.0)

    def _read(self) -> dict[str, float]:
        text = httpx.get(self._service.url + "/metrics", timeout=20).text
        return {
            sample.name
            + "".join(f"/{label}" for name, label in sample.labels.items() if name != "model"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def until(condition: Callable[[], bool], *, timeout_s: float = 30) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.02)


@contextlib.contextmanager
def busy(service: Service, gate: Path, *, size_px: tuple[int, int] = (30, 30)) -> Iterator[None]:
    """The device is busy with one picture until the gate is there, which it is at the end."""
    gate.unlink(missing_ok=True)
    launched = Figures(service)
    files = multipart([picture(WAIT, size_px=size_px)])
    waits = threading.Thread(
        target=httpx.post, args=(service.url + "/embed",), kwargs={"files": files, "timeout": 60}
    )
    waits.start()
    try:
        until(lambda: launched["dino_serve_batch_size_count"] == 1)
        yield
    finally:
        gate.touch()
        waits.join()


def pictures(first: int) -> list[tuple[str, tuple[str, bytes]]]:
    return multipart([photo(first + seed) for seed in range(PICTURES)])


def all_settled(figures: Figures) -> bool:
    return (
        figures["dino_serve_inflight_images"] == 0
        and figures["dino_serve_images_total/embedded"] + figures["dino_serve_images_total/dropped"]
        == PICTURES + 1
    )


def test_pictures_of_a_caller_who_has_left_are_neither_decoded_nor_launched(
    service: Service, gate: Path
) -> None:
    counted = Figures(service)
    with busy(service, gate):
        caller = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=60)
        request = httpx.Request("POST", service.url + "/embed", files=pictures(1_000))
        caller.request("POST", "/embed", request.read(), dict(request.headers))
        until(lambda: counted["dino_serve_inflight_images"] == PICTURES + 1)
        caller.close()
        until(lambda: counted["dino_serve_cancelled_total"] == 1)
    until(lambda: all_settled(counted))
    assert counted["dino_serve_images_total/dropped"] == PICTURES
    assert counted["dino_serve_batch_size_sum"] == 1, "none was launched, but the one before"
    assert counted["dino_serve_decode_seconds_count"] < PICTURES / 2, "most were not even decoded"


def test_pictures_whose_deadline_has_passed_are_neither_decoded_nor_launched(
    service: Service, gate: Path
) -> None:
    counted = Figures(service)
    with busy(service, gate):
        answer = httpx.post(
            service.url + "/embed",
            files=pictures(2_000),
            headers={"X-Request-Timeout-Ms": "300"},
            timeout=60,
        )
        assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
        assert counted["dino_serve_deadline_exceeded_total"] == 1
    until(lambda: all_settled(counted))
    assert counted["dino_serve_images_total/dropped"] == PICTURES
    assert counted["dino_serve_batch_size_sum"] == 1
    assert counted["dino_serve_decode_seconds_count"] < PICTURES / 2


def test_a_request_that_can_not_make_its_deadline_is_refused_at_once(service: Service, gate: Path) -> None:
    with busy(service, gate):
        time.sleep(1.0)  # the service will know: it does less than one picture a second
    counted = Figures(service)
    with busy(service, gate, size_px=(31, 30)):
        answer = httpx.post(
            service.url + "/embed",
            files=pictures(5_000),
            headers={"X-Request-Timeout-Ms": "900"},
            timeout=60,
        )
        assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
        assert "this request's deadline is 0.9 s" in answer.json()["detail"]
        assert answer.json()["retry_after"] > 0.5, "about as long as the picture before it takes"
        assert counted["dino_serve_rejected_total/wait"] == 1
    assert counted["dino_serve_images_total/dropped"] == 0


def test_an_interactive_picture_is_answered_before_bulk_that_came_first(service: Service, gate: Path) -> None:
    counted = Figures(service)
    ended: list[str] = []

    def ask(priority: str, files: list[tuple[str, tuple[str, bytes]]]) -> None:
        answer = httpx.post(service.url + "/embed", files=files, headers={"X-Priority": priority}, timeout=60)
        assert answer.status_code == 200
        ended.append(priority)

    with busy(service, gate):
        bulk = threading.Thread(target=ask, args=("bulk", pictures(3_000)))
        bulk.start()
        until(lambda: counted["dino_serve_inflight_bulk_images"] == PICTURES)
        interactive = threading.Thread(target=ask, args=("interactive", multipart([photo(4_000)])))
        interactive.start()
        until(lambda: counted["dino_serve_inflight_images"] == PICTURES + 2)
    interactive.join()
    bulk.join()
    assert ended == ["interactive", "bulk"]
