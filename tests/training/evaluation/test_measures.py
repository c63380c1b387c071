"""Measures of given matrices: counts by hand, and what collapsed embeddings are worth."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from training.evaluation.intervals import difference
from training.evaluation.measures import Measures, measure, measure_within


def clouds(count: int, *, distance: float, seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return torch.eye(classes, 8)[labels] * distance + torch.randn(count, 8, generator=generator), labels


def numbers(measures: Measures) -> dict[str, list[float]]:
    return {name: [one.value, one.low, one.high] for name, one in measures.means.items()}


def test_accuracy_counts_what_the_nearest_say() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2]).repeat_interleave(2)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0] * 6 + [1] * 6)
    queries = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # Ten of the twelve vote, but the near ones weigh exp(1 / 0.07) against exp(-1 / 0.07).
    found = measure(features, labels, queries, torch.tensor([0, 1]), probe=False)
    assert found.means["top1_k10"].value == 100
    found = measure(features, labels, queries, torch.tensor([0, 0]), probe=False)
    assert {label: share.value for label, share in found.by_class.items()} == {0: 50}
    assert set(found.means) == {"top1_k10", "p_at_1", "map"}, "no k beyond the number of images"


def test_lengths_of_vectors_do_not_count() -> None:
    train, labels = clouds(60, distance=3, seed=0)
    queries, query_labels = clouds(40, distance=3, seed=1)
    lengths = torch.rand(60, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    one = measure(train, labels, queries, query_labels, probe=False)
    other = measure(train * lengths, labels, 7 * queries, query_labels, probe=False)
    assert numbers(one) == numbers(other)


@pytest.mark.parametrize("within", [True, False])
def test_collapsed_embeddings_are_worth_what_chance_is(within: bool) -> None:
    labels = torch.arange(4).repeat_interleave(30)
    same = torch.full((120, 8), 3.0)
    orders = [torch.arange(120), torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    found = []
    for order in orders:
        if within:
            names = [str(int(place)) for place in order]
            found.append(measure_within(same, labels[order], names=names))
        else:
            found.append(measure(same, labels[order], same, labels, train_names=None))
    assert found[0].means["p_at_1"].value == pytest.approx(100 * (29 / 119 if within else 1 / 4))
    for name in ("top1_k10", "top1_k100", "p_at_1", "map"):
        assert found[0].means[name].value == pytest.approx(found[1].means[name].value, abs=1e-9)
    if not within:
        assert found[0].means["top1_k20"].value == pytest.approx(25)


def test_the_order_of_rows_changes_nothing() -> None:
    train, labels = clouds(150, distance=1, seed=0)
    queries, query_labels = clouds(60, distance=1, seed=1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    names = [f"{place}.jpg" for place in range(150)]
    one = measure(train, labels, queries, query_labels, train_names=names)
    other = measure(
        train[order], labels[order], queries, query_labels, train_names=[names[place] for place in order]
    )
    for name, estimate in one.means.items():
        # The probe sums in another order: one query on a border may go to the other side.
        slack = 100 / 60 + 1e-6 if name == "linear" else 1e-9
        assert other.means[name].value == pytest.approx(estimate.value, abs=slack)


def test_a_query_without_its_class_in_the_gallery_counts_as_wrong_and_not_in_retrieval() -> None:
    train, labels = clouds(40, distance=9, seed=0)
    queries, query_labels = clouds(9, distance=9, seed=1)
    query_labels[8] = 4
    found = measure(train, labels, queries, query_labels, probe=False)
    assert found.means["top1_k10"].value == pytest.approx(100 * 8 / 9)
    assert (found.means["map"].queries, found.means["top1_k10"].queries) == (8, 9)


def test_queries_of_one_source_widen_the_interval() -> None:
    train, labels = clouds(80, distance=1, seed=0)
    queries, query_labels = clouds(20, distance=1, seed=1)
    many, many_labels = queries.repeat(10, 1), query_labels.repeat(10)
    alone = measure(train, labels, many, many_labels, probe=False).means["top1_k10"]
    shared = measure(
        train, labels, many, many_labels, sources_M=torch.arange(20).repeat(10), probe=False
    ).means["top1_k10"]
    assert shared.high - shared.low > 2.5 * (alone.high - alone.low)


def test_better_embeddings_are_seen_to_be_better() -> None:
    train, labels = clouds(400, distance=1.5, seed=0)
    queries, query_labels = clouds(300, distance=1.5, seed=1)
    noise = torch.randn(700, 8, generator=torch.Generator().manual_seed(2))
    plain = measure(train, labels, queries, query_labels, probe=False)
    blurred = measure(train + noise[:400], labels, queries + noise[400:], query_labels, probe=False)
    for name in ("top1_k20", "map"):
        assert difference(plain.means[name], blurred.means[name]).verdict == "better"


def test_perfect_embeddings_are_perfect() -> None:
    labels = torch.arange(200) % 5
    features = functional.one_hot(labels, 5).float()
    found = measure_within(features, labels)
    assert {one.value for one in found.means.values()} == {100}
    assert all(one.low < 100 for one in found.means.values()), "two hundred right ones prove no 100 %"
