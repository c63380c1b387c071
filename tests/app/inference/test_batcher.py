import threading
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.inference.batcher import Batcher, BatcherConfig, DeviceLost, Dropped, OutOfRoom, size_below
from app.inference.lanes import TURNS_PER_BULK, Lane
from app.inference.stats import EngineStats

Outcome = str | Exception


class Desk:
    """A device that doubles numbers, and a desk where the outcomes are handed in."""

    def __init__(self, *, max_batch: int = 4, in_flight: int = 1, mixes_lanes: bool = False) -> None:
        self.free = threading.Event()  # cleared: the device is busy
        self.free.set()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []
        self.calls: list[int] = []  # entries of each call of settle
        self.outcomes: dict[int, list[Outcome]] = {}
        self.gone: set[int] = set()
        self.guilty: set[int] = set()
        self.guilty_when_collected: set[int] = set()
        self.deadly: set[int] = set()
        self.memory = 1_000  # entries that it has room for
        self.refused: list[int] = []  # sizes that it had no room for
        self.bulk: set[int] = set()
        self.stats = EngineStats()
        self.batcher: Batcher[int, str] = Batcher(
            self._launch,
            wanted=lambda entry: entry not in self.gone,
            settle=self._settle,
            lane_of=self.lane_of,
            config=BatcherConfig(max_batch=max_batch, in_flight=in_flight, mixes_lanes=mixes_lanes),
            observer=self.stats,
        )

    def __enter__(self) -> "Desk":
        self.batcher.start(lambda: None)
        return self

    def __exit__(self, *_: object) -> None:
        self.free.set()
        self.batcher.close(timeout_s=20)

    def lane_of(self, entry: int) -> Lane:
        return "bulk" if entry in self.bulk else "interactive"

    def _launch(self, entries: list[int]) -> Callable[[], Sequence[str]]:
        self.entered.set()
        assert self.free.wait(timeout=20)
        if len(entries) > self.memory:
            self.refused.append(len(entries))
            raise OutOfRoom
        self.batches.append(entries)
        if self.deadly & set(entries):
            raise DeviceLost
        if bad := self.guilty & set(entries):
            raise ValueError(f"bad: {sorted(bad)}")

        def collect() -> list[str]:
            if bad := self.guilty_when_collected & set(entries):
                raise ValueError(f"bad: {sorted(bad)}")
            return [row_of(entry) for entry in entries]

        return collect

    def _settle(self, entries: list[int], outcomes: list[Outcome]) -> None:
        self.calls.append(len(entries))
        for entry, outcome in zip(entries, outcomes, strict=True):
            self.outcomes.setdefault(entry, []).append(outcome)

    def busy_with(self, entry: int) -> None:
        """Puts an entry and leaves the device in the middle of its launch."""
        self.free.clear()
        self.entered.clear()
        self.batcher.put(entry)
        assert self.entered.wait(timeout=20)


def row_of(entry: int) -> str:
    return f"row of {entry}"


def names(outcomes: dict[int, list[Outcome]]) -> dict[int, list[str]]:
    """Outcomes with exceptions as their class's names, so that they compare."""
    return {
        entry: [outcome if isinstance(outcome, str) else type(outcome).__name__ for outcome in each]
        for entry, each in outcomes.items()
    }


def test_each_entry_gets_its_own_row() -> None:
    with Desk() as desk:
        for entry in range(50):
            desk.batcher.put(entry)
    assert desk.outcomes == {entry: [row_of(entry)] for entry in range(50)}


def test_what_gathers_while_the_device_is_busy_goes_together_and_never_above_the_largest_batch() -> None:
    with Desk(max_batch=4) as desk:
        desk.busy_with(0)
        for entry in range(1, 7):
            desk.batcher.put(entry)
    assert desk.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_batch_is_settled_in_one_call() -> None:
    with Desk(max_batch=4) as desk:
        desk.busy_with(0)
        for entry in range(1, 5):
            desk.batcher.put(entry)
    assert desk.calls == [1, 4]


def test_an_idle_device_starts_at_once_on_a_single_entry() -> None:
    with Desk(max_batch=64) as desk:
        desk.batcher.put(7)
        wait_until(lambda: 7 in desk.outcomes)
    assert desk.batches == [[7]]


