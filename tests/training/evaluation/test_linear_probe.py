"""The linear probe on sets whose answer is known."""

import pytest
import torch

from training.evaluation.drawing import held_out
from training.evaluation.linear_probe import Probe, linear_probe


def blobs(*, per_class: int, distance: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three round clouds; sorted by class, as folders are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(3, 8) * distance
    labels = torch.arange(3).repeat_interleave(per_class)
    return centres[labels] + torch.randn(len(labels), 8, generator=generator), labels


def probe_of(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor
) -> Probe:
    held_out_N = held_out([str(place) for place in range(len(train))])
    return linear_probe(train, labels, test, test_labels, held_out_N=held_out_N)


def test_clouds_that_lie_apart_are_told_apart() -> None:
    probe = probe_of(*blobs(per_class=50, distance=12), *blobs(per_class=20, distance=12, seed=1))
    assert probe.percent == 100


def test_labels_by_chance_are_named_by_chance() -> None:
    train, labels = blobs(per_class=100, distance=0)
    test, test_labels = blobs(per_class=200, distance=0, seed=1)
    assert probe_of(train, labels, test, test_labels).percent == pytest.approx(100 / 3, abs=7)


def test_clouds_that_overlap_come_near_the_best_possible() -> None:
    train, labels = blobs(per_class=400, distance=3)
    test, test_labels = blobs(per_class=400, distance=3, seed=1)
    nearest = torch.cdist(test, torch.eye(3, 8) * 3).argmin(dim=1)  # Bayes' classifier of equal clouds
    best = 100 * float((nearest == test_labels).float().mean())
    assert probe_of(train, labels, test, test_labels).percent == pytest.approx(best, abs=1.5)


def test_many_useless_dimensions_choose_a_stronger_penalty() -> None:
    generator = torch.Generator().manual_seed(2)
    train, labels = blobs(per_class=20, distance=3)
    test, test_labels = blobs(per_class=100, distance=3, seed=1)
    noisy = [
        torch.cat([part, torch.randn(len(part), 300, generator=generator)], dim=1) for part in (train, test)
    ]
    probe = probe_of(noisy[0], labels, noisy[1], test_labels)
    assert probe.strength > 0
    assert probe.percent > 45


def test_the_same_embeddings_give_the_same_probe() -> None:
    sets = (*blobs(per_class=30, distance=2), *blobs(per_class=30, distance=2, seed=1))
    assert torch.equal(probe_of(*sets).right_M, probe_of(*sets).right_M)


def test_the_strength_is_chosen_by_the_held_out_images_alone() -> None:
    train, labels = blobs(per_class=30, distance=2)
    test, test_labels = blobs(per_class=30, distance=2, seed=1)
    nothing = torch.zeros(90, dtype=torch.bool)
    assert linear_probe(train, labels, test, test_labels, held_out_N=nothing).strength == 0
    assert linear_probe(train, labels, test, test_labels, held_out_N=~nothing).strength == 0


def test_the_order_of_files_changes_nothing() -> None:
    """The held-out fifth was each fifth file: five classes in turn, and one of them was never trained."""
    labels = torch.arange(5).repeat(40)
    generator = torch.Generator().manual_seed(0)
    train = torch.eye(5, 12)[labels] * 1.5 + torch.randn(200, 12, generator=generator)
    test = torch.eye(5, 12)[labels] * 1.5 + torch.randn(200, 12, generator=generator)
    names = [f"{label}/{place}.jpg" for place, label in enumerate(labels.tolist())]
    chosen = held_out(names)
    assert set(labels[chosen].tolist()) == {0, 1, 2, 3, 4}
    order = torch.randperm(200, generator=generator)
    straight = linear_probe(train, labels, test, labels, held_out_N=chosen)
    shuffled = linear_probe(
        train[order], labels[order], test, labels, held_out_N=held_out([names[place] for place in order])
    )
    assert straight.strength == shuffled.strength > 0
    # Sums in another order move what lies on a border, and nothing else.
    assert int((straight.right_M != shuffled.right_M).sum()) <= 1
