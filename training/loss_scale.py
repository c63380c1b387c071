"""The factor by which losses are raised so that float16 can hold their gradients.

Gradients below 6e-8 are zero in float16, and above 65,504 infinite: the factor keeps them between, and
follows them as they change.

Reference: Micikevicius et al. 2018, section 3.2, https://arxiv.org/abs/1710.03740; numbers are those of
`torch.amp.GradScaler`
"""

from dataclasses import dataclass

FIRST = 65_536.0
LEAST = 1.0  # below it gradients would be too large for float16 by themselves
GROWS_AFTER_STEPS = 2000


@dataclass(frozen=True)
class LossScale:
    """A power of two, so that multiplying by it rounds nothing.

    Attributes:
        value: What the loss is multiplied by, and gradients are divided by.
        good_steps: Steps with finite gradients since it last changed.
    """

    value: float = FIRST
    good_steps: int = 0

    @property
    def can_fall(self) -> bool:
        """Whether gradients that are not finite may be so for the scale alone."""
        return self.value > LEAST

    def after(self, *, is_finite: bool) -> "LossScale":
        """What the next step takes: half after gradients that were not finite, twice after many that were."""
        if not is_finite:
            return LossScale(max(self.value / 2, LEAST))
        if self.good_steps + 1 == GROWS_AFTER_STEPS:
            return LossScale(self.value * 2)
        return LossScale(self.value, self.good_steps + 1)
