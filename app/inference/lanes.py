"""Two lanes for work: interactive goes first, and bulk takes what is left and never starves.

    while work of both lanes waits, seven turns are interactive's and the eighth is bulk's

So bulk moves on at an eighth of the speed under whatever load, and a caller who waits for one picture has at
most one turn of bulk's before it. What a turn is, the owner says: one picture of a decoder, one batch of the
device.
"""

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, Literal, TypeVar

Lane = Literal["interactive", "bulk"]
LANES: Final[tuple[Lane, ...]] = ("interactive", "bulk")

TURNS_PER_BULK: Final = 8  # while both lanes wait

Entry = TypeVar("Entry")


class LaneQueue(Generic[Entry]):
    """Entries that wait, in two lanes, each first in, first out.

    Not safe to use from many threads: the owner has the lock.
    """

    def __init__(self) -> None:
        self._lanes: dict[Lane, deque[Entry]] = {"interactive": deque(), "bulk": deque()}
        self._turns_without_bulk = 0

    def put(self, entry: Entry, lane: Lane) -> None:
        """Adds an entry behind the others of its lane."""
        self._lanes[lane].append(entry)

    def turn(self, *, bulk_may: bool = True) -> Lane | None:
        """Whose turn it is, which then counts as taken; None where nothing waits that may be taken.

        Args:
            bulk_may: Whether bulk can be taken now; a turn that it misses is not lost.
        """
        interactive_waits, bulk_waits = bool(self._lanes["interactive"]), bool(self._lanes["bulk"])
        bulk_is_due = not interactive_waits or self._turns_without_bulk >= TURNS_PER_BULK - 1
        if bulk_waits and bulk_may and bulk_is_due:
            self._turns_without_bulk = 0
            return "bulk"
        if not interactive_waits:
            return None
        self._turns_without_bulk = self._turns_without_bulk + 1 if bulk_waits else 0
        return "interactive"

    def pop(self, lane: Lane) -> Entry:
        """The lane's oldest entry.

        Raises:
            IndexError: The lane is empty.
        """
        return self._lanes[lane].popleft()

    def waiting(self, lane: Lane) -> int:
        """Entries of one lane."""
        return len(self._lanes[lane])

    def promote(self, urgent: Callable[[Entry], bool]) -> None:
        """Moves the entries of bulk that have become urgent behind those of the interactive lane."""
        bulk = self._lanes["bulk"]
        self._lanes["interactive"].extend(entry for entry in bulk if urgent(entry))
        self._lanes["bulk"] = deque(entry for entry in bulk if not urgent(entry))

    def clear(self) -> list[Entry]:
        """Takes all entries out."""
        entries = [*self._lanes["interactive"], *self._lanes["bulk"]]
        for lane in self._lanes.values():
            lane.clear()
        return entries

    def __len__(self) -> int:
        return self.waiting("interactive") + self.waiting("bulk")
