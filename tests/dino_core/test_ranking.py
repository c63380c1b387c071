"""Rankings with ties against every order of those that tie, and against scikit-learn where nothing ties."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dino_core.ranking import (
    average_precision,
    cosines,
    expected_precisions,
    membership,
    resampled_average_precision,
)


def literally(relevant: list[bool]) -> tuple[float, float]:
    found, precisions = 0, []
    for rank, is_relevant in enumerate(relevant, start=1):
        if is_relevant:
            found += 1
            precisions.append(found / rank)
    return float(relevant[0]), sum(precisions) / len(precisions)


def over_all_orders(scores: list[float], relevant: list[bool]) -> tuple[float, float]:
    """The mean of P@1 and AP over all orders that the scores allow."""
    firsts, averages = [], []
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in zip(order[:-1], order[1:], strict=True)):
            first, average = literally([relevant[place] for place in order])
            firsts.append(first)
            averages.append(average)
    return sum(firsts) / len(firsts), sum(averages) / len(averages)


@given(rows=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
def test_ties_count_as_the_mean_over_all_their_orders(rows: list[tuple[int, bool]]) -> None:
    scores, relevant = [float(score) for score, _ in rows], [flag for _, flag in rows]
    relevant[0] = True
    first, average = expected_precisions(torch.tensor([scores]), torch.tensor([relevant]))
    assert (float(first), float(average)) == pytest.approx(over_all_orders(scores, relevant))


def test_scores_that_are_all_equal_are_worth_the_same_in_every_order_of_files() -> None:
    """A sort gave 1.0 or 0.1, by whether the right one was the first or the last of ten files."""
    expected = sum(1 / rank for rank in range(1, 11)) / 10
    for place in range(10):
        relevant = torch.arange(10) == place
        assert average_precision(torch.zeros(10), relevant) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_without_ties_it_is_scikit_learns_average_precision(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(200, generator=generator).float()
    relevant = torch.rand(200, generator=generator) < 0.2
    expected = metrics.average_precision_score(relevant.numpy(), scores.numpy())
    assert average_precision(scores, relevant) == pytest.approx(float(expected), abs=1e-12)


def test_rows_are_ranked_each_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (7, 40), generator=generator).float()
    relevant = torch.rand(7, 40, generator=generator) < 0.3
    relevant[:, 0] = True
    _, average = expected_precisions(scores, relevant)
    assert average.tolist() == [average_precision(*row) for row in zip(scores, relevant, strict=True)]


def repeated(scores: Tensor, relevant: Tensor, sources: Tensor, draws: Tensor) -> float:
    times = draws[sources]
    return average_precision(scores.repeat_interleave(times), relevant.repeat_interleave(times))


def test_a_resample_is_the_ranking_in_which_each_pair_stands_as_often_as_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 12, (60,), generator=generator).float()
    relevant = torch.rand(60, generator=generator) < 0.3
    sources = torch.randint(0, 5, (60,), generator=generator)
    draws = torch.randint(0, 4, (9, 5), generator=generator)
    found = resampled_average_precision(scores, relevant, sources, draws)
    assert found.tolist() == pytest.approx([repeated(scores, relevant, sources, row) for row in draws])


def test_a_resample_without_anything_relevant_is_no_number() -> None:
    draws = torch.tensor([[2, 0], [1, 1]])
    found = resampled_average_precision(
        torch.tensor([1.0, 0.0]), torch.tensor([False, True]), torch.tensor([0, 1]), draws
    )
    assert found.isnan().tolist() == [True, False]


@given(seed=st.integers(0, 2**16), k=st.integers(1, 12))
def test_membership_sums_to_k_and_is_whole_without_ties(seed: int, k: int) -> None:
    scores = torch.randint(0, 5, (3, 12), generator=torch.Generator().manual_seed(seed)).float()
    assert membership(scores, k).sum(dim=1).tolist() == pytest.approx([k] * 3)
    apart = torch.arange(12.0)[None]
    assert membership(apart, k)[0].tolist() == [0.0] * (12 - k) + [1.0] * k


def test_cosines_that_differ_by_rounding_are_equal_and_others_are_not() -> None:
    vectors = functional.normalize(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    noisy = vectors * (1 + 1e-7 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1)))
    assert cosines(vectors, noisy).diagonal().tolist() == [1.0] * 50
    turned = functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 3e-3]]), dim=1)
    assert float(cosines(turned[:1], turned)[0, 1]) < 1
