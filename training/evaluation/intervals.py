"""How sure a number is: intervals over the sources of queries, and differences on the same queries.

A measurement is a mean over queries, and queries that were made from one picture fail together. So whole
sources are drawn again, with all their queries (the bootstrap by clusters); two models are compared within
each draw, so that what is hard for both cancels out. The draws depend on the number of sources alone: a
number and its interval come out the same each time.

Dimension key: M queries · C sources · B resamples · V measures
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

RESAMPLES = 1000
Z_95 = 1.96  # standard errors to each side of a mean that hold 95 % of it
_SEED = 20180
# Draws are made some at a time: 32 MB.
_MOST_AT_ONCE = 2**22

Verdict = Literal["better", "worse", "no difference seen"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval.

    Attributes:
        value: In %.
        low: In %.
        high: In %.
        queries: How many it is the mean of.
        sources: How many pictures the queries were made from.
        resampled_B: The number in each resample, in %; numbers of the same sources share the resamples.
    """

    value: float
    low: float
    high: float
    queries: int
    sources: int
    resampled_B: Tensor = field(repr=False)

    def to_json(self) -> dict[str, float | int]:
        """All but the resamples."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "queries": self.queries,
            "sources": self.sources,
        }


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One model against another on the same queries, in points of %."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Of the first: whether the interval leaves out 0, and on which side."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no difference seen"

    def to_json(self) -> dict[str, float | str]:
        """All of it."""
        return {"difference": self.value, "low": self.low, "high": self.high, "verdict": self.verdict}


@dataclass(frozen=True)
class Resampling:
    """Draws of the sources of some queries.

    Attributes:
        sources_M: int64, of which source each query is: any numbers. Draws go by their order.
    """

    sources_M: Tensor

    @cached_property
    def places_M(self) -> Tensor:
        """int64, the sources from 0 to C - 1."""
        places_M: Tensor = torch.unique(self.sources_M, return_inverse=True)[1]
        return places_M

    @cached_property
    def count(self) -> int:
        """C."""
        return int(self.places_M.max()) + 1

    def draws(self) -> Iterator[Tensor]:
        """How often each source was drawn, int64 [b, C] at a time; B in all, the same each time."""
        generator = torch.Generator().manual_seed(_SEED)
        left = RESAMPLES
        while left:
            rows = min(left, max(1, _MOST_AT_ONCE // self.count))
            drawn_bC = torch.randint(self.count, (rows, self.count), generator=generator)
            yield torch.zeros_like(drawn_bC).scatter_add_(1, drawn_bC, torch.ones_like(drawn_bC))
            left -= rows

    def means(self, values_VM: Tensor) -> Tensor:
        """The mean of all drawn queries.

        Args:
            values_VM: One row for each measure.

        Returns:
            float64 [V, B].
        """
        sums_VC = torch.zeros(len(values_VM), self.count, dtype=torch.float64)
        sums_VC.index_add_(1, self.places_M, values_VM.double())
        queries_C = torch.bincount(self.places_M, minlength=self.count).double()
        parts = [
            (sums_VC @ draws_bC.double().T) / (queries_C @ draws_bC.double().T) for draws_bC in self.draws()
        ]
        return torch.cat(parts, dim=1)

    def estimates(self, values: dict[str, Tensor], *, shares: bool) -> dict[str, Estimate]:
        """Means of measures over the same queries, with intervals.

        Args:
            values: float [M] by name, from 0 to 1.
            shares: Whether each value is right or wrong (or expected to be, by chance). Shares of independent
                queries get Wilson's interval, which is never narrower than their spread.
        """
        values_VM = torch.stack([one_M.double() for one_M in values.values()])
        resampled_VB = self.means(values_VM)
        independent = self.count == len(self.places_M)
        found = {}
        for name, values_M, resampled_B in zip(values, values_VM, resampled_VB, strict=True):
            mean = float(values_M.mean())
            if (shares and independent) or mean in (0, 1):  # where all are alike, a resample tells nothing
                low, high = wilson_interval(mean, self.count)
            else:
                low, high = _middle(resampled_B)
            found[name] = Estimate(
                value=100 * mean,
                low=100 * low,
                high=100 * high,
                queries=len(values_M),
                sources=self.count,
                resampled_B=100 * resampled_B,
            )
        return found


def estimate_of(value: float, resampled_B: Tensor, resampling: Resampling) -> Estimate:
    """Any number that is no mean, by its resamples.

    Args:
        value: From 0 to 1.
        resampled_B: The same of each draw of `resampling`; NaN where there is none.
        resampling: Of the queries' sources.
    """
    low, high = wilson_interval(value, resampling.count) if value in (0, 1) else _middle(resampled_B)
    return Estimate(
        value=100 * value,
        low=100 * low,
        high=100 * high,
        queries=len(resampling.places_M),
        sources=resampling.count,
        resampled_B=100 * resampled_B,
    )


def difference(first: Estimate, second: Estimate) -> Difference:
    """The first less the second, of the same queries; the interval is that of the differences.

    Raises:
        ValueError: They are of other queries, as far as numbers tell.
    """
    if (first.queries, first.sources) != (second.queries, second.sources):
        raise ValueError(
            f"{first.queries} queries of {first.sources} sources and {second.queries} of {second.sources}: "
            "only numbers of the same queries can be compared"
        )
    low, high = _middle(first.resampled_B - second.resampled_B)
    return Difference(value=first.value - second.value, low=low, high=high)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a share, which is right near 0 and 1 and for few images too."""
    z = Z_95
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    inner = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(inner) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def _middle(resampled_B: Tensor) -> tuple[float, float]:
    """What leaves out 2.5 % on either side."""
    known_B = resampled_B[~resampled_B.isnan()]
    low, high = torch.quantile(known_B, torch.tensor([0.025, 0.975], dtype=known_B.dtype)).tolist()
    return low, high
