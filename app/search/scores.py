"""Which of the nearest a search answers with: bounds of scores, and pages of them in one order.

Dimension key: Q queries · D embedding
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from app.errors import InvalidQuery
from app.search.candidates import Candidates
from app.search.collection import Vector
from app.search.filter_sql import Rids
from app.search.rowset import RowSet
from app.search.snapshot import Snapshot

MAX_RESULTS = 1_000


@dataclass(frozen=True)
class Bounds:
    """Of scores, both included; None for none."""

    least: float | None
    greatest: float | None

    @classmethod
    def checked(cls, *, threshold: float | None, max_score: float | None) -> "Bounds":
        """From the parameters of a search.

        Raises:
            InvalidQuery: One is no cosine, or no score is between them.
        """
        for name, bound in (("threshold", threshold), ("max_score", max_score)):
            if bound is not None and not -1.0 <= bound <= 1.0:
                raise InvalidQuery(f"{name} is {bound}; scores are cosines, so it must be -1 to 1")
        if threshold is not None and max_score is not None and max_score < threshold:
            raise InvalidQuery(
                f"max_score is {max_score}, below the threshold of {threshold}: no score is between"
            )
        return cls(threshold, max_score)

    def of(self, found: Candidates) -> Candidates:
        """The candidates that are within."""
        if self.least is None and self.greatest is None:
            return found
        keep = np.ones(len(found.scores), dtype=np.bool_)
        if self.least is not None:
            keep &= found.scores >= np.float32(self.least)
        if self.greatest is not None:
            keep &= found.scores <= np.float32(self.greatest)
        return Candidates(found.rids[keep], found.scores[keep])


def check_window(*, k: int, offset: int) -> None:
    """Refuses pages that are empty, or too deep.

    Raises:
        InvalidQuery: k or offset is out of bounds.
    """
    if k < 1 or offset < 0 or offset + k > MAX_RESULTS:
        raise InvalidQuery(
            f"k is {k} and offset {offset}; k must be at least 1, offset at least 0, and both together at "
            f"most {MAX_RESULTS:,}. To read everything, list the items page by page"
        )


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
        kept = [bounds.of(candidates) for candidates in found]
        if bounds.greatest is None or all(
            len(inside.rids) >= k or len(candidates.rids) < asked
            for inside, candidates in zip(kept, found, strict=True)
        ):
            return kept
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
