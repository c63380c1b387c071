"""A collection cut into lists of near vectors, a bit for each dimension: only the nearest are compared.

An `Ivf` never changes: what is added goes to a copy, which takes its place. Its slots count up in the order
of adding, so the rids of its slots rise; and as a rid never changes its vector, what it says stays true
whatever is written later. Rows that died since are hidden by bits, those that came since are searched beside.

The codes are RaBitQ in fast-scan order, of vectors turned at random (see `app.search.memory.codes`).

Dimension key: N rows · D embedding · E turned embedding
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from app.search.collection import Vector
from app.search.memory.chunks import NO_ROWS, Rows, View
from app.search.memory.codes import Rotation, only_these
from app.search.memory.rowset import Bits, SlotFilter

_faiss: Any = faiss  # its stubs don't know members as arguments


@dataclass(frozen=True)
class Setting:
    """How a search for up to k neighbours goes about it.

    Attributes:
        probes: How many lists are compared.
        depth: How many of the rows that seem best are compared again in full.
        recall: The share of the true k nearest that it found, of stored vectors, themselves left out.
    """

    k: int
    probes: int
    depth: int
    recall: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Ivf:
    """Lists of codes.

    Attributes:
        index: Nobody adds to it once others may search it.
        rids: int64 [slots], rising.
        marks: float32 [slots]: a number of each vector, from `marks_of`.
        rotation: What the codes' vectors were turned by.
        trained_rows: How many rows there were when the lists were chosen.
        settings: For rising k; of the rows at the time of `tuned_rows`.
        tuned_rows: How many rows there were when the settings were measured.
    """

    index: faiss.IndexIVFRaBitQFastScan
    rids: Rows
    marks: Vector
    rotation: Rotation
    trained_rows: int
    settings: tuple[Setting, ...] = ()
    tuned_rows: int = 0

    @property
    def lists(self) -> int:
        """How many there are."""
        return int(self.index.nlist)

    @property
    def covered_rid(self) -> int:
        """The last rid that it has; rows above are not in it."""
        return int(self.rids[-1]) if len(self.rids) else -1

    @property
    def nbytes(self) -> int:
        """What it takes in memory: codes, faiss's 8 bytes a row, rids and marks, centroids."""
        row_bytes = int(self.index.code_size) + 8 + 8 + 4
        return len(self.rids) * row_bytes + self.lists * int(self.index.d) * 4

    @functools.cached_property
    def list_of_slot(self) -> npt.NDArray[np.int32]:
        """int32 [slots]: made when a filter first wants it."""
        lists = np.empty(len(self.rids), dtype=np.int32)
        inverted: Any = self.index.invlists
        for number in range(self.lists):
            size = inverted.list_size(number)
            if size:
                ids = faiss.rev_swig_ptr(inverted.get_ids(number), size)
                lists[ids] = number
        return lists

    def slots_of(self, rids: Rows) -> Rows:
        """The slots of the rids that it has; the others are passed over."""
        if not len(self.rids):
            return NO_ROWS
        slots = np.minimum(np.searchsorted(self.rids, rids), len(self.rids) - 1)
        found: Rows = slots[self.rids[slots] == rids]
        return found

    def setting_for(self, k: int) -> Setting | None:
        """The setting for k neighbours; None where none was found that is good enough."""
        return next((setting for setting in self.settings if setting.k >= k), None)

    def retuned(self, settings: tuple[Setting, ...], *, rows: int) -> "Ivf":
        """The same lists, with other settings."""
        return replace(self, settings=settings, tuned_rows=rows)


