"""The official runs on ImageNet, step for step.

Source: facebookresearch/dino, README and the defaults of `main_dino.py` (epochs there, steps here).
"""

from dataclasses import dataclass

from training.config import (
    BackboneConfig,
    CropsConfig,
    EvaluationConfig,
    HeadConfig,
    LoadingConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
)
from training.recipes.size import Resolved, RunSize, at_most

# 1.28 M canvases of 288 px would take 319 GB: they are decoded anew each epoch.
_LOADING = LoadingConfig(cache="off")


@dataclass(frozen=True)
class _Epochs:
    """The official schedules, which count epochs, in steps of this run."""

    total: int
    batch_size: int
    steps: int

    @classmethod
    def of(cls, size: RunSize, total: int, *, batch_size: int) -> "_Epochs":
        batch_size = size.batch(batch_size)
        return cls(total, batch_size, size.steps_for(total, batch_size=batch_size))

    def in_steps(self, epochs: int) -> int:
        return epochs * max(1, self.steps // self.total)

    @property
    def evaluation(self) -> EvaluationConfig:
        return EvaluationConfig(every_steps=self.in_steps(5), max_bank_images=50_000, max_query_images=5000)


def vit_small_16_imagenet(size: RunSize) -> Resolved:
    """Official ViT-S/16 on ImageNet, 100 epochs: 69.3 % k-NN, 74.0 % linear, 1.75 days on 8 V100.

    The README's "vanilla" run: every default of `main_dino.py`, batch 8 x 64.
    """
    epochs = _Epochs.of(size, 100, batch_size=512)
    return Resolved(_vit_small_16(epochs, recipe="vit-small-16-imagenet"))


def vit_small_16_imagenet_boost(size: RunSize) -> Resolved:
    """Official ViT-S/16 on ImageNet, 300 epochs: 73.3 % k-NN, 76.0 % linear, 2.6 days on 16 V100.

    The README's "boost" run: a teacher temperature that rises from 0.04 to 0.07 over 30 epochs, prototypes
    whose lengths learn, batch 16 x 64.
    """
    epochs = _Epochs.of(size, 300, batch_size=1024)
    config = _vit_small_16(epochs, recipe="vit-small-16-imagenet-boost")
    loss = LossConfig(
        teacher_temperature=0.07,
        teacher_temperature_start=0.04,
        teacher_temperature_warmup_steps=at_most(epochs.in_steps(30), epochs.steps, share=0.3),
        teacher_temperature_hold_steps=epochs.in_steps(1),
    )
    return Resolved(config.model_copy(update={"loss": loss, "head": HeadConfig(norm_last_layer=False)}))


def resnet50_imagenet(size: RunSize) -> Resolved:
    """Official ResNet-50 on ImageNet, 100 epochs: the README's recipe; its 800 epochs reach 67.5 % k-NN.

    SGD with a constant weight decay, larger global and smaller local crops than a ViT's; batch 8 x 64.
    """
    epochs = _Epochs.of(size, 100, batch_size=512)
    return Resolved(
        RunConfig(
            recipe="resnet50-imagenet",
            steps=epochs.steps,
            batch_size=epochs.batch_size,
            precision="bf16",
            backbone=BackboneConfig(name="resnet50", drop_path=0.0),
            crops=CropsConfig(global_area=(0.14, 1.0), local_area=(0.05, 0.14)),
            teacher=TeacherConfig(),
            optimizer=OptimizerConfig(
                name="sgd",
                peak_lr=0.03 * epochs.batch_size / 256,
                warmup_steps=at_most(epochs.in_steps(10), epochs.steps, share=0.1),
                weight_decay_start=1e-4,
                weight_decay_end=1e-4,
                freeze_last_layer_steps=at_most(epochs.in_steps(1), epochs.steps, share=0.1),
            ),
            loading=_LOADING,
            evaluation=epochs.evaluation,
        )
    )


def _vit_small_16(epochs: _Epochs, *, recipe: str) -> RunConfig:
    return RunConfig(
        recipe=recipe,
        steps=epochs.steps,
        batch_size=epochs.batch_size,
        precision="bf16",  # official: float16 with a scaler; bf16 has the same speed and no overflow
        optimizer=OptimizerConfig(
            peak_lr=5e-4 * epochs.batch_size / 256,
            warmup_steps=at_most(epochs.in_steps(10), epochs.steps, share=0.1),
            freeze_last_layer_steps=at_most(epochs.in_steps(1), epochs.steps, share=0.1),
        ),
        loading=_LOADING,
        evaluation=epochs.evaluation,
    )
