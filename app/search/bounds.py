"""Which scores, and how many of them, a search may be asked for; the same on every engine."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.errors import InvalidQuery

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

    def holding(self, scores_N: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Which scores are within: bool [N]."""
        kept_N = np.ones(len(scores_N), dtype=np.bool_)
        if self.least is not None:
            kept_N &= scores_N >= np.float32(self.least)
        if self.greatest is not None:
            kept_N &= scores_N <= np.float32(self.greatest)
        return kept_N


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