@dataclass(frozen=True, eq=False)
class IvfView:
    """An IVF at one moment.

    Attributes:
        alive_bits: A bit for each slot; None while all live.
        dead_count: How many slots are dead.
        tail: The view and the row in it where those rows begin that the IVF doesn't have.
    """

    ivf: Ivf
    alive_bits: Bits | None
    dead_count: int
    tail: tuple[int, int]
    _parameters: dict[tuple[int, int], faiss.SearchParametersIVF] = field(default_factory=dict)

    def without(self, rids: Rows) -> "IvfView":
        """The view after some rids died."""
        slots = self.ivf.slots_of(rids)
        if not len(slots):
            return self
        count = len(self.ivf.rids)
        if self.alive_bits is None:
            bits = np.full(-(-count // 8), 255, dtype=np.uint8)
        else:
            bits = self.alive_bits.copy()
            slots = slots[(bits[slots >> 3] >> (slots & 7).astype(np.uint8)) & 1 > 0]
        np.bitwise_and.at(bits, slots >> 3, ~(1 << (slots & 7)).astype(np.uint8))
        return replace(self, alive_bits=bits, dead_count=self.dead_count + len(slots), _parameters={})

    def rids_near(self, query_D: Vector, *, probes: int, depth: int, chosen: SlotFilter | None) -> Rows:
        """The living rids that seem nearest, rising.

        Args:
            query_D: Of length 1.
            probes: How many lists to compare.
            depth: How many rids at most.
            chosen: The rows to choose from; None for all.
        """
        if chosen is not None and chosen.lists == 0:
            return NO_ROWS
        query_1E = self.ivf.rotation.of_one(query_D)[None]
        slots = np.sort(self.slots_near(query_1E, probes=probes, depth=depth, chosen=chosen)[0])
        rids: Rows = self.ivf.rids[slots[np.searchsorted(slots, 0) :]]
        return rids

    def slots_near(
        self, queries_QE: Vector, *, probes: int, depth: int, chosen: SlotFilter | None = None
    ) -> Rows:
        """The living slots that seem nearest, best first: int64 [Q, depth], with -1 where there are no more.

        Args:
            queries_QE: Turned by the IVF's rotation.
            probes: How many lists to compare.
            depth: How many slots at most.
            chosen: The rows to choose from; None for all.
        """
        depth = min(depth, len(self.ivf.rids))
        if not depth:  # its rows have all been replaced, and a filling has left it none
            return np.empty((len(queries_QE), 0), np.int64)
        probes = min(probes, self.ivf.lists if chosen is None else chosen.lists)
        if chosen is None:
            # Two threads may both make them: the same.
            parameters = self._parameters.get((probes, 0))
            if parameters is None:
                parameters = self._parameters[probes, 0] = _parameters(probes, self.alive_bits, None)
        else:
            bits = chosen.slot_bits if self.alive_bits is None else chosen.slot_bits & self.alive_bits
            parameters = _parameters(probes, bits, chosen.list_bits)
        slots_QK: Rows
        _, slots_QK = self.ivf.index.search(queries_QE, depth, params=parameters)
        return slots_QK


def _parameters(probes: int, slot_bits: Bits | None, list_bits: Bits | None) -> faiss.SearchParametersIVF:
    words: dict[str, Any] = {"nprobe": probes}
    if slot_bits is not None:
        words |= only_these(slot_bits)
    if list_bits is not None:
        words["quantizer_params"] = _faiss.SearchParameters(**only_these(list_bits))
    parameters: faiss.SearchParametersIVF = _faiss.SearchParametersIVF(**words)
    return parameters


def marks_of(rids: Rows, vectors_ND: Vector, rows: Rows) -> Vector:
    """A number of each row's vector, in another place for each rid: two vectors seldom share it."""
    marks: Vector = vectors_ND[rows, rids % vectors_ND.shape[1]]
    return marks


def tail_of(ivf: Ivf, views: tuple[View, ...]) -> tuple[int, int]:
    """The view and the row in it where the rows begin that an IVF doesn't have."""
    for number, view in enumerate(views):
        if view.last_rid > ivf.covered_rid:
            rids = view.chunk.rids[: view.size]
            return number, int(np.searchsorted(rids, ivf.covered_rid, side="right"))
    return (len(views) - 1, views[-1].size) if views else (0, 0)


def view_of(ivf: Ivf, views: tuple[View, ...]) -> IvfView | None:
    """An IVF as it hides what died; None where it lacks an older living row: it is not of these rows."""
    mask = np.zeros(len(ivf.rids), dtype=np.bool_)
    tail = tail_of(ivf, views)
    for number, view in enumerate(views[: tail[0] + 1]):
        rids = view.chunk.rids[: view.size if number < tail[0] else tail[1]]
        if not len(rids):
            continue
        living = rids if view.alive is None else rids[view.alive[: len(rids)]]
        first, last = (int(slot) for slot in np.searchsorted(ivf.rids, rids[[0, -1]]))
        if not _mark(ivf.rids[first : last + 1], living, mask[first : last + 1]):
            return None
    dead_count = len(mask) - int(np.count_nonzero(mask))
    return IvfView(ivf, np.packbits(mask, bitorder="little") if dead_count else None, dead_count, tail)


def _mark(slot_rids: Rows, rids: Rows, mask: npt.NDArray[np.bool_]) -> bool:
    """Sets the mask for those slots whose rids are given; False where one has no slot. Both are rising."""
    if len(rids) == 0:
        return True
    if len(slot_rids) == len(rids):
        mask[:] = True
        return bool((slot_rids == rids).all())
    if len(slot_rids) == 0:
        return False
    slots = np.minimum(np.searchsorted(slot_rids, rids), len(slot_rids) - 1)
    mask[slots] = True
    return bool((slot_rids[slots] == rids).all())
