"""Which of the nearest a search answers with: bounds of scores, and pages of them in one order.

Dimension key: Q queries · D embedding
"""

from collections.abc import Mapping, Sequence

import numpy as np

from app.search.bounds import Bounds
from app.search.collection import Vector
from app.search.embedded.filter_sql import Rids
from app.search.memory.candidates import Candidates
from app.search.memory.rowset import RowSet
from app.search.memory.snapshot import Snapshot


def nearest_within(
    snapshot: Snapshot,
    queries_QD: Vector,
    *,
    k: int,
    only: RowSet | None,
    excluded: Rids,
    bounds: Bounds,
    exact: bool,
) -> list[Candidates]:
    """The k nearest of each query whose scores are within bounds, and all that tie with the last of them.

    The nearest may all be too near: then more are asked for, until there are k that are not, or no others.
    """
    asked = k
    while True:
        found = snapshot.nearest(queries_QD, k=asked, only=only, excluded=excluded, exact=exact)
        kept = [_within(bounds, candidates) for candidates in found]
        if bounds.greatest is None or all(
            len(inside.rids) >= k or len(candidates.rids) < asked
            for inside, candidates in zip(kept, found, strict=True)
        ):
            return [_first(candidates, k) for candidates in kept]
        asked *= 4


def pages_of(
    candidates: Sequence[Candidates], texts: Mapping[int, tuple[str, str]], *, window: slice
) -> list[list[tuple[float, int]]]:
    """Scores and rids of each query, best first, equal scores in order of id.

    Args:
        candidates: Of each query.
        texts: The id, and what else there is, of each rid.
        window: Which of them to show.
    """
    return [
        sorted(
            zip(found.scores.tolist(), found.rids.tolist(), strict=True),
            key=lambda pair: (-pair[0], texts[pair[1]][0]),
        )[window]
        for found in candidates
    ]


def _first(found: Candidates, k: int) -> Candidates:
    """The first k, and all that tie with the last of them."""
    if len(found.scores) <= k:
        return found
    stop = int(np.searchsorted(-found.scores, -found.scores[k - 1], side="right"))
    return Candidates(found.rids[:stop], found.scores[:stop])


def _within(bounds: Bounds, found: Candidates) -> Candidates:
    if bounds.least is None and bounds.greatest is None:
        return found
    keep = bounds.holding(found.scores)
    return Candidates(found.rids[keep], found.scores[keep])
