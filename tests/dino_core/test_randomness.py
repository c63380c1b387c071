"""The counter hash: pinned values, uniformity, independence of slots, images, crops, epochs and seeds."""

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_core.randomness import shuffled, streams, uniforms

MANY = np.arange(20_000)
PINNED = np.array([[0.9542744484170231, 0.46508849217517256], [0.38536695165595003, 0.4140692450605361]])


def test_the_numbers_never_change() -> None:
    """A run is resumed and repeated by these numbers: a new hash would be a new experiment."""
    numbers = uniforms(streams(seed=7, epoch=3, crop=1, indices_B=np.array([0, 5])), slot=20, count=2)
    np.testing.assert_array_equal(numbers, PINNED)


def test_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = uniforms(streams(seed=0, epoch=0, crop=0, indices_B=MANY), slot=0, count=4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.stack([np.histogram(numbers[:, slot], bins=50, range=(0, 1))[0] for slot in range(4)])
    chi_square = ((counts - 400) ** 2 / 400).sum(axis=1)
    assert (chi_square < 90).all()  # 49 degrees of freedom: above 90 once in 3,000


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"epoch": 1}, id="epoch"),
        pytest.param({"crop": 1}, id="crop"),
        pytest.param({"slot": 1}, id="slot"),
        pytest.param({"shift": 1}, id="neighbouring image"),
    ],
)
def test_changing_one_coordinate_gives_unrelated_numbers(other: dict[str, int]) -> None:
    def numbers(
        seed: int = 0, epoch: int = 0, crop: int = 0, slot: int = 0, shift: int = 0
    ) -> NDArray[np.float64]:
        chosen = streams(seed=seed, epoch=epoch, crop=crop, indices_B=MANY + shift)
        return uniforms(chosen, slot=slot)[:, 0]

    one, two = numbers() - 0.5, numbers(**other) - 0.5
    correlation = 12 * float((one * two).mean())  # 1/12: the variance of a uniform number
    assert abs(correlation) < 4 / np.sqrt(len(MANY))


def test_swapping_coordinates_gives_other_numbers() -> None:
    one = streams(seed=1, epoch=2, crop=3, indices_B=MANY)
    assert (one != streams(seed=2, epoch=1, crop=3, indices_B=MANY)).all()
    assert (one != streams(seed=1, epoch=3, crop=2, indices_B=MANY)).all()


def test_a_count_of_slots_is_the_slots_one_by_one() -> None:
    chosen = streams(seed=0, epoch=0, crop=0, indices_B=MANY)
    together = uniforms(chosen, slot=5, count=3)
    np.testing.assert_array_equal(together[:, 2], uniforms(chosen, slot=7)[:, 0])


def test_any_integer_is_a_seed() -> None:
    seeds = (0, -1, 2**63, 2**64 - 2, 2**70 + 3)
    first = [int(streams(seed=seed, epoch=0, crop=0, indices_B=np.array([0]))[0]) for seed in seeds]
    assert len(set(first)) == len(seeds)


def test_an_order_is_a_permutation_and_epochs_differ() -> None:
    first, again, next_epoch, other_seed = (
        shuffled(1000, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert sorted(first) == list(range(1000))
    np.testing.assert_array_equal(first, again)
    for other in (next_epoch, other_seed, np.arange(1000)):
        assert (first == other).mean() < 0.01


def test_every_image_comes_early_as_often_as_late() -> None:
    positions = np.stack([np.argsort(shuffled(10, seed=0, epoch=epoch)) for epoch in range(2000)])
    np.testing.assert_allclose(positions.mean(axis=0), 4.5, atol=4 * 2.87 / np.sqrt(2000))
