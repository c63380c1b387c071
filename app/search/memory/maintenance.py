"""What is done in the background, so that searches stay fast: two threads for all collections of a directory.

    the quick one    adds new rows to IVFs, copies chunks with many dead rows, makes codes, writes files
    the builder      chooses lists anew and measures recall: seconds to minutes, one collection at a time

Neither keeps a search or a writer waiting for longer than it takes to put the new in place of the old. Each
leaves cores to the others.
"""

import contextlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import faiss

from app.search.memory.chunks import View
from app.search.memory.codes import ByteCodes
from app.search.memory.index import VectorIndex, copied, run_to_compact
from app.search.memory.ivf import Ivf, view_of
from app.search.memory.ivf_build import built, extended, refilled
from app.search.memory.ivf_file import read_ivf, remove_file, write_ivf
from app.search.memory.ivf_tuning import tuned
from app.search.memory.kmeans import GivenUp
from app.search.memory.snapshot import Snapshot

logger = logging.getLogger(__name__)

Writer: TypeAlias = Callable[[], contextlib.AbstractContextManager[None]]
SlowWork: TypeAlias = Literal["build", "refill", "tune"]

DIRECTORY_NAME = "derived"
IVF_MIN_ROWS = 20_000  # below, comparing all takes a millisecond
GROWTH_TO_REBUILD = 4.0
GROWTH_TO_TUNE = 1.5
DEAD_SHARE_TO_REFILL = 0.25
TAIL_ROWS = 2_048  # compared in full with each query: 0.1 ms
TAIL_SHARE = 1 / 64
UNSAVED_SHARE_TO_SAVE = 0.1
_PAUSE_S = 0.05  # between two looks at what was written: a commit need not wake anybody
_PAUSE_AFTER_FAILURE_S = 60.0


@dataclass(eq=False)
class _Watched:
    """A collection's index, and what is known of its file.

    Attributes:
        key: Names the collection, in its file too.
        saved: The IVF that the file has; None where there is no file.
        not_before_s: When to try again what failed, on the monotonic clock.
        is_forgotten: Whether the collection is gone.
    """

    index: VectorIndex
    path: Path
    key: str
    saved: Ivf | None = None
    not_before_s: float = 0.0
    is_forgotten: bool = False


