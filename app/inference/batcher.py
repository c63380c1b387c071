"""Single entries in, batches to the device, outcomes out. Knows nothing of images.

One thread owns the device. Whenever the device can take a batch it gets what is ready; while it is busy,
entries gather. So one caller pays no added time, and batches grow by themselves as the load does. An idle
device waits in one case, and for milliseconds: see `Batcher.gather`. Interactive entries are launched before
bulk, see `LaneQueue`.

An entry ends in exactly one outcome: its row, the exception that it alone causes, `Dropped` or `DeviceLost`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from app.inference.lanes import LANES, Lane, LaneQueue
from app.inference.stats import Observer

logger = logging.getLogger(__name__)

_TRY_MORE_AFTER_S: Final = 60.0  # who took the device's memory may have given it back

Entry = TypeVar("Entry")
Row = TypeVar("Row")


class Dropped(Exception):
    """Nobody wants the entry any more; it was never launched."""


class DeviceLost(Exception):
    """The device thread is gone, or its device: no further entry will be launched."""


class OutOfRoom(Exception):
    """The device has no memory for a batch of this size now; smaller ones may fit."""


@dataclass(frozen=True, kw_only=True)
class BatcherConfig:
    """Sizes of the device's work.

    Attributes:
        max_batch: Entries of a launch, at most.
        in_flight: Batches that may be on the device at once; above 1 only where `launch` returns before the
            device has finished, else rows wait for the next batch's end.
        mixes_lanes: Whether one lane's entries fill the places that the other leaves in a batch: right where
            a larger batch takes hardly longer. Otherwise a batch is of one lane.
    """

    max_batch: int
    in_flight: int = 1
    mixes_lanes: bool = False

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.in_flight < 1:
            raise ValueError(
                f"max_batch ({self.max_batch}) and in_flight ({self.in_flight}) must be at least 1"
            )


@dataclass(eq=False)
class _Batch(Generic[Entry, Row]):
    entries: list[Entry]
    started_s: float
    collect: Callable[[], Sequence[Row]] | None = None
    error: Exception | None = None


class Batcher(Generic[Entry, Row]):
    """Feeds a device from one thread.

    Args:
        launch: Starts the device on some entries and returns what waits for their rows, in the entries'
            order. Either may raise; the batch is then halved until the guilty entries are alone. `OutOfRoom`
            makes the batches after it smaller, too, for a while. `DeviceLost` ends the thread.
        wanted: Whether anybody still waits for the entry; asked once, right before its launch. After False
            the entry is settled as `Dropped`.
        settle: Takes the outcomes of some entries, one call per batch. Must not raise.
        lane_of: The entry's lane; asked under a lock, so it must be quick. May change: see `promote`.
        config: Sizes.
        observer: Hears batch size, waits and busy seconds.
    """

    def __init__(
        self,
        launch: Callable[[list[Entry]], Callable[[], Sequence[Row]]],
        *,
        wanted: Callable[[Entry], bool],
        settle: Callable[[list[Entry], list[Row | Exception]], None],
        lane_of: Callable[[Entry], Lane] = lambda _: "interactive",
        config: BatcherConfig,
        observer: Observer,
    ) -> None:
        self._launch = launch
        self._wanted = wanted
        self._settle = settle
        self._lane_of = lane_of
        self._config = config
        self._observer = observer
        self._changed = threading.Condition()
        self._ready: LaneQueue[tuple[Entry, float]] = LaneQueue()
        # An entry is always in one of four, so that a death finds it: ready, judged, forming, in flight.
        self._judged: deque[tuple[Entry, float]] = deque()
        self._forming: list[Entry] = []
        self._in_flight: deque[_Batch[Entry, Row]] = deque()
        self._closing = False
        self._dead = False
        self._started = threading.Event()
        self._start_error: BaseException | None = None
        self._last_finish_s = 0.0
        self._most = self._room = config.max_batch
        self._room_since_s = 0.0
        self._gather_s = 0.0
        self._more_comes: Callable[[Lane], bool] = lambda _: False
        self._gathering: Lane | None = None
        self._thread: threading.Thread | None = None

    def start(self, set_up: Callable[[], None]) -> None:
        """Starts the device thread and waits until `set_up` has run on it.

        Raises:
            Exception: What `set_up` raised; the batcher is then dead.
        """
        self._thread = threading.Thread(target=self._main, args=(set_up,), name="dino-device", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    def limit(self, max_batch: int) -> None:
        """Makes launches smaller than the config says, for good; called by `set_up`."""
        self._most = self._room = max_batch

    def gather(self, longest_s: float, more_comes: Callable[[Lane], bool]) -> None:
        """Lets an idle device wait for entries that are about to be ready; called by `set_up`.

        For launches that cost more than what is in them, on a device that shares its cores with those who
        make the entries: a launch of one then takes the time in which the next entry would be made.

        Args:
            longest_s: That the first entry waits.
            more_comes: Whether entries of a lane are on their way; asked under a lock, so it must be quick.
        """
        self._gather_s, self._more_comes = longest_s, more_comes

    def put(self, entry: Entry) -> None:
        """Makes an entry ready for the next launch, from any thread; if dead, settles it as `DeviceLost`."""
        with self._changed:
            if not self._dead:
                self._ready.put((entry, time.monotonic()), self._lane_of(entry))
                if not self._should_gather(self._gathering):  # else it would wake up to wait on
                    self._changed.notify()
                return
        self._settle([entry], [DeviceLost()])

    def promote(self) -> None:
        """Puts entries whose lane has become the interactive one among those, from any thread."""
        with self._changed:
            self._ready.promote(lambda waiting: self._lane_of(waiting[0]) == "interactive")

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Ends the thread and waits for it.

        Args:
            drain: Launch what is ready; otherwise settle it as `DeviceLost`.
            timeout_s: Leave a thread behind that hangs in its device for longer.
        """
        with self._changed:
            self._closing = True
            left = [] if drain else [entry for entry, _ in self._ready.clear()]
            self._changed.notify()
        if left:
            self._settle(left, [DeviceLost() for _ in left])
        if self._thread is not None:
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the device thread runs."""
        return not self._dead and self._thread is not None and self._thread.is_alive()

    @property
    def depth(self) -> int:
        """Entries that are ready and not launched."""
        return len(self._ready)

    @property
    def room(self) -> int:
        """Entries of a launch, at most, as the device's memory is now."""
        return self._room

    @property
    def batches_in_flight(self) -> int:
        """Batches on the device."""
        return len(self._in_flight)

    def busy_for_s(self) -> float:
        """How long the oldest batch has been on the device; 0 where there is none."""
        try:
            return time.monotonic() - self._in_flight[0].started_s
        except IndexError:
            return 0.0

    def _main(self, set_up: Callable[[], None]) -> None:
        try:
            set_up()
            self._started.set()
            self._run()
        except BaseException as error:
            # The thread ends in any case; what counts is that callers hear of it and `alive` turns False.
            if self._started.is_set():
                logger.exception("the device thread died; the service must be restarted")
            else:
                self._start_error = error
        finally:
            self._bury()
            self._started.set()

    def _run(self) -> None:
        while True:
            entries = self._take(wait=not self._in_flight)
            if entries:
                self._start_batch(entries)
            elif not self._in_flight:
                return
            if not entries or len(self._in_flight) >= self._config.in_flight:
                self._finish_batch(self._in_flight[0])

    def _take(self, *, wait: bool) -> list[Entry]:
        """Up to a batch of wanted entries; none if none is ready or, when waiting, if it is time to end."""
        forming = self._forming
        lane: Lane | None = None
        if self._room < self._most and time.monotonic() > self._room_since_s + _TRY_MORE_AFTER_S:
            self._set_room(min(2 * self._room, self._most))
        while len(forming) < self._room:
            if not forming:
                lane = self._turn(wait=wait)
            if lane is None:
                break
            self._pop(lane, self._room - len(forming))
            if not self._judged:
                break
            now_s = time.monotonic()
            while self._judged:
                entry, ready_s = self._judged[0]
                wanted = self._wanted(entry)
                self._judged.popleft()
                if wanted:
                    forming.append(entry)
                    self._observer.observe("queue_wait_seconds", now_s - ready_s)
                else:
                    # Now, not with the batch: it may hold what the next entry needs to become ready.
                    self._settle([entry], [Dropped()])
        return forming

    def _turn(self, *, wait: bool) -> Lane | None:
        """The lane that the next batch is of."""
        with self._changed:
            while wait and not self._ready and not self._closing:
                self._changed.wait()
            if wait and self._gather_s:
                self._gather()
            return self._ready.turn()

    def _gather(self) -> None:
        until_s = time.monotonic() + self._gather_s
        lane: Lane = "interactive" if self._ready.waiting("interactive") else "bulk"
        while self._should_gather(lane) and (left_s := until_s - time.monotonic()) > 0:
            self._gathering = lane
            self._changed.wait(left_s)
        self._gathering = None

    def _should_gather(self, lane: Lane | None) -> bool:
        if lane is None or self._closing or len(self._ready) >= self._room:
            return False
        if lane == "bulk" and self._ready.waiting("interactive"):
            return False
        return self._more_comes(lane)

    def _pop(self, first: Lane, count: int) -> None:
        """Moves up to `count` ready entries to the judged: of the lane, and of the other where lanes mix."""
        with self._changed:
            lanes = [first, *(lane for lane in LANES if lane != first and self._config.mixes_lanes)]
            for lane in lanes:
                for _ in range(min(count - len(self._judged), self._ready.waiting(lane))):
                    self._judged.append(self._ready.pop(lane))

    def _start_batch(self, entries: list[Entry]) -> None:
        batch: _Batch[Entry, Row] = _Batch(entries, time.monotonic())
        self._in_flight.append(batch)
        self._forming = []
        self._observer.observe("batch_size", len(entries))
        try:
            batch.collect = self._launch(entries)
        except DeviceLost:
            raise
        except Exception as error:
            batch.error = error

    def _finish_batch(self, batch: _Batch[Entry, Row]) -> None:
        outcomes = self._outcomes(batch)
        now_s = time.monotonic()
        self._observer.observe("forward_seconds", now_s - batch.started_s)
        # Batches overlap when several are in flight; busy is the time with at least one.
        self._observer.count("device_busy_seconds_total", now_s - max(batch.started_s, self._last_finish_s))
        self._last_finish_s = now_s
        self._in_flight.popleft()
        self._settle(batch.entries, outcomes)

    def _outcomes(self, batch: _Batch[Entry, Row]) -> list[Row | Exception]:
        error = batch.error
        if batch.collect is not None:
            try:
                return _checked(batch.collect(), len(batch.entries))
            except DeviceLost:
                raise
            except Exception as collect_error:
                error = collect_error
        assert error is not None
        if isinstance(error, OutOfRoom):
            self._make_smaller(len(batch.entries))
        else:
            logger.warning("a batch of %d failed; looking for the guilty", len(batch.entries), exc_info=error)
        return self._parts(batch.entries, error)

    def _parts(self, entries: list[Entry], error: Exception) -> list[Row | Exception]:
        """Outcomes of entries that failed together: by halves, or as many at once as there is room for."""
        if len(entries) == 1:
            return [error]
        largest = size_below(len(entries)) if isinstance(error, OutOfRoom) else len(entries) // 2
        outcomes: list[Row | Exception] = []
        while len(outcomes) < len(entries):
            # The room may become smaller on the way.
            part = entries[len(outcomes) :][: min(largest, self._room)]
            try:
                outcomes += _checked(self._launch(part)(), len(part))
            except DeviceLost:
                raise
            except Exception as part_error:
                if isinstance(part_error, OutOfRoom):
                    self._make_smaller(len(part))
                outcomes += self._parts(part, part_error)
        return outcomes

    def _make_smaller(self, failed: int) -> None:
        room = max(1, min(self._room, size_below(failed)))
        logger.warning("a batch of %d found no room on the device: at most %d go from now", failed, room)
        self._set_room(room)

    def _set_room(self, room: int) -> None:
        self._room = room
        self._room_since_s = time.monotonic()

    def _bury(self) -> None:
        with self._changed:
            self._dead = True
            left = [entry for batch in self._in_flight for entry in batch.entries]
            left += [*self._forming, *(entry for entry, _ in (*self._judged, *self._ready.clear()))]
            self._in_flight.clear()
        if left:
            self._settle(left, [DeviceLost() for _ in left])


def size_below(size: int) -> int:
    """The largest power of two below a size, which is the next smaller size that is warmed up; 0 below 1."""
    return 1 << (size - 1).bit_length() >> 1 if size > 1 else 0


def _checked(rows: Sequence[Row], count: int) -> list[Row | Exception]:
    """The rows, if there is one for each entry: with one too few, a caller would get another's."""
    if len(rows) != count:
        raise ValueError(f"the device returned {len(rows)} rows for {count} entries")
    return list(rows)
