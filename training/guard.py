"""Names what a run suffers from, and what to change.

The teacher's mean entropy h and the entropy H of its mean answer say all: H - h is what its answer tells
about which image it saw. Where that is nothing, the run has collapsed, whatever the loss does (Caron et al.
2021, section 5.3).
"""

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from training.config import GuardConfig
from training.step import StepMetrics

# Nats of information about the image below which the answers are taken to be the same. A healthy run is
# above 1; float32 entropies of 65,536 prototypes are exact to about 1e-4.
LEAST_INFORMATION_NATS = 0.02
UNIFORM_SHARE = 0.95
ONE_PROTOTYPE_SHARE = 0.05


# A batch by chance of images that are all alike is rare, so many in a row are none by chance.
DEAD_BATCHES = 20
_LOOKED_AT_PX = 32  # of each side: as good as all pixels, and a hundredth of the time


class Sickness(Enum):
    """What a run can suffer from; the value is the advice."""

    UNIFORM = (
        "the teacher gives every prototype the same weight (its entropy is that of a uniform answer, ln K): "
        "centring won over sharpening. Lower --loss.teacher-temperature, or lengthen "
        "--loss.teacher-temperature-warmup-steps; with few images lower --head.num-prototypes"
    )
    ONE_PROTOTYPE = (
        "the teacher answers every image with the same prototype: sharpening won over centring. Raise "
        "--loss.teacher-temperature, lower --loss.center-momentum, lengthen "
        "--optimizer.freeze-last-layer-steps, or lower --optimizer.peak-lr"
    )
    SAME_ANSWER = (
        "the teacher gives every image the same answer, so there is nothing left to learn. Lower "
        "--optimizer.peak-lr, raise --teacher.momentum-start, and look at the images: are they all alike?"
    )
    ONE_COLOUR = (
        f"every image of {DEAD_BATCHES} batches in a row is of a single colour, so there is nothing to learn "
        "from. Look at preview.png in the run's folder and at the files (dino-train check DATA). If these "
        "are well, remove its cache or use --loading.cache off; for more than 8 bits a channel set "
        "--loading.scale-low and --loading.scale-high to the range of the values"
    )
    SAME_PICTURE = (
        f"{DEAD_BATCHES} batches in a row hold one and the same picture, so there is nothing to tell apart. "
        "Look for copies (dino-train check DATA) and at preview.png in the run's folder. If the files "
        "differ, remove the run's cache or use --loading.cache off"
    )
    NOT_FINITE = (
        "gradients are NaN or infinite; these steps were skipped, and weights, teacher and centre are as "
        "before. Lower --optimizer.peak-lr or --optimizer.clip-norm, or use --precision float32"
    )


def information_nats(prototype_usage: float, teacher_entropy_nats: float, *, num_prototypes: int) -> float:
    """What the teacher's answer tells about the image: entropy of its mean answer less its mean entropy.

    Args:
        prototype_usage: Share of the prototypes that the mean answer uses, exp(its entropy) / K.
        teacher_entropy_nats: Mean entropy of the answers.
        num_prototypes: K.
    """
    return math.log(max(prototype_usage * num_prototypes, 1e-9)) - teacher_entropy_nats


def diagnose(metrics: StepMetrics, *, num_prototypes: int) -> Sickness | None:
    """What one step looks like; a single step proves nothing yet."""
    if not metrics.is_finite:
        return None if metrics.overflowed else Sickness.NOT_FINITE
    told_nats = information_nats(
        metrics.prototype_usage, metrics.teacher_entropy_nats, num_prototypes=num_prototypes
    )
    if told_nats > LEAST_INFORMATION_NATS:
        return None
    share = metrics.teacher_entropy_nats / math.log(num_prototypes)
    if share > UNIFORM_SHARE:
        return Sickness.UNIFORM
    return Sickness.ONE_PROTOTYPE if share < ONE_PROTOTYPE_SHARE else Sickness.SAME_ANSWER


def look_of(pixels_BCHW: Tensor) -> Sickness | None:
    """What a batch of canvases looks like, uint8 on the host; a single batch proves nothing yet."""
    side = max(1, pixels_BCHW.shape[-1] // _LOOKED_AT_PX)
    seen_BCP = pixels_BCHW[:, :, ::side, ::side].flatten(2)
    if bool((seen_BCP == seen_BCP[:, :, :1]).all()):
        return Sickness.ONE_COLOUR
    if len(seen_BCP) > 1 and bool((seen_BCP == seen_BCP[:1]).all()):
        return Sickness.SAME_PICTURE
    return None


@dataclass
class Guard:
    """Counts how long a sickness has lasted; it changes nothing of the training."""

    config: GuardConfig
    num_prototypes: int
    sickness: Sickness | None = None
    lasted_steps: int = 0
    look: Sickness | None = None
    alike_batches: int = 0

    def look_at(self, pixels_BCHW: Tensor) -> Sickness | None:
        """Looks at the images of a step, and names what is wrong when it has been so for many batches."""
        found = look_of(pixels_BCHW)
        self.alike_batches = self.alike_batches + 1 if found is self.look else 1
        self.look = found
        return found if self.alike_batches == DEAD_BATCHES else None

    def observe(self, metrics: StepMetrics) -> Sickness | None:
        """Looks at a step, and names a sickness at the moment when it has lasted long enough."""
        found = diagnose(metrics, num_prototypes=self.num_prototypes)
        self.lasted_steps = self.lasted_steps + 1 if found is self.sickness else 1
        self.sickness = found
        patience = (
            self.config.max_nonfinite_steps if found is Sickness.NOT_FINITE else self.config.patience_steps
        )
        return found if found is not None and self.lasted_steps == patience else None
