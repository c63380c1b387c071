"""A real Milvus server for tests: the standalone server of the package `milvus`, in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-milvus" / "bin" / "python"
OTHER_SERVER = "DINO_TEST_MILVUS"


@dataclass(frozen=True)
class RunningMilvus:
    """A server.

    Attributes:
        url: Where.
        pid: Of the server itself, to kill for a crash.
    """

    url: str
    pid: int

    @property
    def port(self) -> int:
        """Of the address."""
        return int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        """As a power cut would, as far as the server's own process goes."""
        os.kill(self.pid, signal.SIGKILL)


@contextlib.contextmanager
def running_milvus(data_dir: Path, *, port: int | None = None) -> Iterator[RunningMilvus]:
    """Starts a server on free ports, or a given one, waits until it answers, and stops it at the end.

    Skips the test where the server is not installed.
    """
    if not PYTHON.exists():
        pytest.skip(f"there is no Milvus server in .venv-milvus: make milvus, or name one in {OTHER_SERVER}")
    command = [str(PYTHON), str(ROOT / "tests" / "app" / "milvus_child.py"), str(data_dir)]
    with subprocess.Popen(
        [*command, *([str(port)] if port else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, f"the Milvus server did not start; its logs are in {data_dir / 'logs'}"
            yield RunningMilvus(**json.loads(line))
        finally:
            process.stdin.close()  # it stops the server and ends
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def any_milvus(data_dir: Path) -> Iterator[str]:
    """The address of the server that `DINO_TEST_MILVUS` names, or of one that is started."""
    if url := os.environ.get(OTHER_SERVER):
        yield url
        return
    with running_milvus(data_dir) as server:
        yield server.url
