"""The other processes of a benchmark: the service under test, the null server, the measure of ceilings."""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from app.bench.findings import Ceilings
from app.bench.wire import Endpoint

_URL: Final = re.compile(r"http://127\.0\.0\.1:\d+")
_END_S: Final = 30.0


class CannotBench(Exception):
    """The benchmark can't be done; the message is for the user."""


@contextlib.contextmanager
def own_service(model: Path, *, device: str, backend: str) -> Iterator[str]:
    """Starts `dino-serve run` on a free port with an empty data directory; its address.

    Other settings come from the environment, as for every service.

    Raises:
        CannotBench: It did not start.
    """
    with tempfile.TemporaryDirectory(prefix="dino-bench-") as data_dir:
        flags = [
            "--model",
            str(model),
            "--device",
            device,
            "--backend",
            backend,
            "--host",
            "127.0.0.1",
            "--port",
            "0",
        ]
        command = [sys.executable, "-m", "app", "run", *flags, "--data-dir", data_dir]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            said: list[str] = []
            url = None
            for line in process.stderr:
                said.append(line)
                if found := _URL.search(line):
                    url = found.group()
                    break
            # Read on, or its pipe fills and it stops at a log line.
            reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
            reader.start()
            try:
                if url is None:
                    raise CannotBench(f"the service did not start: {''.join(said).strip()}")
                yield url
            finally:
                process.terminate()
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                reader.join()


@contextlib.contextmanager
def null_service() -> Iterator[Endpoint]:
    """Starts a server that does nothing; where it listens."""
    command = [sys.executable, "-m", "app.bench.null_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Endpoint("127.0.0.1", int(process.stdout.readline()))
        finally:
            process.stdin.close()
            process.wait(_END_S)


def ceilings_of(model: Path, *, device: str, backend: str, images: Path | None) -> Ceilings:
    """What `app.bench.ceilings` measures, in a process of its own.

    Raises:
        CannotBench: It failed.
    """
    command = [
        sys.executable,
        "-m",
        "app.bench.ceilings",
        str(model),
        "--device",
        device,
        "--backend",
        backend,
    ]
    command += ["--images", str(images)] if images else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise CannotBench(f"the model could not be measured by itself: {last[0]}")
    found = json.loads(done.stdout)
    by_batch = {int(size): per_s for size, per_s in found.pop("forward_by_batch").items()}
    return Ceilings(forward_by_batch=by_batch, **found)
