from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.inference.lanes import LANES, TURNS_PER_BULK, Lane, LaneQueue


def filled(interactive: Iterable[int], bulk: Iterable[int]) -> LaneQueue[int]:
    queue: LaneQueue[int] = LaneQueue()
    for entry in interactive:
        queue.put(entry, "interactive")
    for entry in bulk:
        queue.put(entry, "bulk")
    return queue


def taken(queue: LaneQueue[int], *, bulk_may: bool = True) -> list[int]:
    order = []
    while (lane := queue.turn(bulk_may=bulk_may)) is not None:
        order.append(queue.pop(lane))
    return order


def test_interactive_goes_first_and_every_eighth_turn_is_bulks() -> None:
    order = taken(filled(range(20), range(100, 104)))
    assert order == [*range(7), 100, *range(7, 14), 101, *range(14, 20), 102, 103]


def test_turns_that_bulk_was_not_there_for_are_not_saved_up() -> None:
    queue = filled(range(50), [])
    for _ in range(40):
        queue.pop(queue.turn() or "bulk")
    queue.put(100, "bulk")
    queue.put(101, "bulk")
    assert taken(queue) == [*range(40, 47), 100, *range(47, 50), 101]


def test_a_turn_that_bulk_may_not_take_now_is_its_next() -> None:
    queue = filled(range(20), [100])
    for _ in range(10):
        assert queue.turn(bulk_may=False) == "interactive"
        queue.pop("interactive")
    assert queue.turn() == "bulk"


def test_what_has_become_urgent_goes_behind_the_others_of_its_new_lane() -> None:
    queue = filled([1, 2], [100, 101, 102])
    queue.promote(lambda entry: entry == 101)
    assert taken(queue) == [1, 2, 101, 100, 102]


class Lanes(RuleBasedStateMachine):
    """Any sequence of calls, beside the slow words of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: LaneQueue[int] = LaneQueue()
        self.waiting: dict[Lane, list[int]] = {lane: [] for lane in LANES}
        self.numbers = iter(range(10_000))
        self.without_bulk = 0

    @rule(lane=st.sampled_from(LANES))
    def put(self, lane: Lane) -> None:
        entry = next(self.numbers)
        self.queue.put(entry, lane)
        self.waiting[lane].append(entry)

    @rule(bulk_may=st.booleans())
    def take(self, bulk_may: bool) -> None:
        both = bool(self.waiting["interactive"] and self.waiting["bulk"])
        lane = self.queue.turn(bulk_may=bulk_may)
        if lane is None:
            assert not self.waiting["interactive"]
            assert not (self.waiting["bulk"] and bulk_may)
            return
        assert lane == "interactive" or bulk_may
        assert self.queue.pop(lane) == self.waiting[lane].pop(0), "first in, first out"
        if both and bulk_may:
            assert lane == "interactive" or self.without_bulk >= TURNS_PER_BULK - 1, "bulk went first"
            assert lane == "bulk" or self.without_bulk < TURNS_PER_BULK - 1, "bulk starved"
        self.without_bulk = self.without_bulk + 1 if both and lane == "interactive" else 0

    @precondition(lambda self: self.waiting["bulk"])
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        urgent = data.draw(st.sets(st.sampled_from(self.waiting["bulk"])))
        self.queue.promote(lambda entry: entry in urgent)
        self.waiting["interactive"] += [entry for entry in self.waiting["bulk"] if entry in urgent]
        self.waiting["bulk"] = [entry for entry in self.waiting["bulk"] if entry not in urgent]

    @invariant()
    def counts_what_waits(self) -> None:
        assert len(self.queue) == sum(map(len, self.waiting.values()))
        assert all(self.queue.waiting(lane) == len(self.waiting[lane]) for lane in LANES)


TestLanes = Lanes.TestCase


@given(interactive=st.integers(0, 60), bulk=st.integers(0, 60))
def test_everything_comes_out_once_whatever_the_loads(interactive: int, bulk: int) -> None:
    order = taken(filled(range(interactive), range(100, 100 + bulk)))
    assert sorted(order) == [*range(interactive), *range(100, 100 + bulk)]
