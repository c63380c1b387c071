"""The command: what ends at once in this process, what serves in one of its own."""

import logging
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.cli import main
from app.settings import Settings
from tests.app.api.serving import multipart, photo
from tests.app.running import running_service, write_tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@dataclass
class Said:
    """How a command ended, and what it said."""

    status: int
    out: str
    err: str


DinoServe = Callable[..., Said]


@pytest.fixture
def dino_serve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[DinoServe]:
    """Runs a command that ends, in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in Settings.model_fields:
        monkeypatch.delenv(f"DINO_SERVE_{name.upper()}", raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*arguments: str | Path) -> Said:
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        else:
            status = 0
        assert isinstance(status, int)
        return Said(status, *capsys.readouterr())

    yield run
    root.handlers = handlers
    root.setLevel(level)
    for logger in ("uvicorn", "app.requests"):
        logging.getLogger(logger).setLevel(logging.NOTSET)


def test_the_start_is_one_line_with_the_address(bundle: Path, tmp_path: Path) -> None:
    with running_service(bundle, tmp_path / "data") as service:
        assert len(service.log) == 1
        assert service.log[0].startswith(f"dinoserve: tiny at {service.url} ")
        assert httpx.get(service.url + "/health/ready").status_code == 200


def test_a_missing_bundle_is_one_sentence(dino_serve: DinoServe, tmp_path: Path) -> None:
    done = dino_serve("run", "--model", tmp_path / "nowhere", "--data-dir", tmp_path / "data", "--port", "0")
    assert done.status == 2
    assert done.err.startswith("dino-serve: ")
    assert done.err.count("\n") == 1
    assert "nowhere" in done.err
    assert not (tmp_path / "data").exists()


def test_a_broken_bundle_is_one_sentence(dino_serve: DinoServe, bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    done = dino_serve("run", "--model", broken, "--data-dir", tmp_path / "data", "--port", "0")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "model.safetensors" in done.err


def test_two_models_of_one_name_are_one_sentence(dino_serve: DinoServe, bundle: Path, tmp_path: Path) -> None:
    twice = ("--model", bundle, "--model", bundle)
    done = dino_serve("run", *twice, "--data-dir", tmp_path / "data", "--port", "0")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "two of the models are called 'tiny'" in done.err
    assert "--model NAME=BUNDLE" in done.err


def test_a_port_that_is_taken_is_one_sentence(dino_serve: DinoServe, bundle: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = dino_serve("run", "--model", bundle, "--data-dir", tmp_path, "--port", str(port))
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert f"port {port}" in done.err
    assert "--port" in done.err


def test_a_second_process_on_the_same_data_is_one_sentence(
    dino_serve: DinoServe, bundle: Path, tmp_path: Path
) -> None:
    with running_service(bundle, tmp_path) as service:
        done = dino_serve("run", "--model", bundle, "--data-dir", tmp_path, "--port", "0")
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert str(service.process.pid) in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["run", "--host", "0.0.0.0"], "--api-key-file FILE, or say --insecure", id="open door"),
        pytest.param(["run", "--api-key-file", "nowhere"], "nowhere can't be read", id="no keys"),
        pytest.param(["run", "--device", "tpu"], "auto, cpu, cuda or cuda:N", id="no device"),
        pytest.param(["run", "--max-concurrent-images", "1"], "could never enter", id="contradiction"),
        pytest.param(["fly"], "no command 'fly'", id="no command"),
        pytest.param(["index", "add", "nowhere"], "nowhere does not exist", id="no folder"),
    ],
)
def test_what_can_not_be_done_is_said_and_exits_with_2(
    dino_serve: DinoServe, bundle: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    place = ["--model", str(bundle), "--data-dir", str(tmp_path / "data")] if arguments != ["fly"] else []
    done = dino_serve(*arguments, *place, *(["--port", "0"] if arguments[0] == "run" else []))
    assert done.status == 2
    assert says in done.err


def test_a_folder_that_is_not_there_is_said_before_anything_is_made(
    dino_serve: DinoServe, tmp_path: Path
) -> None:
    place = ["--model", tmp_path / "none", "--data-dir", tmp_path / "data"]
    done = dino_serve("index", "add", tmp_path / "nowhere", *place)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "nowhere does not exist" in done.err
    assert not (tmp_path / "data").exists()


def test_without_a_command_it_says_what_there_is(dino_serve: DinoServe) -> None:
    done = dino_serve()
    assert done.status == 0
    assert "dino-serve run" in done.err


def test_sigterm_answers_what_is_under_way_and_exits_with_0(bundle: Path, tmp_path: Path) -> None:
    with running_service(bundle, tmp_path / "data") as service, ThreadPoolExecutor(8) as pool:
        files = [multipart([photo(100 * client + seed) for seed in range(24)]) for client in range(8)]
        with httpx.Client(base_url=service.url, timeout=60) as http:
            # Time enough on a machine that is busy with other tests: none is refused for its deadline.
            asked = [pool.submit(http.post, "/embed?timeout=60", files=one) for one in files]
            deadline_s = time.monotonic() + 30
            while 'route="/embed"' not in http.get("/metrics").text and time.monotonic() < deadline_s:
                time.sleep(0.01)
            service.process.send_signal(signal.SIGTERM)
            answers = [one.result() for one in asked]
        assert service.process.wait(30) == 0
    assert [answer.status_code for answer in answers] == [200] * 8
    assert all(answer.json()["usage"]["failed"] == 0 for answer in answers)


def test_kill_9_loses_nothing_that_was_acknowledged(bundle: Path, tmp_path: Path) -> None:
    acknowledged: list[int] = []
    with running_service(bundle, tmp_path / "data") as service:

        def add(seed: int) -> None:
            answer = httpx.post(
                service.url + "/collections/default/items",
                files=multipart([photo(seed)]),
                data={"ids": [str(seed)]},
                timeout=60,
            )
            if answer.json()["data"][0]["status"] == "added":
                acknowledged.append(seed)

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(add, seed) for seed in range(200)]
            while len(acknowledged) < 20:
                time.sleep(0.01)
            service.process.kill()
            assert any(one.exception() is not None for one in asked)  # it was killed at work

    with running_service(bundle, tmp_path / "data") as service, httpx.Client(base_url=service.url) as http:
        assert len(acknowledged) >= 20
        for seed in acknowledged:
            assert http.get(f"/collections/default/items/{seed}/thumbnail").status_code == 200
            found = http.post("/similar?k=1", files=multipart([photo(seed)])).json()
            assert found["data"][0]["neighbours"][0]["id"] == str(seed)


def test_json_logs_have_a_line_for_each_request(bundle: Path, tmp_path: Path) -> None:
    with running_service(bundle, tmp_path / "data", "--json-logs") as service:
        request_id = httpx.get(service.url + "/info").headers["X-Request-Id"]
        deadline_s = time.monotonic() + 20
        while not any(request_id in line for line in service.log):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)


def test_a_folder_is_added_through_a_service_that_runs(
    dino_serve: DinoServe, bundle: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    (photos / "cats").mkdir(parents=True)
    for seed in range(3):
        (photos / "cats" / f"{seed}.jpg").write_bytes(photo(seed))
    with running_service(bundle, tmp_path / "data") as service:
        done = dino_serve("index", "add", photos, "--server", service.url, "--report", tmp_path / "failures")
        assert done.status == 0, done.err
        found = httpx.post(service.url + "/similar?k=1", files=multipart([photo(2)])).json()
        assert found["data"][0]["neighbours"][0]["id"] == "cats/2.jpg"
        stats = dino_serve("index", "stats", "--server", service.url)
    assert stats.status == 0
    assert "default" in stats.out
