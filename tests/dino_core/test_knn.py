"""The classifier against a loop over neighbours, by hand, and in chunks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from dino_core import knn
from dino_core.knn import knn_accuracy, knn_hits, knn_votes, weighted_knn
from tests.references import dino_loop


def directions(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=-1)


@given(
    rows=st.integers(1, 30), k=st.integers(1, 30), temperature=st.floats(0.03, 1), seed=st.integers(0, 2**16)
)
def test_the_ranking_equals_that_of_a_loop_over_neighbours(
    rows: int, k: int, temperature: float, seed: int
) -> None:
    k = min(k, rows)
    train, queries = directions(rows, 4, seed), directions(3, 4, seed + 1)
    labels = torch.randint(0, 5, (rows,), generator=torch.Generator().manual_seed(seed))
    ranking = weighted_knn(train, labels, queries, k=k, temperature=temperature, num_classes=5)
    for query, classes in zip(queries, ranking.tolist(), strict=True):
        votes = dino_loop.knn_votes(
            train, labels.tolist(), query, k=k, temperature=temperature, num_classes=5
        )
        assert classes == sorted(range(5), key=lambda label: -votes[label])


def test_one_close_neighbour_beats_two_far_ones_when_the_temperature_is_low() -> None:
    train = functional.normalize(torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.4, 1.0]]), dim=-1)
    labels, query = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.0]])
    assert weighted_knn(train, labels, query, k=3, temperature=0.07, num_classes=2)[0, 0] == 1
    assert weighted_knn(train, labels, query, k=3, temperature=10.0, num_classes=2)[0, 0] == 0


def test_accuracy_counts_first_places_and_first_five() -> None:
    train, labels = torch.eye(6), torch.arange(6)
    queries = functional.normalize(torch.eye(6) + 0.1 * torch.ones(6, 6), dim=-1)
    assert knn_accuracy(train, labels, queries, labels, k=6) == (100.0, 100.0)
    wrong = torch.tensor([0, 1, 2, 3, 5, 4])  # the classes of two queries are swapped
    assert knn_accuracy(train, labels, queries, wrong, k=1) == pytest.approx((400 / 6, 400 / 6))
    assert knn_accuracy(train, labels, queries, wrong, k=6)[0] == pytest.approx(400 / 6)


def test_top_five_doesnt_look_at_the_sixth_class() -> None:
    angles = torch.linspace(0, 1, 6)
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    query = torch.tensor([[1.0, 0.0]])
    labels = torch.arange(6)
    assert knn_accuracy(train, labels, query, torch.tensor([4]), k=6) == (0.0, 100.0)
    assert knn_accuracy(train, labels, query, torch.tensor([5]), k=6) == (0.0, 0.0)


def test_a_class_that_only_queries_have_is_a_miss_not_an_error() -> None:
    assert (
        knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 7]), k=1)[0] == 50.0
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, queries = directions(40, 4, 0), directions(23, 4, 1)
    labels = torch.arange(40) % 3
    whole = weighted_knn(train, labels, queries, k=5, num_classes=3)
    monkeypatch.setattr(knn, "QUERIES_A_CHUNK", 5)
    torch.testing.assert_close(weighted_knn(train, labels, queries, k=5, num_classes=3), whole)


@pytest.mark.parametrize("k", [0, 5])
def test_more_neighbours_than_images_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"number of reference images \(4\)"):
        weighted_knn(torch.eye(4), torch.arange(4), torch.eye(4), k=k, num_classes=4)


def test_a_temperature_that_isnt_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        weighted_knn(torch.eye(4), torch.arange(4), torch.eye(4), k=1, num_classes=4, temperature=0)


def test_neighbours_that_tie_share_the_places_and_the_order_of_images_is_nothing() -> None:
    """Ties went by file order: a network that answers all alike was right where its class came first."""
    train, labels = torch.ones(40, 3) / 3**0.5, torch.arange(4).repeat_interleave(10)
    queries, query_labels = torch.ones(8, 3) / 3**0.5, torch.arange(4).repeat(2)
    for order in (torch.arange(40), torch.arange(40).flip(0), torch.randperm(40)):
        for k in (1, 10, 40):
            accuracy = knn_accuracy(train[order], labels[order], queries, query_labels, k=k)
            assert accuracy[0] == pytest.approx(25), "four classes, of which each is as likely"


def test_the_class_with_most_of_those_that_tie_is_named() -> None:
    train, labels = torch.tensor([[1.0, 0.0]]).expand(5, 2), torch.tensor([0, 0, 0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    (votes,) = knn_votes(train, labels, query, ks=(2,), num_classes=2)
    assert votes.tolist() == [pytest.approx([2 * 3 / 5, 2 * 2 / 5])]
    assert [float(hits) for hits in knn_hits(train, labels, query, torch.tensor([0]), ks=(1, 2, 5))] == [
        1
    ] * 3


def test_places_above_those_that_tie_are_whole() -> None:
    train = functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]]), dim=1)
    (votes,) = knn_votes(
        train, torch.arange(3), torch.tensor([[1.0, 0.0]]), ks=(2,), num_classes=3, temperature=1
    )
    tied = math.exp(0.5**0.5 - 1) / 2
    assert votes[0].tolist() == pytest.approx([1, tied, tied], abs=1e-6)


@given(seed=st.integers(0, 2**16), levels=st.integers(1, 4))
def test_the_order_of_images_changes_nothing(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    train = functional.normalize(
        torch.randint(1, 1 + levels, (30, 3), generator=generator, dtype=torch.float), dim=1
    )
    queries = functional.normalize(
        torch.randint(1, 1 + levels, (9, 3), generator=generator, dtype=torch.float), dim=1
    )
    labels, query_labels = (torch.randint(0, 3, (count,), generator=generator) for count in (30, 9))
    order = torch.randperm(30, generator=generator)
    straight = knn_hits(train, labels, queries, query_labels, ks=(1, 4, 30))
    shuffled = knn_hits(train[order], labels[order], queries, query_labels, ks=(1, 4, 30))
    for one, other in zip(straight, shuffled, strict=True):
        assert torch.equal(one, other)