class Gathering(Desk):
    """A device for which entries may be on their way."""

    def __init__(self, *, longest_s: float) -> None:
        super().__init__()
        self.longest_s = longest_s
        self.coming: set[Lane] = set()

    def __enter__(self) -> "Gathering":
        self.batcher.start(lambda: self.batcher.gather(self.longest_s, lambda lane: lane in self.coming))
        return self


def test_a_device_that_gathers_waits_for_what_is_on_its_way_until_its_batch_is_full() -> None:
    with Gathering(longest_s=20) as desk:
        desk.coming = {"interactive"}
        for entry in range(4):
            assert not desk.batches
            desk.batcher.put(entry)
        wait_until(lambda: len(desk.outcomes) == 4)
    assert desk.batches == [[0, 1, 2, 3]]


def test_a_device_that_gathers_starts_at_once_where_nothing_is_on_its_way() -> None:
    with Gathering(longest_s=20) as desk:
        desk.batcher.put(1)
        wait_until(lambda: len(desk.outcomes) == 1)
        desk.coming = {"interactive"}
        desk.batcher.put(2)
        wait_until(lambda: desk.batcher._gathering is not None)
        desk.coming = set()
        desk.batcher.put(3)  # the last of those that were on their way
        wait_until(lambda: len(desk.outcomes) == 3)
    assert desk.batches == [[1], [2, 3]]


def test_a_device_gathers_no_longer_than_it_was_told() -> None:
    with Gathering(longest_s=0.05) as desk:
        desk.coming = {"interactive"}
        desk.batcher.put(1)
        wait_until(lambda: len(desk.outcomes) == 1)
    assert desk.batches == [[1]]


def test_an_interactive_entry_is_not_kept_waiting_for_bulk_on_its_way() -> None:
    with Gathering(longest_s=20) as desk:
        desk.coming, desk.bulk = {"bulk"}, {1}
        desk.batcher.put(1)
        wait_until(lambda: desk.batcher._gathering is not None)
        desk.batcher.put(2)
        wait_until(lambda: bool(desk.outcomes))
        desk.coming = set()
    assert desk.batches[0] == [2]


def test_closing_ends_the_gathering() -> None:
    with Gathering(longest_s=60) as desk:
        desk.coming = {"interactive"}
        desk.batcher.put(1)
    assert desk.batches == [[1]]


def test_interactive_entries_are_launched_before_bulk_and_a_batch_is_of_one_lane() -> None:
    with Desk(max_batch=4) as desk:
        desk.bulk = {1, 2, 3, 4, 5}
        desk.busy_with(0)
        for entry in range(1, 8):
            desk.batcher.put(entry)
    assert desk.batches == [[0], [6, 7], [1, 2, 3, 4], [5]]


