"""The rows that a filter keeps, and where they are, remembered for the next search with the same filter.

Dimension key: N rows
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from app.search.memory.chunks import Rows, View, spread

if TYPE_CHECKING:
    from app.search.memory.ivf import Ivf

Bits = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SlotFilter:
    """The rows of a filter within an IVF.

    Attributes:
        slot_bits: A bit for each slot.
        list_bits: A bit for each list that has at least one of them.
        lists: How many lists have.
    """

    slot_bits: Bits
    list_bits: Bits
    lists: int


@dataclass(frozen=True)
class _Located:
    firsts: Rows
    size: int
    is_complete: bool
    parts: list[tuple[int, Rows]]

    def covers(self, size: int) -> bool:
        return self.size == size or (self.is_complete and self.size < size)


class RowSet:
    """Some rids; finding their rows costs 40 ns each, so keep the object where the filter comes again.

    Any number of threads may search with it: what it remembers is replaced as a whole.

    Args:
        rids: int64 [N], rising.
    """

    __slots__ = ("_located", "_slots", "rids")

    def __init__(self, rids: Rows) -> None:
        self.rids = np.ascontiguousarray(rids, dtype=np.int64)
        self._located: _Located | None = None
        self._slots: tuple[Ivf, SlotFilter] | None = None

    def __len__(self) -> int:
        return len(self.rids)

    def parts(self, firsts: Rows, views: tuple[View, ...]) -> list[tuple[int, Rows]]:
        """The numbers of the views that have rows of the set, and which, dead or alive, rising.

        Args:
            firsts: The first rid of each view; the same object while no row moves.
            views: All of a snapshot.
        """
        size = sum(view.size for view in views)
        known = self._located
        # Rows stay where they are until `firsts` is another. Rids that weren't found may have come since; and
        # those that were may not be there yet, for a reader of an older state.
        if known is not None and known.firsts is firsts and known.covers(size):
            return known.parts
        parts = [(number, views[number].rows_of(rids)) for number, rids in spread(firsts, self.rids)]
        found = sum(len(rows) for _, rows in parts)
        self._located = _Located(firsts, size, found == len(self.rids), parts)
        return parts

    def slots(self, ivf: "Ivf") -> SlotFilter:
        """Which slots and lists of an IVF have rows of the set."""
        known = self._slots
        if known is not None and known[0] is ivf:
            return known[1]
        slots = ivf.slots_of(self.rids)
        in_list = np.bincount(ivf.list_of_slot[slots], minlength=ivf.lists) > 0
        made = SlotFilter(
            bits_of(slots, len(ivf.rids)), np.packbits(in_list, bitorder="little"), int(in_list.sum())
        )
        self._slots = (ivf, made)
        return made


def bits_of(members: Rows, count: int) -> Bits:
    """A bit for each of some numbers below a count, as faiss wants them."""
    mask = np.zeros(count, dtype=np.bool_)
    mask[members] = True
    return np.packbits(mask, bitorder="little")
