"""Models replaced while a real service works: no request is lost, none is answered by two models."""

import base64
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dino_core.backbones import make_backbone
from dino_core.bundle import load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import ImageLimits, Preprocessing, load_pixels
from tests.app.api.serving import multipart, photo
from tests.app.running import Service, running_service, write_tiny_bundle

PATIENCE_S = 60
SWAPS = 10
CALLERS = 4
WEIGHTS_MB = 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of bundles: `a` and `b`, large enough that one left behind would show."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        backbone = make_backbone(
            "vit_tiny_patch16_224",
            image_size_px=32,
            model_kwargs={"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3},
        )
        model = EmbeddingModel(backbone, preprocessing=Preprocessing(resize_px=36, crop_px=32), pooling="cls")
        write_bundle(root / name, model, provenance={}, card="# Random weights\n")
    return root


@pytest.fixture(scope="module")
def running(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data = tmp_path_factory.mktemp("swapped") / "data"
    with running_service(root / "a", data, "--drain-seconds", "5") as service:
        yield service


@pytest.fixture
def service(running: Service) -> Service:
    """The one service of these tests, with `a` to begin with."""
    answer = reload(running, path="a")
    assert answer.status_code == 200, answer.text
    return running


def reload(service: Service, **asked: str) -> httpx.Response:
    return httpx.post(f"{service.url}/admin/reload", json=asked, timeout=PATIENCE_S)


def fingerprint_of(service: Service) -> str:
    return str(httpx.get(f"{service.url}/info").json()["model"]["fingerprint"])


def wait_until(met: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not met():
        assert time.monotonic() < deadline_s, "it takes too long"
        time.sleep(0.05)


def resident_mb(service: Service) -> float:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


class Callers:
    """Threads that ask without pause, and check each answer against the model that it names."""

    def __init__(self, url: str, expected: dict[str, NDArray[np.float32]], images: list[bytes]) -> None:
        self.answers = [0] * CALLERS
        self.faults: list[str] = []
        self.fingerprints: set[str] = set()
        self._url = url
        self._expected = expected
        self._images = images
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(one,)) for one in range(CALLERS)]

    def __enter__(self) -> "Callers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def one_more_each(self) -> None:
        before = list(self.answers)
        wait_until(
            lambda: (
                bool(self.faults) or all(now > then for now, then in zip(self.answers, before, strict=True))
            )
        )

    def _ask(self, caller: int) -> None:
        rng = np.random.default_rng(caller)
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as http:
            while not self._stop.is_set():
                picked = rng.integers(0, len(self._images), 3)
                try:
                    answer = http.post("/embed", files=multipart([self._images[one] for one in picked]))
                    self._check(answer, picked)
                except Exception as error:
                    self.faults.append(repr(error))
                self.answers[caller] += 1

    def _check(self, answer: httpx.Response, picked: NDArray[np.int64]) -> None:
        if answer.status_code != 200:
            self.faults.append(f"{answer.status_code} {answer.text}")
            return
        body = answer.json()
        fingerprint = body["model"]["fingerprint"]
        self.fingerprints.add(fingerprint)
        if answer.headers["X-Model-Fingerprint"] != fingerprint:
            self.faults.append("header and body name two models")
        found = np.array([item["embedding"] for item in body["data"]])
        cosines = (found * self._expected[fingerprint][picked]).sum(axis=1)
        if not (cosines >= 0.9999).all():
            self.faults.append(f"{fingerprint} answered with another model's vectors: {cosines}")


def test_ten_swaps_under_load_lose_no_request_and_mix_no_vectors(service: Service, root: Path) -> None:
    images = [photo(seed) for seed in range(8)]
    expected: dict[str, NDArray[np.float32]] = {}
    for name in "ab":
        bundle = load_bundle(root / name)
        pixels = [load_pixels(one, bundle.manifest.preprocessing, limits=ImageLimits()) for one in images]
        with torch.inference_mode():
            expected[bundle.manifest.fingerprint] = bundle.model(torch.stack(pixels)).numpy()
    fingerprints = list(expected)
    resident: list[float] = []
    with Callers(service.url, expected, images) as callers:
        for swap in range(1, SWAPS + 1):
            callers.one_more_each()
            answer = reload(service, path="ab"[swap % 2])
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"]["fingerprint"] == fingerprints[swap % 2]
            assert answer.json()["replaced"]["fingerprint"] == fingerprints[(swap - 1) % 2]
            assert answer.json()["requests_with_replaced"] == 0
            assert fingerprint_of(service) == fingerprints[swap % 2]
            callers.one_more_each()
            resident.append(resident_mb(service))
    assert callers.faults == []
    assert callers.fingerprints == set(fingerprints)
    # Were models kept, there would be eight more of them at the end than after the second swap.
    assert resident[-1] - resident[1] < 3 * WEIGHTS_MB, resident