def test_where_lanes_mix_bulk_fills_the_places_that_interactive_entries_leave() -> None:
    with Desk(max_batch=4, mixes_lanes=True) as desk:
        desk.bulk = {1, 2, 3, 4, 5}
        desk.busy_with(0)
        for entry in range(1, 8):
            desk.batcher.put(entry)
    assert desk.batches == [[0], [6, 7, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("mixes_lanes", [True, False])
def test_under_interactive_load_every_eighth_batch_is_bulks(mixes_lanes: bool) -> None:
    with Desk(max_batch=2, mixes_lanes=mixes_lanes) as desk:
        desk.bulk = set(range(100, 106))
        desk.busy_with(0)
        for entry in [*range(1, 49), *desk.bulk]:
            desk.batcher.put(entry)
    of_bulk = [number for number, batch in enumerate(desk.batches[1:]) if set(batch) & desk.bulk]
    assert of_bulk == [TURNS_PER_BULK - 1, 2 * TURNS_PER_BULK - 1, 3 * TURNS_PER_BULK - 1]


def test_an_entry_that_becomes_urgent_overtakes_the_rest_of_bulk() -> None:
    with Desk(max_batch=2) as desk:
        desk.bulk = {1, 2, 3, 4}
        desk.busy_with(0)
        for entry in (1, 2, 3, 4, 5):
            desk.batcher.put(entry)
        desk.bulk.remove(4)
        desk.batcher.promote()
    assert desk.batches == [[0], [5, 4], [1, 2], [3]]


def test_an_entry_that_nobody_wants_is_never_launched_and_its_place_is_taken_by_the_next() -> None:
    with Desk(max_batch=4) as desk:
        desk.busy_with(0)
        for entry in range(1, 7):
            desk.batcher.put(entry)
        desk.gone = {2, 3}
    assert desk.batches == [[0], [1, 4, 5, 6]]
    assert names(desk.outcomes)[2] == names(desk.outcomes)[3] == ["Dropped"]


def test_unwanted_entries_are_settled_though_nothing_else_is_ready() -> None:
    # They hold slots that the next entries need to become ready: settled late, nothing would ever move again.
    with Desk() as desk:
        desk.gone = {1}
        desk.batcher.put(1)
        wait_until(lambda: 1 in desk.outcomes)
        assert names(desk.outcomes) == {1: ["Dropped"]}
        assert desk.batcher.alive


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("when", ["launched", "collected"])
def test_the_guilty_entry_gets_its_exception_and_its_neighbours_their_rows(when: str, in_flight: int) -> None:
    with Desk(max_batch=8, in_flight=in_flight) as desk:
        (desk.guilty if when == "launched" else desk.guilty_when_collected).update({3, 6})
        desk.busy_with(0)
        for entry in range(1, 9):
            desk.batcher.put(entry)
    for entry in range(9):
        (outcome,) = desk.outcomes[entry]
        if entry in {3, 6}:
            assert isinstance(outcome, ValueError)
            assert str(outcome) == f"bad: [{entry}]"
        else:
            assert outcome == row_of(entry)


def test_a_batch_without_room_goes_in_smaller_ones_and_so_do_those_after_it() -> None:
    with Desk(max_batch=16) as desk:
        desk.memory = 5
        desk.busy_with(0)
        for entry in range(1, 33):
            desk.batcher.put(entry)
        desk.free.set()
        wait_until(lambda: len(desk.outcomes) == 33)
        assert desk.batcher.room == 4
    assert desk.outcomes == {entry: [row_of(entry)] for entry in range(33)}
    assert desk.refused == [16, 8], "what does not fit is not tried again and again"
    assert {len(batch) for batch in desk.batches[1:]} == {4}


def test_after_a_while_more_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.inference.batcher._TRY_MORE_AFTER_S", 0.0)
    with Desk(max_batch=8) as desk:
        desk.memory = 2
        desk.busy_with(0)
        for entry in range(1, 9):
            desk.batcher.put(entry)
        desk.free.set()
        wait_until(lambda: len(desk.outcomes) == 9)
        desk.memory = 8
        for first in (10, 20, 30):
            desk.busy_with(first)
            for entry in range(first + 1, first + 9):
                desk.batcher.put(entry)
            desk.free.set()
            wait_until(lambda: desk.batcher.depth == 0 and desk.batcher.busy_for_s() == 0)
    assert max(len(batch) for batch in desk.batches) == 8
    assert all(len(outcomes) == 1 for outcomes in desk.outcomes.values())


def test_an_entry_that_finds_no_room_by_itself_fails_alone_and_the_thread_goes_on() -> None:
    with Desk(max_batch=4) as desk:
        desk.memory = 0
        desk.batcher.put(1)
        wait_until(lambda: 1 in desk.outcomes)
        desk.memory = 4
        desk.batcher.put(2)
    assert names(desk.outcomes) == {1: ["OutOfRoom"], 2: [row_of(2)]}


def test_the_size_below_is_the_next_that_is_warmed_up() -> None:
    assert [size_below(size) for size in (1, 2, 3, 4, 5, 33, 48, 64)] == [0, 1, 2, 2, 4, 32, 32, 32]


def test_a_device_that_returns_too_few_rows_gives_nobody_anothers() -> None:
    stats = EngineStats()
    outcomes: dict[int, Outcome] = {}
    batcher: Batcher[int, str] = Batcher(
        lambda entries: lambda: [row_of(entry) for entry in entries][: max(1, len(entries) - 1)],
        wanted=lambda _: True,
        settle=lambda entries, given: outcomes.update(zip(entries, given, strict=True)),
        config=BatcherConfig(max_batch=4),
        observer=stats,
    )
    batcher.put(1)
    batcher.put(2)
    batcher.put(3)
    batcher.start(lambda: None)
    batcher.close(timeout_s=20)
    assert outcomes == {entry: row_of(entry) for entry in (1, 2, 3)}


@pytest.mark.parametrize("in_flight", [1, 2])
def test_when_the_device_is_lost_everyone_hears_of_it_and_so_do_those_who_come_later(in_flight: int) -> None:
    with Desk(max_batch=2, in_flight=in_flight) as desk:
        desk.deadly = {1}
        desk.busy_with(0)
        for entry in range(1, 6):
            desk.batcher.put(entry)
        desk.free.set()
        wait_until(lambda: not desk.batcher.alive)
        desk.batcher.put(6)
    assert set(desk.outcomes) == set(range(7))
    assert all(len(each) == 1 for each in desk.outcomes.values())
    assert names(desk.outcomes)[5] == names(desk.outcomes)[6] == names(desk.outcomes)[1] == ["DeviceLost"]


def test_a_bug_in_the_batchers_own_thread_turns_alive_false_and_settles_all() -> None:
    with Desk() as desk:

        def broken(entry: int) -> bool:
            if entry == 2:
                raise SystemExit
            return True

        desk.busy_with(0)
        desk.batcher._wanted = broken
        for entry in (1, 2, 3):  # in the batch that forms; being judged; still ready
            desk.batcher.put(entry)
        desk.free.set()
        wait_until(lambda: 3 in desk.outcomes)
        assert not desk.batcher.alive
    assert names(desk.outcomes) == {0: [row_of(0)]} | {entry: ["DeviceLost"] for entry in (1, 2, 3)}


def test_a_set_up_that_fails_fails_the_start() -> None:
    desk = Desk()

    def set_up() -> None:
        raise MemoryError("no room for the model")

    with pytest.raises(MemoryError, match="no room"):
        desk.batcher.start(set_up)
    assert not desk.batcher.alive


def test_closing_launches_what_is_ready() -> None:
    with Desk(max_batch=2) as desk:
        desk.busy_with(0)
        for entry in range(1, 6):
            desk.batcher.put(entry)
        desk.free.set()
        desk.batcher.close(timeout_s=20)
        assert desk.outcomes == {entry: [row_of(entry)] for entry in range(6)}
        assert not desk.batcher.alive


def test_closing_without_draining_settles_what_is_ready_unlaunched() -> None:
    with Desk(max_batch=2) as desk:
        desk.busy_with(0)
        for entry in range(1, 4):
            desk.batcher.put(entry)
        closing = threading.Thread(target=lambda: desk.batcher.close(drain=False, timeout_s=20))
        closing.start()
        wait_until(lambda: 3 in desk.outcomes)
        desk.free.set()
        closing.join(timeout=20)
    assert desk.batches == [[0]]
    assert names(desk.outcomes) == {0: [row_of(0)]} | {entry: ["DeviceLost"] for entry in (1, 2, 3)}


def test_two_batches_are_in_flight_where_the_device_returns_early() -> None:
    collected: list[list[int]] = []
    launched: list[list[int]] = []
    at_collect: list[int] = []

    def launch(entries: list[int]) -> Callable[[], list[int]]:
        launched.append(entries)

        def collect() -> list[int]:
            at_collect.append(len(launched) - len(collected))
            collected.append(entries)
            return entries

        return collect

    batcher: Batcher[int, int] = Batcher(
        launch,
        wanted=lambda _: True,
        settle=lambda *_: None,
        config=BatcherConfig(max_batch=1, in_flight=2),
        observer=EngineStats(),
    )
    for entry in range(4):
        batcher.put(entry)
    batcher.start(lambda: None)
    batcher.close(timeout_s=20)
    assert collected == [[0], [1], [2], [3]]
    assert at_collect == [2, 2, 2, 1]  # one computes while the next is prepared; the last has none behind it


def test_the_hang_of_a_batch_shows_while_it_lasts() -> None:
    with Desk() as desk:
        assert desk.batcher.busy_for_s() == 0
        desk.busy_with(0)
        wait_until(lambda: desk.batcher.busy_for_s() > 0.05)
        assert desk.batcher.batches_in_flight == 1
        desk.free.set()
        wait_until(lambda: desk.batcher.busy_for_s() == 0)


def test_the_observer_hears_of_batches_waits_and_busy_time() -> None:
    with Desk(max_batch=4) as desk:
        desk.busy_with(0)
        for entry in range(1, 5):
            desk.batcher.put(entry)
    assert desk.stats.values["batch_size"] == (2, 5.0)
    waits, _ = desk.stats.values["queue_wait_seconds"]
    assert waits == 5
    forwards, forward_s = desk.stats.values["forward_seconds"]
    assert forwards == 2
    assert desk.stats.totals["device_busy_seconds_total", ""] == pytest.approx(forward_s, rel=1e-6)


def test_busy_time_counts_overlapping_batches_once() -> None:
    stats = EngineStats()

    def launch(entries: list[int]) -> Callable[[], list[int]]:
        def collect() -> list[int]:
            time.sleep(0.01)
            return entries

        return collect

    batcher: Batcher[int, int] = Batcher(
        launch,
        wanted=lambda _: True,
        settle=lambda *_: None,
        config=BatcherConfig(max_batch=1, in_flight=2),
        observer=stats,
    )
    for entry in range(5):
        batcher.put(entry)
    started_s = time.monotonic()
    batcher.start(lambda: None)
    batcher.close(timeout_s=20)
    assert 0.05 <= stats.totals["device_busy_seconds_total", ""] <= time.monotonic() - started_s


@pytest.mark.parametrize(("max_batch", "in_flight"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(max_batch: int, in_flight: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BatcherConfig(max_batch=max_batch, in_flight=in_flight)


@settings(max_examples=60, deadline=None)
@given(
    max_batch=st.integers(1, 9),
    in_flight=st.integers(1, 3),
    mixes_lanes=st.booleans(),
    senders=st.lists(st.lists(st.sampled_from(["put", "gone", "guilty", "late"]), max_size=12), max_size=4),
    bulk=st.sets(st.integers(0, 40)),
    drain=st.booleans(),
    lost_at=st.none() | st.integers(0, 40),
    memory=st.integers(1, 9),
)
def test_whatever_happens_each_entry_ends_once_and_as_it_deserves(
    *,
    max_batch: int,
    in_flight: int,
    mixes_lanes: bool,
    senders: list[list[str]],
    bulk: set[int],
    drain: bool,
    lost_at: int | None,
    memory: int,
) -> None:
    kinds = dict(enumerate(kind for sender in senders for kind in sender))
    desk = Desk(max_batch=max_batch, in_flight=in_flight, mixes_lanes=mixes_lanes)
    desk.bulk = set(bulk)
    desk.memory = memory
    desk.gone = {entry for entry, kind in kinds.items() if kind == "gone"}
    desk.guilty = {entry for entry, kind in kinds.items() if kind == "guilty"}
    desk.guilty_when_collected = {entry for entry, kind in kinds.items() if kind == "late"}
    desk.deadly = set() if lost_at is None else {lost_at}
    desk.batcher.start(lambda: None)
    entries = iter(kinds)
    threads = [
        threading.Thread(target=put_all, args=(desk, mine))
        for mine in [[next(entries) for _ in sender] for sender in senders]
    ]
    for thread in threads:
        thread.start()
    for entry in bulk:
        desk.bulk.discard(entry)
        desk.batcher.promote()
    for thread in threads:
        thread.join(timeout=20)
    desk.batcher.close(drain=drain, timeout_s=20)

    assert set(desk.outcomes) == set(kinds), "nothing is lost, nothing is invented"
    may_be_lost = not drain or lost_at in kinds
    launched = {entry for batch in desk.batches for entry in batch}
    assert not launched & desk.gone
    for entry, kind in kinds.items():
        (outcome,) = desk.outcomes[entry]
        if isinstance(outcome, DeviceLost):
            assert may_be_lost
        elif kind == "gone":
            assert isinstance(outcome, Dropped)
        elif kind == "put":
            assert outcome == row_of(entry)
        else:
            assert str(outcome) == f"bad: [{entry}]"
    assert all(len(batch) <= max_batch for batch in desk.batches)


def put_all(desk: Desk, entries: list[int]) -> None:
    for entry in entries:
        desk.batcher.put(entry)


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 20) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.001)
