"""The derived search of a collection: its newest snapshot, and how the next one is made.

Nothing here is the truth: it is filled from `app.search.store` at start and follows each commit.

Readers take no lock: a snapshot is never changed, and the next one is published with one assignment. Whoever
makes the next one, a writer with his commit or the background (`app.search.maintenance`), holds the store's
writer from preparing it to publishing it.

Dimension key: N rows · D embedding
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from app.search.chunks import NO_ROWS, Chunk, Rows, View, appended, rows_per_chunk, spread
from app.search.codes import MAX_CODED_DIMENSIONS, Rotation
from app.search.collection import Vector
from app.search.ivf import Ivf, Setting, tail_of, view_of
from app.search.snapshot import Snapshot

MIN_DEAD_TO_COMPACT = 1_024
DEAD_SHARE_TO_COMPACT = 0.2
_ROWS_AT_ONCE = 4_096


@dataclass(frozen=True)
class _States:
    """The newest state, the one before it, and one whose commit may be under way."""

    newest: Snapshot
    before: Snapshot | None
    prepared: Snapshot | None


class VectorIndex:
    """The newest snapshot. One writer at a time; any number of readers.

    Attributes:
        on_change: Called after each publishing; it may not fail.
    """

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self.on_change: Callable[[], object] = _nobody
        self._rotation: Rotation | None = None
        nothing = Snapshot(seq=0, dimensions=dimensions, views=(), firsts=NO_ROWS, ivf=None, alive_count=0)
        self._states = _States(nothing, None, None)

    @property
    def snapshot(self) -> Snapshot:
        """The state that searches see."""
        return self._states.newest

    def at(self, seq: int) -> Snapshot | None:
        """The state after a commit that the disk shows; None where it is too old, by two commits.

        A prepared state may be seen, too, once the disk shows its commit: so nobody waits for its publishing.
        """
        states = self._states
        for snapshot in (states.newest, states.before, states.prepared):
            if snapshot is not None and snapshot.seq == seq:
                return snapshot
        return None

    @property
    def can_code(self) -> bool:
        """Whether its vectors can be searched in fewer bits."""
        return self._dimensions <= MAX_CODED_DIMENSIONS

    @property
    def rotation(self) -> Rotation:
        """What vectors are turned by before they lose bits; made when the background first wants it."""
        if self._rotation is None:
            self._rotation = Rotation.random(self._dimensions)
        return self._rotation

    def publish(self, snapshot: Snapshot) -> None:
        """Lets searches see a prepared state. Cannot fail, so it may follow a commit."""
        newest = self._states.newest
        # What the background replaced is let go at once: it may hold much memory.
        self._states = _States(snapshot, newest if snapshot.seq != newest.seq else None, None)
        self.on_change()

    def prepare(self, *, seq: int, rids: Rows, vectors_ND: Vector, removed: Rows) -> Snapshot:
        """Makes the next state, which nobody sees before its commit, and which may be forgotten.

        Args:
            seq: The commit it will be the state after.
            rids: int64 [N], rising, above all that were here.
            vectors_ND: float32, normalised.
            removed: Rids that die; unknown ones are passed over.
        """
        before = self._states.newest
        views, ivf = before.views, before.ivf
        if len(removed):
            removed = np.sort(removed)
            views = _without(views, before.firsts, removed)
            ivf = None if ivf is None else ivf.without(removed)
        views = appended(views, rids, vectors_ND)
        firsts = before.firsts if len(views) == len(before.views) else _firsts(views)
        prepared = Snapshot(
            seq=seq,
            dimensions=self._dimensions,
            views=views,
            firsts=firsts,
            ivf=ivf,
            alive_count=sum(view.alive_count for view in views),
        )
        self._states = replace(self._states, prepared=prepared)
        return prepared

    # What the background does; `app.search.maintenance` says when.

    def with_ivf(self, ivf: Ivf | None) -> Snapshot:
        """The newest state with another IVF.

        Raises:
            ValueError: The IVF is not of these rows.
        """
        now = self._states.newest
        if ivf is None:
            return replace(now, ivf=None)
        view = view_of(ivf, now.views)
        if view is None:
            raise ValueError("the IVF lacks rows that are older than its newest")
        self._rotation = ivf.rotation
        return replace(now, ivf=view)

    def with_settings(self, settings: tuple[Setting, ...], *, rows: int) -> Snapshot:
        """The newest state with other settings of its IVF, which were measured with so many rows."""
        now = self._states.newest
        if now.ivf is None:
            return now
        return replace(now, ivf=replace(now.ivf, ivf=now.ivf.ivf.retuned(settings, rows=rows)))

    def compacted(self, run: tuple[View, ...], copy: tuple[View, ...]) -> Snapshot:
        """The newest state with some views replaced by a copy of their living rows.

        Args:
            run: The views as they were copied.
            copy: From `copied`. What died or came since is made up for.
        """
        now = self._states.newest
        start = next(number for number, view in enumerate(now.views) if view.chunk is run[0].chunk)
        stop = start + len(run)
        for then, view in zip(run, now.views[start:stop], strict=True):
            if view.alive is not None and view.alive is not then.alive:
                rows = then.living_rows()
                died = then.chunk.rids[rows[~view.alive[rows]]]
                copy = _without(copy, _firsts(copy), died)
            came = view.living_rows(start=then.size)
            copy = appended(copy, view.chunk.rids[came], view.chunk.vectors[came])
        views = now.views[:start] + copy + now.views[stop:]
        ivf = None if now.ivf is None else replace(now.ivf, tail=tail_of(now.ivf.ivf, views))
        return replace(now, views=views, firsts=_firsts(views), ivf=ivf)


def _nobody() -> None:
    """Listens to an index that nobody takes care of."""


def run_to_compact(views: tuple[View, ...]) -> tuple[View, ...]:
    """The first views next to each other that are better copied into one; none where all are well.

    A view with many dead rows is copied, and takes small neighbours with it, as far as they fit together.
    """
    for start, view in enumerate(views):
        least = max(MIN_DEAD_TO_COMPACT, DEAD_SHARE_TO_COMPACT * view.size)
        if view.dead_count < min(least, view.size):
            continue
        stop, rows = start + 1, view.alive_count
        room = rows_per_chunk(view.chunk.vectors.shape[1])
        while stop < len(views) and rows + views[stop].size <= room:
            rows += views[stop].size
            stop += 1
        return views[start:stop]
    return ()


def copied(run: tuple[View, ...], *, is_last: bool) -> tuple[View, ...]:
    """One view of the living rows of some; none where no row lives.

    Args:
        run: Views next to each other, whose living rows fit into one chunk.
        is_last: Whether rows will be appended.
    """
    rows = sum(view.alive_count for view in run)
    if rows == 0:
        return ()
    dimensions = run[0].chunk.vectors.shape[1]
    made = View(Chunk(rows_per_chunk(dimensions) if is_last else rows, dimensions), 0, None, 0)
    for view in run:
        living = view.living_rows()
        for start in range(0, len(living), _ROWS_AT_ONCE):
            block = living[start : start + _ROWS_AT_ONCE]
            made = made.appended(view.chunk.rids[block], view.chunk.vectors[block])
    return (made,)


def _without(views: tuple[View, ...], firsts: Rows, rids: Rows) -> tuple[View, ...]:
    made = list(views)
    for number, here in spread(firsts, rids):
        rows = made[number].living(made[number].rows_of(here))
        if len(rows):
            made[number] = made[number].without(rows)
    return tuple(made)


def _firsts(views: tuple[View, ...]) -> Rows:
    return np.array([view.chunk.rids[0] for view in views], dtype=np.int64)
