"""What a recipe is resolved from, and what it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from training.config import RunConfig
from training.starting import Start

IMAGENET_IMAGES = 1_281_167
IMAGENETTE_IMAGES = 9_469


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What a recipe is resolved from.

    Attributes:
        num_images: Images to train on.
        batch_size: Images a step, if the user set it.
        steps: Updates, if the user set them.
        device: What it will run on.
        start: The weights that the network begins with, if the user named some.
        side_px: Median of the images' shorter sides, if it is known.
    """

    num_images: int
    batch_size: int | None = None
    steps: int | None = None
    device: Literal["cpu", "cuda"] = "cuda"
    start: Start | None = None
    side_px: int | None = None

    def batch(self, recommended: int) -> int:
        """The user's batch size, else the recommended one, but never more images than there are."""
        return self.batch_size or min(recommended, self.num_images)

    def steps_for(self, epochs: float, *, batch_size: int) -> int:
        """The user's number of steps, else those of so many passes over the images."""
        return self.steps or max(1, round(epochs * (self.num_images // batch_size)))


@dataclass(frozen=True)
class Resolved:
    """All settings of a run, and why they are what they are.

    Attributes:
        config: The settings.
        reasons: For each setting that follows from the data or the machine, by its dotted name, a sentence.
    """

    config: RunConfig
    reasons: Mapping[str, str] = field(default_factory=dict)


Recipe = Callable[[RunSize], Resolved]


def at_most(warmup_steps: int, steps: int, *, share: float) -> int:
    """The wanted warm-up, capped at a share of the run: a short run must leave its warm-up too."""
    return min(warmup_steps, int(steps * share))
