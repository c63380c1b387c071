"""The way of a picture without its model: `python -m benchmarks.host_path`.

On a GPU it is the host that sets the pace: sockets, HTTP, decoding, threads. So the network here costs
next to nothing, the service has one core, and the clients have another.

    bare        a loop of simplejpeg (libjpeg-turbo), resize and crop: what the core can do, without a service
    dinoserve   `dino-serve run`, 1 and 16 pictures a request; no picture twice
    naive       FastAPI with a thread pool and no batches (benchmarks/rivals/naive.py)
    litserve    LitServe with batches, where it is installed (benchmarks/rivals/litserve_free.py)

They take turns on the same core, so that only ratios are read. Nothing else may compute meanwhile. Prints
JSON; needs two cores and three minutes.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch

from app.bench.load import OK, closed_loop
from app.bench.payloads import embed_payloads, generated_pictures
from app.bench.wire import Endpoint, connect
from dino_core.backbones import make_backbone
from dino_core.bundle import write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing, load_pixels

PICTURES: Final = 64
CLIENTS: Final = 32
MANY: Final = 16
WARM_UP_S: Final = 2.0
START_S: Final = 90.0
_SESSION, _USER_TICKS, _SYSTEM_TICKS = 3, 11, 12  # fields of /proc/PID/stat after the name


def write_free_model(path: Path) -> Path:
    """A bundle whose network has 49 patches, one block and 16 dimensions: 3 million multiplications."""
    backbone = make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=224,
        model_kwargs={"patch_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 1},
    )
    model = EmbeddingModel(backbone, preprocessing=Preprocessing(), pooling="cls")
    write_bundle(path, model, provenance={}, card="# Costs nothing, and knows nothing\n")
    return path


def bare_loop_per_s(pictures: list[bytes], seconds: float) -> float:
    """Pictures a second of this thread alone: decoded, resized, cropped."""
    torch.set_num_threads(1)
    preprocessing = Preprocessing()
    count, began = 0, time.perf_counter()
    while (took_s := time.perf_counter() - began) < seconds:
        for data in pictures:
            load_pixels(data, preprocessing)
        count += len(pictures)
    return count / took_s


class Server:
    """A server, all of it on one core; it sleeps while others are measured."""

    def __init__(self, words: list[str], core: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = Endpoint("127.0.0.1", free.getsockname()[1])
        command = [sys.executable, "-m", *words, str(self.endpoint.port)]
        pinned = ["taskset", "--cpu-list", str(core), *command]
        self._process = subprocess.Popen(pinned, stderr=subprocess.DEVNULL, start_new_session=True)

    def wait_until_it_answers(self, *, as_form: bool) -> None:
        """Sends pictures until one is taken.

        Raises:
            RuntimeError: None was.
        """
        (payload,) = embed_payloads(self.endpoint, generated_pictures(1), as_form=as_form)
        deadline = time.monotonic() + START_S

        async def answered() -> bool:
            with contextlib.suppress(OSError):
                connection = await connect(self.endpoint)
                status = await connection.ask(payload.numbered(iter(range(9))))
                connection.close()
                return status == 200
            return False

        while not asyncio.run(answered()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._process.args!r} did not start")
            time.sleep(0.5)

    def sleep(self) -> None:
        """Stops all its processes."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Lets them go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[_SESSION]) == self._process.pid:
                    ticks += int(fields[_USER_TICKS]) + int(fields[_SYSTEM_TICKS])
        return ticks / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Kills them."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def measured(
    server: Server, pictures: list[bytes], *, images: int, as_form: bool, seconds: float
) -> dict[str, float]:
    """A closed loop of clients."""
    payloads = embed_payloads(server.endpoint, pictures, images_per_request=images, as_form=as_form)
    told = {"clients": max(2, CLIENTS // images), "duration_s": WARM_UP_S + seconds, "warm_up_s": WARM_UP_S}
    server.wake()
    began_s = server.cpu_s()
    found = asyncio.run(closed_loop(server.endpoint, payloads, **told))
    server.sleep()
    cpu_ms = (server.cpu_s() - began_s) * 1000 / sum(sample.images for sample in found.samples)
    if set(found.outcomes) != {OK}:
        raise RuntimeError(f"{server.endpoint} answered {dict(found.outcomes)}")
    return {
        "images_per_s": found.images_per_s,
        "cpu_ms_per_image": cpu_ms,
        "p50_ms": found.latency_ms(50),
        "p99_ms": found.latency_ms(99),
    }


def bare_per_s(core: int, seconds: float) -> float:
    """As `bare_loop_per_s`, on the servers' core."""
    command = [sys.executable, "-m", "benchmarks.host_path", "--bare", "--seconds", str(seconds)]
    done = subprocess.run(
        ["taskset", "--cpu-list", str(core), *command], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def compared(*, core: int, rounds: int, seconds: float, rivals: bool) -> dict[str, Any]:
    """All of them in turns; medians over the rounds, and each as a share of the bare loop."""
    pictures = generated_pictures(PICTURES)
    loads = {"dinoserve 1": ("dinoserve", 1, False), f"dinoserve {MANY}": ("dinoserve", MANY, True)}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = write_free_model(Path(folder) / "free")
        data_dir = Path(folder) / "data"
        ours = [
            "app",
            "run",
            "--model",
            str(model),
            "--backend",
            "torch",
            "--data-dir",
            str(data_dir),
            "--port",
        ]
        words = {"dinoserve": ours}
        if rivals:
            words["naive"] = ["benchmarks.rivals.naive"]
            loads["naive"] = ("naive", 1, False)
            if importlib.util.find_spec("litserve"):
                words["litserve"] = ["benchmarks.rivals.litserve_free"]
                loads["litserve"] = ("litserve", 1, True)
        servers = {}
        for name, command in words.items():
            servers[name] = Server(command, core)
            stack.callback(servers[name].end)
            servers[name].wait_until_it_answers(as_form=name == "litserve")
            servers[name].sleep()
        bare: list[float] = []
        found: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
        for _ in range(rounds):
            bare.append(bare_per_s(core, seconds))
            for name, (server, images, as_form) in loads.items():
                found[name].append(
                    measured(servers[server], pictures, images=images, as_form=as_form, seconds=seconds)
                )
    answer: dict[str, Any] = {"bare": {"images_per_s": round(statistics.median(bare), 2)}}
    for name, figures in found.items():
        shares = [figure["images_per_s"] / per_s for figure, per_s in zip(figures, bare, strict=True)]
        answer[name] = {
            "share_of_bare": round(statistics.median(shares), 3),
            **{key: round(statistics.median(figure[key] for figure in figures), 2) for key in figures[0]},
        }
    return answer


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement, after its warm-up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-rivals", action="store_true", help="dinoserve and the bare loop only")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.bare:
        print(bare_loop_per_s(generated_pictures(PICTURES), told.seconds))
        return
    servers_core, clients_core, *_ = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {clients_core})
    found = compared(core=servers_core, rounds=told.rounds, seconds=told.seconds, rivals=not told.no_rivals)
    about = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    about |= {name: version(name) for name in ("torch", "simplejpeg", "fastapi", "uvicorn")}
    print(json.dumps({"about": about | {"rounds": told.rounds, "seconds": told.seconds}} | found, indent=2))


if __name__ == "__main__":
    main()
