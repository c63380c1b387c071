"""Category retrieval against its definition, one query and one rank at a time."""

import pytest
import torch
from torch.nn import functional

from training.evaluation import retrieval as module
from training.evaluation.retrieval import neighbour_overlap, retrieval


def embeddings(count: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    vectors = torch.randn(count, 6, generator=generator) + torch.eye(4, 6)[labels]
    return functional.normalize(vectors, dim=1), labels


def literally(
    gallery: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, label: int, *, but: int = -1
) -> tuple[float, float]:
    order = sorted((i for i in range(len(gallery)) if i != but), key=lambda i: -float(gallery[i] @ query))
    precisions, found = [], 0
    for rank, place in enumerate(order, start=1):
        if int(labels[place]) == label:
            found += 1
            precisions.append(found / rank)
    return float(int(labels[order[0]]) == label), sum(precisions) / len(precisions)


def test_queries_against_a_gallery_equal_the_definition() -> None:
    gallery, labels = embeddings(50, seed=0)
    queries, query_labels = embeddings(20, seed=1)
    first, average = retrieval(gallery, labels, queries, query_labels)
    for place in range(20):
        expected = literally(gallery, labels, queries[place], int(query_labels[place]))
        assert (float(first[place]), float(average[place])) == pytest.approx(expected, abs=1e-6)


def test_each_image_asks_for_the_others_and_never_finds_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, labels = embeddings(30, seed=2)
    monkeypatch.setattr(module, "QUERIES_A_CHUNK", 7)  # so that there are several chunks
    first, average = retrieval(gallery, labels)
    for place in range(30):
        expected = literally(gallery, labels, gallery[place], int(labels[place]), but=place)
        assert (float(first[place]), float(average[place])) == pytest.approx(expected, abs=1e-6)


def test_perfect_embeddings_are_perfect() -> None:
    labels = torch.arange(5).repeat_interleave(4)
    first, average = retrieval(torch.eye(5)[labels], labels)
    assert first.tolist() == average.tolist() == [1.0] * 20


def test_a_query_whose_class_is_nowhere_has_no_number() -> None:
    first, average = retrieval(torch.eye(3), torch.tensor([0, 0, 1]))
    assert first.isnan().tolist() == average.isnan().tolist() == [False, False, True]


def test_a_network_that_answers_all_alike_gets_what_chance_gets_in_any_order_of_files() -> None:
    """Sorted by class it had a mean AP of 0.655, shuffled 0.536, by how the sort broke ties."""
    labels = torch.arange(4).repeat_interleave(6)
    same = torch.full((24, 8), 8**-0.5)
    # Five of the 23 others are right: the mean over all orders, by the closed form for one rank at a time.
    at_rank = [5 / 23 * (1 + (rank - 1) * 4 / 22) / rank for rank in range(1, 24)]
    generator = torch.Generator().manual_seed(0)
    for order in (torch.arange(24), torch.randperm(24, generator=generator)):
        first, average = retrieval(same, labels[order])
        assert first.tolist() == pytest.approx([5 / 23] * 24)
        assert average.tolist() == pytest.approx([sum(at_rank) / 5] * 24)


def test_shared_neighbours_by_hand() -> None:
    angles = torch.tensor([0.0, 0.3, 0.9, 1.2, 2.0])
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    queries = torch.tensor([[1.0, 0.0]])
    turned = torch.stack([torch.tensor(0.85).cos(), torch.tensor(0.85).sin()])[None]  # nearest: 2, 3, then 1
    overlaps = [neighbour_overlap((queries, gallery), (turned, gallery), k=k).tolist() for k in (1, 2, 3, 5)]
    assert overlaps == [[0], [0], [pytest.approx(2 / 3)], [1]]
    # Each without itself: the ends have one neighbour in common with what the mirrored circle says.
    mirrored = gallery * torch.tensor([1.0, -1.0])
    assert neighbour_overlap((gallery, gallery), (mirrored, mirrored), k=2, alone=True).tolist() == [1] * 5


def test_rankings_that_know_nothing_share_what_chance_shares() -> None:
    gallery, _ = embeddings(40, seed=0)
    same = torch.ones(40, 1)
    overlap = neighbour_overlap((gallery, gallery), (same, same), k=10, alone=True)
    assert overlap.tolist() == pytest.approx([10 / 39] * 40)
