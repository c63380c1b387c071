"""Reading a collection as a whole: its map, its duplicates and its clusters, computed beside the service.

    look            answers at once: the newest result there is, whether the collection was written to since,
                    and how far the next one is
    one thread      copies the items of one collection after the other to files (`reading_spool`)
    one process     computes with them (`reading_work`, `reading_process`), at the lowest claim to the machine
    a folder        keeps results (`reading_file`), so that a restart computes nothing again

Nothing is computed that nobody asks for. A result belongs to a collection (its name, its model, when it was
made) and to the `seq` it was read at. Equal: it is fresh. Otherwise it is stale: given, and computed again,
but not so often that a collection that is being filled keeps a core busy for ever.
"""

import contextlib
import logging
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.errors import ComputationFailed, Overloaded, ServiceError, StorageError, UnknownCollection
from app.search.collection import Catalogue, Collection
from app.search.reading.file import DamagedReading, Ids, Kept, read_kept
from app.search.reading.spool import write_spool
from app.search.reading.work import Cancelled, Kind, Order, Work

MAX_CLUSTERS: Final = 1_000  # that can be asked for
MAX_WAITING: Final = 32  # computations that wait for the one that runs
MAX_CLUSTERINGS: Final = 8  # of one collection that are kept, beside the one of our own choice

