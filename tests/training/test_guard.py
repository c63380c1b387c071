"""The guard: each sickness by its name, only when it lasts, and never a healthy step."""

import math

import pytest

from training.config import GuardConfig
from training.guard import Guard, Sickness, diagnose
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