def test_a_request_that_is_under_way_ends_with_the_model_that_it_began_with(
    service: Service, root: Path
) -> None:
    old = fingerprint_of(service)
    with Stream(service) as stream:
        assert stream.add("before")["status"] == "added"
        swapped = reload(service, path="b").json()
        assert swapped["requests_with_replaced"] == 1
        assert fingerprint_of(service) != old
        refused = reload(service, path="a")
        assert (refused.status_code, refused.json()["code"]) == (409, "reload_under_way")
        assert stream.add("after")["status"] == "added"
    wait_until(lambda: reload(service, path="a").status_code == 200)
    for item in ("after", "before"):
        assert httpx.get(f"{service.url}/collections/default/items/{item}").status_code == 200


def test_a_collection_of_a_model_that_is_served_no_more_says_so_and_what_to_do(
    service: Service, root: Path
) -> None:
    old = fingerprint_of(service)
    httpx.post(f"{service.url}/collections/default/items", files=multipart([photo(1)]))
    reload(service, path="b")
    answer = httpx.post(f"{service.url}/similar", files=multipart([photo(1)]))
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "fingerprint_mismatch")
    assert (problem["expected"], problem["found"]) == (old, fingerprint_of(service))
    assert "/collections/default/reindex" in problem["detail"]
    assert httpx.get(f"{service.url}/collections/default").json()["searchable"] is False


def test_a_bundle_that_is_broken_leaves_the_old_model_where_it_is(service: Service, root: Path) -> None:
    before = fingerprint_of(service)
    broken = root / "broken"
    shutil.copytree(root / "b", broken, dirs_exist_ok=True)
    weights = bytearray((broken / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "model.safetensors").write_bytes(weights)
    answer = reload(service, path="broken")
    assert (answer.status_code, answer.json()["code"]) == (422, "model_refused")
    assert "model.safetensors" in answer.json()["detail"]
    assert fingerprint_of(service) == before
    assert httpx.post(f"{service.url}/embed", files=multipart([photo(1)])).status_code == 200
    assert reload(service, path="b").status_code == 200


def test_a_bundle_that_does_not_reproduce_its_reference_embeddings_is_refused(
    service: Service, root: Path
) -> None:
    # Every hash fits, so that only the reference embeddings tell.
    wrong = root / "wrong"
    shutil.copytree(root / "b", wrong, dirs_exist_ok=True)
    shutil.copy(root / "a" / "reference.safetensors", wrong)
    manifest = json.loads((wrong / "manifest.json").read_text())
    a = json.loads((root / "a" / "manifest.json").read_text())
    manifest["files"]["reference.safetensors"] = a["files"]["reference.safetensors"]
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    answer = reload(service, path="wrong")
    assert answer.status_code == 422
    assert "does not reproduce its reference embeddings" in answer.json()["detail"]


@pytest.fixture(scope="module")
def outside(root: Path) -> Path:
    """A good bundle beside the directory of bundles, with a link to it inside."""
    path = write_tiny_bundle(root.parent / "outside")
    (root / "link").symlink_to(path)
    return path


@pytest.mark.parametrize("path", ["../outside", "/etc", ".", "", "link", "a/../../outside", "a\0b"])
def test_only_bundles_below_the_directory_of_bundles_are_loaded(
    running: Service, outside: Path, path: str
) -> None:
    answer = reload(running, path=path)
    assert (answer.status_code, answer.json()["code"]) == (422, "model_refused")
    assert "is not below the directory of bundles" in answer.json()["detail"]


def test_sighup_reloads_the_models_that_are_others_on_disk(tmp_path: Path) -> None:
    one = write_tiny_bundle(tmp_path / "models" / "one")
    two = write_tiny_bundle(tmp_path / "models" / "two", seed=1)
    with (
        running_service(one, tmp_path / "data", "--model", str(two)) as service,
        httpx.Client(base_url=service.url, timeout=PATIENCE_S) as http,
    ):

        def fingerprints() -> list[str]:
            return [model["fingerprint"] for model in http.get("/info").json()["models"]]

        before = fingerprints()
        shutil.rmtree(two)
        write_tiny_bundle(two, seed=2)
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: fingerprints() != before)
        assert fingerprints()[0] == before[0]
        shutil.rmtree(two)
        service.process.send_signal(signal.SIGHUP)
        wait_until(lambda: any("'two' was not reloaded" in line for line in service.log))
        assert http.post("/embed?model=two", files=multipart([photo(1)])).status_code == 200


class Stream:
    """A request that adds items line by line, for as long as it likes."""

    def __init__(self, service: Service) -> None:
        host, port = service.url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self._answers = self._socket.makefile("rb")
        self._socket.sendall(
            b"POST /collections/default/items HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        )

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.sendall(b"0\r\n\r\n")
        self._answers.read()
        self._socket.close()

    def add(self, item_id: str) -> dict[str, Any]:
        image = base64.b64encode(photo(len(item_id))).decode()
        line = json.dumps({"id": item_id, "image": image}).encode() + b"\n"
        self._socket.sendall(b"%x\r\n%b\r\n" % (len(line), line))
        for answer in self._answers:
            if answer.startswith(b"{"):
                found: dict[str, Any] = json.loads(answer)
                return found
        raise AssertionError("the service closed the stream")