_MIN_PAUSE_S: Final = 2.0
_PAUSE_PER_DURATION: Final = 2.0  # at most a third of the time is spent on a collection that never rests
_PAUSE_AFTER_FAILURE_S: Final = 60.0
_SPOOL_SHARE: Final = 0.25  # of the progress
_SPOOL: Final = "spool"
_ENDING: Final = ".reading"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for.

    Attributes:
        kind: Of the computation.
        clusters: How many; None for a number by the collection's size, and for other kinds.
    """

    kind: Kind
    clusters: int | None = None

    @property
    def file_name(self) -> str:
        """Of what is kept."""
        return f"{self.kind}{'' if self.clusters is None else f'-{self.clusters}'}{_ENDING}"


@dataclass(frozen=True, eq=False)
class Result:
    """What was computed; equal only to itself.

    Attributes:
        kept: Arrays by name; which, the module that computes them says.
        ids: Of the items, in order; the arrays' rows are theirs.
        seq: The collection's, when it was read.
        items: How many there were.
        computed_at: In seconds since 1970.
    """

    kept: Kept
    ids: Ids
    seq: int
    items: int
    computed_at: float


@dataclass(frozen=True)
class Look:
    """How things stand.

    Attributes:
        result: The newest there is, or None.
        is_stale: Whether the collection was written to since.
        progress: What share of the next one is done; None where none is computed.
        retry_after_s: When to look again.
    """

    result: Result | None
    is_stale: bool
    progress: float | None
    retry_after_s: float


@dataclass(frozen=True)
class _Identity:
    """Which collection, in which state; a collection that is dropped and made again is another."""

    created_at: float
    fingerprint: str
    dimensions: int
    seq: int

    def is_of(self, facts: Mapping[str, Any]) -> bool:
        return bool(
            (self.created_at, self.fingerprint, self.dimensions)
            == (facts["created_at"], facts["fingerprint"], facts["dimensions"])
        )


@dataclass
class _Slot:
    """What is known of one thing that was asked for."""

    result: Result | None = None
    is_read: bool = False
    job: "_Job | None" = None
    error: ServiceError | None = None
    not_before_s: float = 0.0


@dataclass
class _Job:
    name: str
    wanted: Wanted
    progress: float = 0.0
    started_s: float | None = None
    work: Work | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)


class ReadingJobs:
    """What is computed and kept of all collections. Safe to use from many threads; `close` it."""

    def __init__(self, catalogue: Catalogue, *, folder: Path | None, threads: int = 1) -> None:
        """Starts nothing yet.

        Args:
            catalogue: Whose collections are read.
            folder: Where results are kept, by this process alone; made when needed. None keeps them until
                `close`.
            threads: That a computation may keep busy.
        """
        self._catalogue = catalogue
        self._is_temporary = folder is None
        self._folder = folder or Path(tempfile.mkdtemp(prefix="dinoserve-reading-"))
        self._threads = threads
        self._lock = threading.Lock()
        self._slots: dict[tuple[str, Wanted], _Slot] = {}
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._spooled: tuple[str, _Identity] | None = None
        shutil.rmtree(self._folder / _SPOOL, ignore_errors=True)  # of a process that was killed

    def look(self, name: str, wanted: Wanted) -> Look:
        """The newest result, and has a newer one computed where the collection was written to since.

        Args:
            name: Of a collection, or an alias.
            wanted: What of it.

        Raises:
            UnknownCollection: There is none of the name.
            Overloaded: Too much waits to be computed already.
            ServiceError: It could not be computed, and there is nothing older; it is tried again later.
        """
        collection = self._catalogue.get(name)
        identity = self._identity(collection)
        with self._lock:
            slot = self._slots.setdefault((collection.name, wanted), _Slot())
            if not slot.is_read:
                slot.result, slot.is_read = self._read(collection.name, wanted), True
            if slot.result is not None and not identity.is_of(slot.result.kept.facts):
                slot.result = None
            is_stale = slot.result is None or slot.result.seq != identity.seq
            if is_stale and slot.job is None and time.monotonic() >= slot.not_before_s:
                with contextlib.nullcontext() if slot.result is None else contextlib.suppress(Overloaded):
                    slot.job = self._enqueued(_Job(collection.name, wanted))
                    slot.error = None
            if slot.result is None and slot.error is not None:
                raise slot.error
            progress = None if slot.job is None else slot.job.progress
            return Look(slot.result, is_stale, progress, _remaining_s(slot))

    def forget(self, name: str, wanted: Wanted) -> None:
        """Stops computing it, and deletes what was kept.

        Raises:
            UnknownCollection: There is none of the name.
        """
        name = self._catalogue.get(name).name
        with self._lock:
            slot = self._slots.pop((name, wanted), None)
            if slot is not None and slot.job is not None:
                _cancel(slot.job)
            (self._folder / name / wanted.file_name).unlink(missing_ok=True)

    def close(self) -> None:
        """Stops computing, in the middle of whatever it is, and waits until it has stopped."""
        with self._lock:
            self._is_closed = True
            for slot in self._slots.values():
                if slot.job is not None:
                    _cancel(slot.job)
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._folder if self._is_temporary else self._folder / _SPOOL, ignore_errors=True)

    def _identity(self, collection: Collection) -> _Identity:
        seq = collection.seq  # first: what is written after it makes the result stale
        for info in self._catalogue.list():
            if info.name == collection.name:
                return _Identity(info.created_at, info.fingerprint, info.dimensions, seq)
        raise UnknownCollection(f"the collection {collection.name!r} was deleted")

    def _read(self, name: str, wanted: Wanted) -> Result | None:
        try:
            kept = read_kept(self._folder / name / wanted.file_name)
            return None if kept is None else _result(kept)
        except (DamagedReading, KeyError) as error:
            logger.warning(
                "%s of collection %r: the file is damaged, and computed again: %s", wanted.kind, name, error
            )
            return None

    def _enqueued(self, job: _Job) -> _Job:
        """Puts a job behind the others; hold the lock."""
        if self._is_closed:
            raise Overloaded("the service is stopping", retry_after_s=5.0, reason="readings")
        if sum(slot.job is not None for slot in self._slots.values()) >= MAX_WAITING:
            raise Overloaded(
                f"{MAX_WAITING} computations wait already; look again when some of them are done",
                retry_after_s=10.0,
                reason="readings",
            )
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve_queue, name="dino-reading", daemon=True)
            self._thread.start()
        self._queue.put(job)
        return job

    def _serve_queue(self) -> None:
        while (job := self._queue.get()) is not None:
            if not (self._is_closed or job.cancelled.is_set()):
                self._finish(job)
            if self._queue.empty():
                self._forget_spool()

    def _finish(self, job: _Job) -> None:
        job.started_s = time.monotonic()
        result, error = None, None
        try:
            result = self._computed(job)
            self._prune(job.name)
        except Cancelled:
            pass
        except ServiceError as refused:
            error = refused
        except OSError as failed:
            error = StorageError(
                f"{job.wanted.kind} could not be kept: {failed.strerror or type(failed).__name__}"
            )
        except Exception:
            # Whatever it is, the next computation deserves this thread.
            logger.exception("computing %s of collection %r failed", job.wanted.kind, job.name)
            error = ComputationFailed(f"computing {job.wanted.kind} failed; the service's log says why")
        now_s = time.monotonic()
        with self._lock:
            slot = self._slots.get((job.name, job.wanted))
            if slot is None or slot.job is not job:
                return
            slot.job, slot.error = None, error
            if result is not None:
                slot.result = result
                slot.not_before_s = now_s + max(_MIN_PAUSE_S, _PAUSE_PER_DURATION * (now_s - job.started_s))
            elif error is not None:
                slot.not_before_s = now_s + _PAUSE_AFTER_FAILURE_S

    def _computed(self, job: _Job) -> Result:
        collection = self._catalogue.get(job.name)
        identity = self._identity(collection)
        before = self._spool(job, collection, identity)
        folder = self._folder / job.name
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / job.wanted.file_name
        # Beside, so that what was cancelled in its last moment takes nobody's place.
        new = self._folder / _SPOOL / "result"
        job.work = Work(
            Order(
                kind=job.wanted.kind,
                clusters=job.wanted.clusters,
                dimensions=identity.dimensions,
                spool=str(self._folder / _SPOOL),
                previous=self._previous(job, identity),
                result=str(new),
                facts={**vars(identity), "computed_at": time.time()},
                threads=self._threads,
            )
        )
        if job.cancelled.is_set():
            raise Cancelled

        def report(share: float) -> None:
            job.progress = before + (1 - before) * share

        job.work.run(report=report)
        with self._lock:
            if job.cancelled.is_set():
                raise Cancelled
            new.replace(path)
        kept = read_kept(path)
        if kept is None:
            raise ComputationFailed(f"the result of computing {job.wanted.kind} vanished; it is tried again")
        return _result(kept)

    def _previous(self, job: _Job, identity: _Identity) -> str | None:
        """The map before, which the next goes on with."""
        with self._lock:
            slot = self._slots.get((job.name, job.wanted))
            result = None if slot is None else slot.result
        if job.wanted.kind != "map" or result is None or not identity.is_of(result.kept.facts):
            return None
        return str(self._folder / job.name / job.wanted.file_name)

    def _spool(self, job: _Job, collection: Collection, identity: _Identity) -> float:
        """Copies the items, unless the last job's copy is of the same state.

        Returns:
            The share of the progress that it is.
        """
        if self._spooled == (job.name, identity):
            return 0.0
        self._forget_spool()
        folder = self._folder / _SPOOL
        folder.mkdir(parents=True)

        def report(share: float) -> None:
            job.progress = _SPOOL_SHARE * share

        write_spool(collection, folder, report=report, is_cancelled=job.cancelled.is_set)
        if job.cancelled.is_set():
            raise Cancelled
        self._spooled = job.name, identity
        return _SPOOL_SHARE

    def _forget_spool(self) -> None:
        self._spooled = None
        shutil.rmtree(self._folder / _SPOOL, ignore_errors=True)

    def _prune(self, name: str) -> None:
        """Deletes what was kept of collections that are gone, and clusterings that are one too many."""
        names = {info.name for info in self._catalogue.list()}
        for folder in self._folder.iterdir():
            if folder.is_dir() and folder.name not in {*names, _SPOOL}:
                shutil.rmtree(folder, ignore_errors=True)
        clusterings = sorted(
            (self._folder / name).glob(f"clusters-*{_ENDING}"), key=lambda path: path.stat().st_mtime
        )
        surplus = {path.name for path in clusterings[:-MAX_CLUSTERINGS]}
        for file_name in surplus:
            (self._folder / name / file_name).unlink(missing_ok=True)
        with self._lock:
            for known, wanted in list(self._slots):
                slot = self._slots[known, wanted]
                is_surplus = known == name and wanted.file_name in surplus
                if slot.job is None and (is_surplus or known not in names):
                    del self._slots[known, wanted]


def _result(kept: Kept) -> Result:
    facts = kept.facts
    return Result(
        kept=kept,
        ids=Ids(kept.arrays["ids"], kept.arrays["id_ends"]),
        seq=facts["seq"],
        items=facts["items"],
        computed_at=facts["computed_at"],
    )


def _cancel(job: _Job) -> None:
    job.cancelled.set()
    if job.work is not None:
        job.work.cancel()


def _remaining_s(slot: _Slot) -> float:
    """When to look again, by how far it came."""
    job = slot.job
    if job is None:
        return max(1.0, slot.not_before_s - time.monotonic())
    if job.started_s is None or job.progress < 0.05:
        return 1.0
    passed_s = time.monotonic() - job.started_s
    return min(30.0, max(1.0, passed_s / job.progress * (1 - job.progress)))
