"""Values that change over a run, as pure functions of the step.

There is no object and nothing to advance, so a resumed run needs no schedule state. A "step" is whatever unit
the caller counts in: DINO moves learning rate, weight decay and teacher momentum per iteration, and the
teacher's temperature per epoch.

Reference: `cosine_scheduler` of https://github.com/facebookresearch/dino, whose warm-up is `numpy.linspace`:
both ends are reached inside the warm-up, so its last step already has the peak.
"""

import math


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """Goes from `start` to `end` along half a cosine.

        end + (start - end) / 2 * (1 + cos(pi * step / total_steps))

    Args:
        step: From 0 to `total_steps`, both included. Step 0 gives `start` and step `total_steps` gives `end`,
            so the last step of a run (`total_steps - 1`) is close to `end` and not there.
        start: Value at step 0, in any unit.
        end: Value at step `total_steps`.
        total_steps: Length of the run; at least 1.

    Returns:
        The value at this step.

    Raises:
        ValueError: The step is outside the run.
    """
    _refuse_outside(step, total_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def linear_warmup(step: int, *, start: float, end: float, warmup_steps: int) -> float:
    """Goes from `start` to `end` in equal parts, then stays.

        numpy.linspace(start, end, warmup_steps)[step], then end

    Args:
        step: At least 0.
        start: Value at step 0.
        end: Value at step `warmup_steps - 1` and after.
        warmup_steps: 0 gives `end` from the start; 1 gives `start` once, as `numpy.linspace` does.

    Returns:
        The value at this step.

    Raises:
        ValueError: A count is negative.
    """
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"step ({step}) and warmup_steps ({warmup_steps}) must be at least 0")
    if step >= warmup_steps:
        return end
    return start + (end - start) * step / max(warmup_steps - 1, 1)


def warmup_cosine(
    step: int, *, peak: float, end: float, total_steps: int, warmup_steps: int, warmup_start: float = 0.0
) -> float:
    """Warms up linearly to `peak`, then goes down to `end` along half a cosine.

    Args:
        step: From 0 to `total_steps`, both included.
        peak: Value at the last step of the warm-up and at the first step of the cosine.
        end: Value at step `total_steps`.
        total_steps: Length of the run, the warm-up included.
        warmup_steps: From 0 to `total_steps - 1`.
        warmup_start: Value at step 0, if there is a warm-up.

    Returns:
        The value at this step.

    Raises:
        ValueError: The step is outside the run, or the warm-up is as long as the run.
    """
    _refuse_outside(step, total_steps)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps ({warmup_steps}) must be from 0 to total_steps - 1 ({total_steps - 1}): "
            "shorten the warm-up or lengthen the run"
        )
    if step < warmup_steps:
        return linear_warmup(step, start=warmup_start, end=peak, warmup_steps=warmup_steps)
    return cosine(step - warmup_steps, start=peak, end=end, total_steps=total_steps - warmup_steps)


def _refuse_outside(step: int, total_steps: int) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}: a schedule needs at least one step")
    if not 0 <= step <= total_steps:
        raise ValueError(f"step {step} is outside the schedule of {total_steps} steps")
