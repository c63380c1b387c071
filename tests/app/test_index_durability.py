"""`kill -9` of a real `index add`, and of the service under it: nothing is lost, nothing is there twice."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.client import Client
from app.search.embedded.library import Collections
from tests.app.running import ROOT, picture, running_service, write_tiny_bundle
from tests.app.sources.test_tar import pack

PICTURES = 500
_WITHOUT_A_SERVICE = (
    "from app import cli, sinks; sinks.DEFAULT_URL = 'http://127.0.0.1:9'; cli.main()"  # nobody is there
)
_COUNTS = re.compile(r"(\d+) added, (\d+) updated, (\d+) unchanged, (\d+) failed")


@dataclass
class Sources:
    """What is added.

    Attributes:
        arguments: Of the command.
        sha256: By id, of what can be added.
        failing: Ids of what can't.
    """

    arguments: list[str]
    sha256: dict[str, str]
    failing: set[str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    sha256: dict[str, str] = {}
    packed: dict[str, bytes] = {}
    (root / "photos").mkdir()
    for number in range(PICTURES):
        data = picture(number)
        if number % 5:
            (root / "photos" / f"{number:04}.jpg").write_bytes(data)
            sha256[f"{number:04}.jpg"] = hashlib.sha256(data).hexdigest()
        else:
            packed[f"packed/{number:04}.jpg"] = data
            sha256[f"packed/{number:04}.jpg"] = hashlib.sha256(data).hexdigest()
    (root / "photos" / "0100-text.jpg").write_text("no picture")
    packed["packed/0300-cut.jpg"] = picture(1)[:400]
    pack(root / "packed.tar", packed)
    return Sources(
        [str(root / "photos"), str(root / "packed.tar")], sha256, {"0100-text.jpg", "packed/0300-cut.jpg"}
    )


def start(sources: Sources, tmp_path: Path, *flags: str) -> "subprocess.Popen[str]":
    # Somebody may really run a service on this machine, which an unnamed one would be.
    program = ["-m", "app"] if "--server" in flags else ["-c", _WITHOUT_A_SERVICE]
    command = [sys.executable, *program, "index", "add", *sources.arguments, *flags]
    command += ["--report", str(tmp_path / "report.jsonl"), "--ledger", str(tmp_path / "ledger.sqlite")]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process: "subprocess.Popen[str]") -> tuple[int, tuple[int, ...], str]:
    """Exit status, counts, and all that was said."""
    _, said = process.communicate(timeout=240)
    found = _COUNTS.search(said)
    assert found is not None, said
    return process.returncode, tuple(map(int, found.groups())), said


def check(data_dir: Path, sources: Sources, tmp_path: Path) -> None:
    """The directory has each picture once, with its hash and a thumbnail; the report has the rest."""
    with Collections.open(data_dir) as catalogue:
        collection = catalogue.get("default")
        assert collection.count() == len(sources.sha256)
        items = collection.scroll(cursor=None, limit=1_000).items
        assert {item.id: item.sha256 for item in items} == sources.sha256
        assert len(items) == len(sources.sha256)
        assert all(collection.thumbnail(item.id) for item in items)
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(sources.failing)


def items_in(data_dir: Path) -> int:
    """How many items there are on disk, as another process sees it."""
    path = data_dir / "collections.sqlite"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        try:
            (count,) = connection.execute("SELECT count(*) FROM items").fetchone()
        except sqlite3.OperationalError:
            return 0
    return int(count)


@pytest.mark.parametrize(
    "rounds", [pytest.param(1, id="once"), pytest.param(15, id="often", marks=pytest.mark.slow)]
)
def test_a_command_that_is_killed_again_and_again_ends_with_everything_once(
    bundle: Path, sources: Sources, tmp_path: Path, rounds: int
) -> None:
    data_dir, rng = tmp_path / "data", random.Random(rounds)
    flags = ("--data-dir", str(data_dir), "--model", str(bundle))
    seen = 0
    for _ in range(rounds):
        process = start(sources, tmp_path, *flags)
        # Anywhere from its first item to a moment later, which may be in the middle of a commit.
        while items_in(data_dir) <= seen and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        now = items_in(data_dir)
        assert now >= seen  # what was there is there
        seen = now
    status, (added, updated, unchanged, failed), said = finished(start(sources, tmp_path, *flags))
    assert (status, updated, failed) == (1, 0, 2)
    assert "Traceback" not in said
    assert added + unchanged == len(sources.sha256)
    assert unchanged == seen
    check(data_dir, sources, tmp_path)
    again = finished(start(sources, tmp_path, *flags))
    assert again[:2] == (1, (0, 0, len(sources.sha256), 2))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize(
    "rounds", [pytest.param(1, id="once"), pytest.param(6, id="often", marks=pytest.mark.slow)]
)
def test_a_service_that_is_killed_under_the_command_is_waited_for_and_nothing_is_lost(
    bundle: Path, sources: Sources, tmp_path: Path, rounds: int
) -> None:
    data_dir, port, rng = tmp_path / "data", free_port(), random.Random(rounds)
    url = f"http://127.0.0.1:{port}"
    process: subprocess.Popen[str] | None = None
    seen = 0
    for _ in range(rounds):
        with running_service(bundle, data_dir, "--port", str(port)) as service:
            process = process or start(sources, tmp_path, "--server", url)
            while items_in(data_dir) <= seen and process.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)
            service.process.kill()
            service.process.wait()
        assert items_in(data_dir) >= seen
        seen = items_in(data_dir)
    assert process is not None
    with running_service(bundle, data_dir, "--port", str(port)), Client(url) as client:
        status, (added, updated, unchanged, failed), said = finished(process)
        assert (status, updated, failed) == (1, 0, 2), said
        # Requests whose answers were lost are sent again, and find their pictures there.
        assert added + unchanged == len(sources.sha256)
        assert len(list(client.items("default"))) == len(sources.sha256)
    check(data_dir, sources, tmp_path)
