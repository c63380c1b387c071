"""Closed forms at the edges, the official list of values, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_core.schedules import cosine, linear_warmup, warmup_cosine
from tests.references import dino_loop


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        pytest.param(0, 0.996, id="the first step has the start"),
        pytest.param(5, 0.998, id="half way is the middle"),
        pytest.param(10, 1.0, id="one past the last step has the end"),
    ],
)
def test_cosine_meets_its_ends_and_its_middle(step: int, expected: float) -> None:
    assert cosine(step, start=0.996, end=1.0, total_steps=10) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        pytest.param(0, 0.0, id="warm-up begins at its start"),
        pytest.param(2, 0.5, id="half way up"),
        pytest.param(4, 1.0, id="the last step of the warm-up has the peak already"),
        pytest.param(5, 1.0, id="and so has the first of the cosine"),
        pytest.param(10, 0.6, id="half way down"),
        pytest.param(15, 0.2, id="one past the last step"),
    ],
)
def test_warmup_cosine_goes_up_like_linspace_and_down_like_a_cosine(step: int, expected: float) -> None:
    value = warmup_cosine(step, peak=1.0, end=0.2, total_steps=15, warmup_steps=5)
    assert value == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("warmup_steps", "expected"),
    [
        pytest.param(0, [0.07, 0.07, 0.07], id="no warm-up"),
        pytest.param(1, [0.04, 0.07, 0.07], id="a warm-up of one step is its start"),
        pytest.param(2, [0.04, 0.07, 0.07], id="of two steps, both ends"),
        pytest.param(3, [0.04, 0.055, 0.07], id="of three steps, the middle too"),
    ],
)
def test_linear_warmup_is_linspace_then_constant(warmup_steps: int, expected: list[float]) -> None:
    values = [linear_warmup(step, start=0.04, end=0.07, warmup_steps=warmup_steps) for step in range(3)]
    assert values == pytest.approx(expected, abs=1e-15)


def test_warmup_can_start_above_zero() -> None:
    value = warmup_cosine(0, peak=1.0, end=0.0, total_steps=9, warmup_steps=3, warmup_start=0.25)
    assert value == 0.25


@given(
    steps=st.integers(2, 60),
    warmup_share=st.floats(0, 0.99),
    base=st.floats(1e-6, 10),
    final=st.floats(0, 10),
)
def test_a_whole_run_equals_the_official_list(
    steps: int, warmup_share: float, base: float, final: float
) -> None:
    warmup_steps = int(warmup_share * steps)
    values = [
        warmup_cosine(step, peak=base, end=final, total_steps=steps, warmup_steps=warmup_steps)
        for step in range(steps)
    ]
    official = dino_loop.schedule(base=base, final=final, steps=steps, warmup_steps=warmup_steps)
    assert values == pytest.approx(official, abs=1e-12)
    assert values[:warmup_steps] == pytest.approx(np.linspace(0, base, warmup_steps).tolist(), abs=1e-12)


@given(step=st.integers(0, 50), start=st.floats(-5, 5), end=st.floats(-5, 5))
def test_a_cosine_stays_between_its_ends(step: int, start: float, end: float) -> None:
    value = cosine(step, start=start, end=end, total_steps=50)
    assert min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside the schedule of 10 steps"):
        cosine(step, start=1.0, end=0.0, total_steps=10)
    with pytest.raises(ValueError, match="outside the schedule of 10 steps"):
        warmup_cosine(step, peak=1.0, end=0.0, total_steps=10, warmup_steps=2)


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        cosine(0, start=1.0, end=0.0, total_steps=0)


@pytest.mark.parametrize("warmup_steps", [-1, 10, 11])
def test_a_warmup_that_leaves_no_run_is_refused(warmup_steps: int) -> None:
    with pytest.raises(ValueError, match="shorten the warm-up or lengthen the run"):
        warmup_cosine(0, peak=1.0, end=0.0, total_steps=10, warmup_steps=warmup_steps)


@pytest.mark.parametrize(("step", "warmup_steps"), [(-1, 5), (0, -5)])
def test_negative_counts_are_refused(step: int, warmup_steps: int) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        linear_warmup(step, start=0.0, end=1.0, warmup_steps=warmup_steps)