class Maintenance:
    """The background of one data directory; `close` it before the store.

    Args:
        data_dir: The files are in a directory of it.
        writer: Keeps writers out for as long as its block lasts.
    """

    def __init__(self, data_dir: Path, writer: Writer) -> None:
        self._directory = data_dir / DIRECTORY_NAME
        self._writer = writer
        self._watched: dict[int, _Watched] = {}
        self._watched_lock = threading.Lock()
        self._file_lock = threading.Lock()
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._idle = threading.Event()
        self._quick = threading.Thread(target=self._run, name="search-maintenance", daemon=True)
        self._builder: threading.Thread | None = None

    def watch(self, cid: int, index: VectorIndex, *, key: str) -> None:
        """Takes care of an index from now on; its IVF is read, where its file is of these rows.

        Args:
            cid: The collection's number.
            index: Nobody writes to it yet.
            key: What no other collection has, whatever directory it is from.
        """
        watched = _Watched(index, self._directory / f"{cid}.ivf", key)
        watched.saved = read_ivf(watched.path, index.snapshot, key=key)
        if watched.saved is not None:
            index.publish(index.with_ivf(watched.saved))
        with self._watched_lock:
            self._watched[cid] = watched
        index.on_change = self._changed.set
        self._changed.set()

    def forget(self, cid: int) -> None:
        """Takes no more care of an index, and removes its file."""
        with self._watched_lock:
            watched = self._watched.pop(cid, None)
        if watched is not None:
            with self._file_lock:
                watched.is_forgotten = True
                remove_file(watched.path)

    def start(self) -> None:
        """Begins; files of collections that aren't watched by now, and unfinished ones, are removed."""
        known = {watched.path for watched in self._watched.values()}
        for path in [*self._directory.glob("*.ivf"), *self._directory.glob("*.new")]:
            if path not in known:
                remove_file(path)
        self._quick.start()

    def close(self) -> None:
        """Stops, and writes what is newer than its file: a second at a million rows. May be called twice."""
        self._stopped.set()
        self._changed.set()
        if self._quick.ident is not None:
            self._quick.join()
        if self._builder is not None:
            self._builder.join()
        for watched in self._all():
            self._guarded(watched, lambda one: self._save(one, least_share=0.0))

    def settle(self, *, timeout_s: float) -> bool:
        """Waits until there is nothing left to do; False where that takes longer than the timeout."""
        until = time.monotonic() + timeout_s
        while not (self._idle.is_set() and not self._changed.is_set()):
            if time.monotonic() > until:
                return False
            time.sleep(_PAUSE_S)
        return True

    def _all(self) -> list[_Watched]:
        with self._watched_lock:
            return list(self._watched.values())

    def _run(self) -> None:
        faiss.omp_set_num_threads(1)
        while not self._stopped.is_set():
            self._changed.wait(self._next_try_s())
            self._idle.clear()  # before the other: see `settle`
            self._changed.clear()
            for watched in self._all():
                self._guarded(watched, self._work_quickly)
            if not self._is_building():
                self._idle.set()
            self._stopped.wait(_PAUSE_S)

    def _next_try_s(self) -> float | None:
        """Until what failed is tried again; None where nothing did."""
        now_s = time.monotonic()
        waits = [one.not_before_s - now_s for one in self._all() if one.not_before_s > now_s]
        return min(waits, default=None)

    def _guarded(self, watched: _Watched, work: Callable[[_Watched], object]) -> None:
        """Lets no failure end the thread: the collection is searched as it is, and the work tried again."""
        try:
            if time.monotonic() >= watched.not_before_s:
                work(watched)
        except GivenUp:
            pass
        except Exception:
            watched.not_before_s = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            logger.exception("the search structure of %s could not be brought up to date", watched.key)

    # The quick work

    def _work_quickly(self, watched: _Watched) -> None:
        index = watched.index
        while not self._stopped.is_set():
            self._save(watched, least_share=UNSAVED_SHARE_TO_SAVE)
            snapshot = index.snapshot
            if run := run_to_compact(snapshot.views):
                self._compact(index, run)
            elif not index.can_code:
                return
            elif _wants_no_ivf(snapshot):
                self._drop_ivf(watched)
            elif _tail_is_long(snapshot):
                self._extend(index)
            elif not _made_codes(index):
                return

    def _compact(self, index: VectorIndex, run: tuple[View, ...]) -> None:
        copy = copied(run, is_last=run[-1].chunk is index.snapshot.views[-1].chunk)
        with self._writer():
            index.publish(index.compacted(run, copy))

    def _extend(self, index: VectorIndex) -> None:
        snapshot = index.snapshot
        assert snapshot.ivf is not None
        ivf = snapshot.ivf.ivf
        longer = extended(ivf, snapshot.views, start=snapshot.ivf.tail, stopped=self._stopped.is_set)
        with self._writer():
            now = index.snapshot.ivf
            if now is not None and now.ivf.index is ivf.index:  # the builder has made no other meanwhile
                index.publish(index.with_ivf(longer.retuned(now.ivf.settings, rows=now.ivf.tuned_rows)))

    def _drop_ivf(self, watched: _Watched) -> None:
        with self._writer():
            watched.index.publish(watched.index.with_ivf(None))
        with self._file_lock:
            watched.saved = None
            remove_file(watched.path)

    def _save(self, watched: _Watched, *, least_share: float) -> None:
        view = watched.index.snapshot.ivf
        with self._file_lock:
            if view is None or watched.is_forgotten or not _is_unsaved(view.ivf, watched.saved, least_share):
                return
            self._directory.mkdir(exist_ok=True)
            write_ivf(watched.path, view.ivf, key=watched.key)
            watched.saved = view.ivf

    # The slow work

    def _is_building(self) -> bool:
        """Whether the builder is at work, or has work to begin with now."""
        if self._builder is not None and self._builder.is_alive():
            return True
        for watched in self._all():
            if time.monotonic() >= watched.not_before_s and (work := _slow_work(watched.index)) is not None:
                self._builder = threading.Thread(
                    target=self._build, args=(watched, work), name="search-builder", daemon=True
                )
                self._builder.start()
                return True
        return False

    def _build(self, watched: _Watched, work: SlowWork) -> None:
        faiss.omp_set_num_threads(max(1, (os.cpu_count() or 1) // 4))
        began = time.perf_counter()
        self._guarded(watched, lambda one: self._work_slowly(one.index, work))
        view = watched.index.snapshot.ivf
        if view is not None and not self._stopped.is_set():
            recall = ", ".join(f"{s.recall:.3f} of {s.k}" for s in view.ivf.settings) or "too little"
            logger.info(
                "%s: %s of the search structure took %.1f s; %d rows, recall %s",
                watched.key, work, time.perf_counter() - began, len(view.ivf.rids), recall,
            )  # fmt: skip
        self._changed.set()

    def _work_slowly(self, index: VectorIndex, work: SlowWork) -> None:
        snapshot, stopped = index.snapshot, self._stopped.is_set
        before = snapshot.ivf
        if work == "tune":
            assert before is not None
            settings = tuned(before, snapshot.views, stopped=stopped)
            with self._writer():
                index.publish(index.with_settings(settings, rows=snapshot.indexed))
            return
        if work == "build" or before is None:
            ivf = built(snapshot.views, index.rotation, stopped=stopped)
        else:
            ivf = refilled(before.ivf, snapshot.views, stopped=stopped)
        view = view_of(ivf, snapshot.views)
        assert view is not None
        settings = tuned(view, snapshot.views, stopped=stopped)
        with self._writer():
            index.publish(index.with_ivf(ivf.retuned(settings, rows=len(ivf.rids))))


def _slow_work(index: VectorIndex) -> SlowWork | None:
    snapshot = index.snapshot
    if not index.can_code or snapshot.alive_count < IVF_MIN_ROWS:
        return None
    if snapshot.ivf is None or snapshot.alive_count >= GROWTH_TO_REBUILD * snapshot.ivf.ivf.trained_rows:
        return "build"
    ivf, indexed = snapshot.ivf.ivf, snapshot.indexed
    if snapshot.ivf.dead_count > DEAD_SHARE_TO_REFILL * len(ivf.rids):
        return "refill"
    if not ivf.tuned_rows / GROWTH_TO_TUNE < indexed < ivf.tuned_rows * GROWTH_TO_TUNE:
        return "tune"
    return None


def _wants_no_ivf(snapshot: Snapshot) -> bool:
    return snapshot.ivf is not None and snapshot.alive_count < IVF_MIN_ROWS // 2


def _tail_is_long(snapshot: Snapshot) -> bool:
    view = snapshot.ivf
    if view is None or not view.ivf.settings:
        return False
    number, row = view.tail
    parts = zip(snapshot.views[number:], itertools.chain([row], itertools.repeat(0)), strict=False)
    rows = sum(len(part.living_rows(start=start)) for part, start in parts)
    return rows >= max(TAIL_ROWS, TAIL_SHARE * len(view.ivf.rids))


def _made_codes(index: VectorIndex) -> bool:
    """Gives one full chunk codes that nothing else makes fast to search, and takes them from the others."""
    snapshot = index.snapshot
    covered = 0
    if snapshot.ivf is not None and snapshot.ivf.ivf.settings:
        number, row = snapshot.ivf.tail
        covered = number + (row > 0)
    for number, view in enumerate(snapshot.views):
        if number < covered:
            view.chunk.codes = None
        elif view.is_full and view.chunk.codes is None:
            view.chunk.codes = ByteCodes(view.chunk.vectors, index.rotation)
            return True
    return False


def _is_unsaved(ivf: Ivf, saved: Ivf | None, least_share: float) -> bool:
    if saved is None or saved.trained_rows != ivf.trained_rows:
        return True
    return saved is not ivf and abs(len(ivf.rids) - len(saved.rids)) >= least_share * len(saved.rids)
