"""The guard: each sickness by its name, only when it lasts, and never a healthy step."""

import math

import pytest
import torch

from training.config import GuardConfig
from training.guard import DEAD_BATCHES, Guard, Sickness, diagnose, look_of
from training.step import StepMetrics

K = 256


def metrics(*, entropy: float, mean_answer_entropy: float, finite: bool = True) -> StepMetrics:
    return StepMetrics(
        loss_nats=entropy + 0.1,
        teacher_entropy_nats=entropy,
        kl_nats=0.1,
        prototype_usage=math.exp(mean_answer_entropy) / K,
        gradient_norm=1.0,
        is_finite=finite,
    )


HEALTHY = metrics(entropy=3.0, mean_answer_entropy=4.5)
UNIFORM = metrics(entropy=math.log(K) - 0.01, mean_answer_entropy=math.log(K))
ONE = metrics(entropy=0.01, mean_answer_entropy=0.01)
SAME = metrics(entropy=2.0, mean_answer_entropy=2.01)
NAN = metrics(entropy=math.nan, mean_answer_entropy=0.0, finite=False)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        pytest.param(HEALTHY, None, id="healthy"),
        pytest.param(metrics(entropy=0.01, mean_answer_entropy=4.0), None, id="sure of many prototypes"),
        pytest.param(metrics(entropy=5.3, mean_answer_entropy=5.5), None, id="unsure, but of each image"),
        pytest.param(UNIFORM, Sickness.UNIFORM, id="uniform"),
        pytest.param(ONE, Sickness.ONE_PROTOTYPE, id="one prototype"),
        pytest.param(SAME, Sickness.SAME_ANSWER, id="the same answer"),
        pytest.param(NAN, Sickness.NOT_FINITE, id="NaN"),
    ],
)
def test_each_sickness_has_its_name(step: StepMetrics, expected: Sickness | None) -> None:
    assert diagnose(step, num_prototypes=K) is expected


def test_a_sickness_is_named_once_when_it_has_lasted() -> None:
    guard = Guard(GuardConfig(patience_steps=3), K)
    said = [guard.observe(step) for step in [UNIFORM, UNIFORM, HEALTHY, UNIFORM, UNIFORM, UNIFORM, UNIFORM]]
    assert said == [None, None, None, None, None, Sickness.UNIFORM, None]


def test_a_change_of_sickness_starts_the_count_again() -> None:
    guard = Guard(GuardConfig(patience_steps=3), K)
    assert [guard.observe(step) for step in [UNIFORM, UNIFORM, ONE, ONE, ONE]] == [None] * 4 + [
        Sickness.ONE_PROTOTYPE
    ]


def test_bad_gradients_have_a_patience_of_their_own() -> None:
    guard = Guard(GuardConfig(patience_steps=100, max_nonfinite_steps=2), K)
    assert [guard.observe(NAN), guard.observe(NAN)] == [None, Sickness.NOT_FINITE]


def test_every_sickness_says_what_to_change() -> None:
    assert all("--" in sickness.value for sickness in Sickness)


def pictures(count: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)


def one_colour_each(count: int = 4) -> torch.Tensor:
    return pictures(count)[:, :, :1, :1].expand(count, 3, 40, 40).contiguous()


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        pytest.param(pictures(), None, id="pictures"),
        pytest.param(torch.zeros(4, 3, 40, 40, dtype=torch.uint8), Sickness.ONE_COLOUR, id="black"),
        pytest.param(one_colour_each(), Sickness.ONE_COLOUR, id="each of another colour"),
        pytest.param(torch.cat([one_colour_each(3), pictures(1)]), None, id="one picture among them"),
        pytest.param(pictures(1).expand(4, -1, -1, -1), Sickness.SAME_PICTURE, id="one picture four times"),
        pytest.param(pictures(1), None, id="a batch of one"),
    ],
)
def test_batches_that_tell_nothing_have_names(pixels: torch.Tensor, expected: Sickness | None) -> None:
    assert look_of(pixels) is expected


def test_dead_batches_are_named_once_when_there_are_many_in_a_row() -> None:
    guard, black = Guard(GuardConfig(), K), torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    looks = [black] * (DEAD_BATCHES - 1) + [pictures()] + [black] * (DEAD_BATCHES + 5)
    said = [guard.look_at(batch) for batch in looks]
    assert said.index(Sickness.ONE_COLOUR) == 2 * DEAD_BATCHES - 1
    assert said.count(None) == len(said) - 1
