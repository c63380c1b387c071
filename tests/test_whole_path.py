"""Train, evaluate, serve, index, search: each by its own command in its own process, as a user does it."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.app.running import ROOT, Service, running_service

CLASSES = ("stripes", "blobs", "noise")
STEPS = 12


def drawn(kind: str, seed: int) -> Image.Image:
    """A photograph-sized picture of one of three textures."""
    rng = np.random.default_rng([CLASSES.index(kind), seed])
    rows, columns = np.mgrid[0 : int(rng.integers(60, 120)), 0 : int(rng.integers(60, 120))]
    match kind:
        case "stripes":
            grey = np.sin(columns / rng.uniform(2, 5) + rng.uniform(0, 6))
        case "blobs":
            grey = np.sin(rows / rng.uniform(8, 14)) * np.sin(columns / rng.uniform(8, 14))
        case _:
            grey = rng.uniform(-1, 1, rows.shape)
    colour = rng.uniform(60, 127, 3)
    return Image.fromarray((127 + grey[..., None] * colour).astype(np.uint8))


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", *map(str, arguments)]


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures in three classes, one of them cut short."""
    root = tmp_path_factory.mktemp("pictures")
    for kind in CLASSES:
        (root / kind).mkdir()
        for seed in range(20):
            drawn(kind, seed).save(root / kind / f"{seed:02d}.jpg", quality=90)
    whole = (root / "noise" / "19.jpg").read_bytes()
    (root / "noise" / "19.jpg").write_bytes(whole[: len(whole) // 2])
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A bundle of a run that was killed and resumed, and what the second half said."""
    out = tmp_path_factory.mktemp("out")
    arguments = command(
        "training", "run", "--data", folder, "--recipe", "smoke", "--out", out / "mine",
        "--run-dir", out / "run", "--steps", str(STEPS), "--checkpoints.every-steps", "2",
    )  # fmt: skip
    checkpoints = out / "run" / "checkpoints"
    with subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not any(checkpoints.glob("step-*")):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / "mine").exists()
    said = run(*arguments[2:], "--resume")
    return out / "mine", said


@pytest.fixture(scope="module")
def service(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(trained[0], tmp_path_factory.mktemp("data")) as service:
        yield service


def test_a_killed_run_resumes_and_says_how_to_serve_its_teacher(trained: tuple[Path, str]) -> None:
    bundle, said = trained
    assert f"dino-serve run --model {bundle}" in said.replace("\n", "")
    assert "noise/19.jpg" in said  # the file that could not be read is named


@pytest.fixture(scope="module")
def evaluated(trained: tuple[Path, str], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vectors = tmp_path_factory.mktemp("eval") / "vectors.npz"
    run("training", "eval", trained[0], "--data", folder, "--embeddings", vectors)
    return vectors


def cosine(ours: object, theirs: np.ndarray) -> float:
    vector = np.asarray(ours, dtype=np.float64)
    return float(vector @ theirs / np.linalg.norm(vector) / np.linalg.norm(theirs))


def test_the_service_embeds_as_the_evaluation_does(service: Service, evaluated: Path, folder: Path) -> None:
    """Alone, all in one request, and among 32 clients, each its own: cosine at least 0.9999."""
    stored = np.load(evaluated)
    expected = dict(zip(stored["paths"].tolist(), stored["embeddings"], strict=True))
    assert len(expected) == 59
    names = sorted(expected)
    contents = {name: (folder / name).read_bytes() for name in names}
    with httpx.Client(base_url=service.url, timeout=60) as client:

        def embed(*wanted: str) -> list[dict[str, object]]:
            files = [("images", (name, contents[name])) for name in wanted]
            answer = client.post("/embed", files=files)
            assert answer.status_code == 200, answer.text
            rows: list[dict[str, object]] = answer.json()["data"]
            return rows

        together = embed(*names)
        assert all(
            cosine(row["embedding"], expected[name]) >= 0.9999
            for row, name in zip(together, names, strict=True)
        )
        with concurrent.futures.ThreadPoolExecutor(32) as clients:
            for name, (row,) in zip(names, clients.map(embed, names), strict=True):
                assert cosine(row["embedding"], expected[name]) >= 0.9999


def test_a_folder_is_added_survives_a_kill_and_finds_its_kind(
    trained: tuple[Path, str], folder: Path, tmp_path: Path
) -> None:
    with running_service(trained[0], tmp_path / "data") as service:
        done = subprocess.run(
            command("app", "index", "add", folder, "--server", service.url),
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "59 added" in done.stderr
        assert "1 failed" in done.stderr
        assert done.returncode == 1  # something failed, and the report names it
        assert "noise/19.jpg" in (tmp_path / "index-failures.jsonl").read_text()
        service.process.kill()
        service.process.wait()
    with running_service(trained[0], tmp_path / "data") as service:
        for name in ("stripes/03.jpg", "blobs/11.jpg"):
            answer = httpx.post(
                f"{service.url}/similar?k=4", files={"images": (folder / name).read_bytes()}, timeout=60
            )
            body = answer.json()
            assert body["collection"]["items"] == 59
            nearest = body["data"][0]["neighbours"]
            assert nearest[0]["id"] == name
            assert nearest[0]["score"] > 0.9999  # itself
            assert [row["score"] for row in nearest] == sorted((r["score"] for r in nearest), reverse=True)
