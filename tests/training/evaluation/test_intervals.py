"""Intervals: by hand, by simulation, and what independence that isn't there would have claimed."""

import math

import pytest
import torch

from training.evaluation.intervals import (
    RESAMPLES,
    Estimate,
    Resampling,
    difference,
    estimate_of,
    wilson_interval,
)


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def share(values: torch.Tensor, sources: torch.Tensor) -> Estimate:
    return Resampling(sources).estimates({"share": values}, shares=True)["share"]


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe 1998, table I: 81 of 263 and 15 of 148 by method 3; 0 of 20 as well.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_copies_of_one_original_are_one_witness() -> None:
    """600 copies of 30 originals counted as 600 pictures: the interval was 4.5 times too narrow."""
    right = torch.arange(30) % 2
    alone, repeated = torch.arange(600), torch.arange(30).repeat_interleave(20)
    values = right.repeat_interleave(20).double()
    independent, clustered = share(values, alone), share(values, repeated)
    assert width(clustered) > 4 * width(independent)
    assert width(clustered) == pytest.approx(width(share(right.double(), torch.arange(30))), rel=0.1)
    assert (clustered.queries, clustered.sources) == (600, 30)


def test_intervals_hold_the_truth_in_about_95_of_100_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(300):
        easy_C = torch.rand(
            40, 1, generator=generator
        )  # each source has its own chance; the mean of all is 1/2
        values = (torch.rand(40, 10, generator=generator) < easy_C).double().flatten()
        found = share(values, torch.arange(40).repeat_interleave(10))
        held += found.low <= 50 <= found.high
    # 95 % of 300 is 285; three standard errors are 11, and percentiles of 40 sources are a little narrow.
    assert 268 <= held <= 297


def test_where_all_is_right_the_interval_is_that_of_as_many_sources() -> None:
    found = share(torch.ones(600), torch.arange(30).repeat_interleave(20))
    assert (found.value, found.high) == (100, 100)
    assert found.low == pytest.approx(100 * wilson_interval(1, 30)[0])


def test_a_mean_has_the_width_of_its_standard_error() -> None:
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Resampling(torch.arange(2000)).estimates({"mean": values}, shares=False)["mean"]
    assert found.value == pytest.approx(100 * float(values.mean()))
    expected = 100 * 2 * 1.96 * float(values.std()) / math.sqrt(2000)
    assert width(found) == pytest.approx(expected, rel=0.1)


def test_sources_of_other_numbers_of_queries_weigh_by_their_queries() -> None:
    resampling = Resampling(torch.tensor([7, 7, 7, 3]))
    (draws,) = resampling.draws()
    means = resampling.means(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))[0]
    assert means.tolist() == pytest.approx((3 * draws[:, 1] / (3 * draws[:, 1] + draws[:, 0])).tolist())
    assert len(means) == RESAMPLES


def test_a_difference_is_surer_than_the_numbers_that_it_is_of() -> None:
    """Two models that fail on the same hard pictures differ surely, though their intervals overlap."""
    generator = torch.Generator().manual_seed(0)
    good = (torch.rand(400, generator=generator) < 0.6).double()
    worse = good.clone()
    worse[torch.nonzero(good).squeeze(1)[:12]] = 0
    first, second = share(good, torch.arange(400)), share(worse, torch.arange(400))
    assert first.low < second.high
    found = difference(first, second)
    assert found.value == pytest.approx(3)
    assert (found.verdict, difference(second, first).verdict) == ("better", "worse")
    assert difference(first, first).verdict == "no difference seen"
    assert difference(first, share(good.flip(0), torch.arange(400))).verdict == "no difference seen"


def test_models_are_only_compared_on_as_many_queries() -> None:
    with pytest.raises(ValueError, match="400 queries of 400 sources and 3 of 3"):
        difference(share(torch.ones(400), torch.arange(400)), share(torch.ones(3), torch.arange(3)))


def test_the_order_of_queries_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    values, sources = torch.rand(90, generator=generator), torch.randint(0, 20, (90,), generator=generator)
    order = torch.randperm(90, generator=generator)
    one = Resampling(sources).estimates({"mean": values}, shares=False)["mean"]
    other = Resampling(sources[order]).estimates({"mean": values[order]}, shares=False)["mean"]
    assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), abs=1e-9)


def test_a_number_that_is_no_mean_goes_by_its_resamples() -> None:
    resamples = torch.linspace(0.2, 0.4, 1001, dtype=torch.float64)
    resamples[0] = torch.nan  # nothing relevant was drawn
    found = estimate_of(0.3, resamples, Resampling(torch.arange(9)))
    assert (found.low, found.high) == pytest.approx((20.5, 39.5), abs=0.1)
