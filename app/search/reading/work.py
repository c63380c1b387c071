"""Work on a spool in a process of its own: what to do, and the process from the outside.

Not a thread, although the libraries release the interpreter's lock well: a process can be ended in the middle
of a native call, so a service stops at once; it gives back all its memory; the scheduler puts it behind
requests; and a system short of memory ends it and leaves the service.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, Self, TypeAlias

from app.errors import ComputationFailed

Kind: TypeAlias = Literal["map", "duplicates", "clusters"]

_MODULE: Final = "app.search.reading.process"
_LOG_BYTES: Final = 4_000

logger = logging.getLogger(__name__)


class Cancelled(Exception):
    """Nobody wants it any more."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a process shall do.

    Attributes:
        kind: Of the computation.
        clusters: How many; None for a number by the collection's size.
        dimensions: Of the vectors.
        spool: The folder of `app.search.reading.spool`.
        previous: The result before, to go on with; or None.
        result: The file to write.
        facts: To write with it.
        threads: That it may keep busy.
    """

    kind: Kind
    clusters: int | None
    dimensions: int
    spool: str
    previous: str | None
    result: str
    facts: dict[str, float | int | str]
    threads: int

    def as_json(self) -> str:
        """For the process's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `as_json` made."""
        return cls(**json.loads(text))


class Work:
    """One process; `run` it once, `cancel` it from any thread, before or after it runs."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._is_cancelled = False

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Ends the process, in the middle of whatever it does. The result is written whole or not at all."""
        with self._lock:
            self._is_cancelled = True
            if self._process is not None:
                self._process.kill()

    def run(self, *, report: Callable[[float], None]) -> None:
        """Starts the process and waits for its end.

        Args:
            report: Told what share is done.

        Raises:
            Cancelled: `cancel` was called.
            ComputationFailed: It ended without a result; the log has its last words.
        """
        words = Path(self._order.spool, f"{self._order.kind}.log")
        with words.open("w+b") as log:
            with self._lock:
                if self._is_cancelled:
                    raise Cancelled
                self._process = subprocess.Popen(
                    [sys.executable, "-m", _MODULE, self._order.as_json()],
                    stdin=subprocess.PIPE,  # held open: it ends when we do
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=_environment(self._order.threads),
                    start_new_session=True,  # Ctrl-C is for the service, which ends it in order
                )
            with self._process as process:
                assert process.stdout is not None
                for line in process.stdout:
                    report(float(line))
            if self._is_cancelled:
                raise Cancelled
            if process.returncode != 0:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
                logger.error("computing %s failed: %s", self._order.kind, log.read().decode(errors="replace"))
                raise ComputationFailed(_sentence(self._order.kind, process.returncode))


def _sentence(kind: Kind, status: int) -> str:
    if status < 0:
        return (
            f"computing {kind} was ended by the system (signal {-status}), perhaps because memory was short; "
            "it is tried again when asked for later"
        )
    return f"computing {kind} failed with status {status}; the service's log says why"


def _environment(threads: int) -> dict[str, str]:
    # The parent may have this package on its path by other means than the child would.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(threads),
        # Sums in another order round otherwise, and t-SNE makes another map of that: always one.
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
