"""Runs with a name: each is a function that returns all settings of a run.

A recipe knows how many images there are and, where the user asks for them, the batch size and the number of
steps; everything that is counted in steps follows from those, so that a shorter run has shorter warm-ups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from training.config import (
    BackboneConfig,
    CheckpointConfig,
    CropsConfig,
    EvaluationConfig,
    GuardConfig,
    HeadConfig,
    LoadingConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
)

IMAGENET_IMAGES = 1_281_167
IMAGENETTE_IMAGES = 9_469


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """What a recipe is resolved from.

    Attributes:
        num_images: Images to train on.
        batch_size: Images a step, if the user set it.
        steps: Updates, if the user set them.
    """

    num_images: int
    batch_size: int | None = None
    steps: int | None = None

    def batch(self, recommended: int) -> int:
        """The user's batch size, else the recommended one, but never more images than there are."""
        return self.batch_size or min(recommended, self.num_images)

    def steps_for(self, epochs: float, *, batch_size: int) -> int:
        """The user's number of steps, else those of so many passes over the images."""
        return self.steps or max(1, round(epochs * (self.num_images // batch_size)))


Recipe = Callable[[RunSize], RunConfig]


def cpu(size: RunSize) -> RunConfig:
    """Two cores and about 10,000 small images: a useful teacher in under an hour.

    ResNet-10-T (timm; 4.9 M weights, 20 MB, 512 dimensions) at 64 px. A convolutional network, as it needs
    no data to learn that pictures are local; with BatchNorm in the head, as the published small runs have it
    (lightly's Imagenette benchmark, 87.3 % with a ResNet-18 in 75 minutes on an A6000).
    """
    batch_size = size.batch(64)  # small steps, many of them: the paper loses 2 points from batch 1024 to 128
    # 96,000 images, ten passes over 10k, however many there are to choose from: one busy core of an AMD EPYC
    # was seen to take 16 a second, so that two should need 50 minutes.
    steps = size.steps or max(1, 96_000 // batch_size)
    return RunConfig(
        recipe="cpu",
        steps=steps,
        batch_size=batch_size,
        backbone=BackboneConfig(name="resnet10t", image_size_px=64, drop_path=0.0),
        # K: 10k images hold no 65,536 clusters; 2048 costs 0.5 M weights, and the head stays cheaper than
        # the network.
        head=HeadConfig(num_prototypes=2048, hidden_dim=1024, bottleneck_dim=256, batch_norm=True),
        # 64 and 32 px: the student computes 2 * 64^2 + 4 * 32^2 = 12k pixels an image, a tenth of one 384-px
        # picture. Blur is given in pixels and made for 224 px; 64 px want a third of it.
        crops=CropsConfig(
            global_px=64,
            local_px=32,
            local_count=4,
            global_area=(0.3, 1.0),
            local_area=(0.05, 0.3),
            blur_probability=(0.5, 0.1, 0.3),
            blur_sigma_px=(0.1, 0.8),
        ),
        loss=LossConfig(
            # Sharper than ImageNet's 0.04: on 10k images that leaves targets so flat that the student learns
            # their mean (docs/lab-notes.md, 2026-11-24; lightly-train, too, takes 0.02 below 20k images).
            teacher_temperature=0.02,
            teacher_temperature_start=0.02,
            center_momentum=0.9,
        ),
        # A step sees 1/150 of the images, so the teacher averages the last 100 steps, then ever more of them.
        teacher=TeacherConfig(momentum_start=0.99, momentum_end=1.0),
        optimizer=OptimizerConfig(
            name="adamw",
            peak_lr=1e-3 * batch_size / 64,
            end_lr=1e-5,
            warmup_steps=_at_most(200, steps, share=0.1),
            weight_decay_start=0.04,
            weight_decay_end=0.1,
            clip="global",
            clip_norm=3.0,
            freeze_last_layer_steps=_at_most(150, steps, share=0.05),  # an epoch of 10k images, as official
        ),
        # 96 px: a crop of a third of the area still has 55 real pixels a side.
        loading=LoadingConfig(canvas_px=96, workers=2),
        # Objects look larger in random crops than in whole pictures; a larger test picture evens that out
        # (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").
        # 3,000 pictures of 96 px take two cores 12 s: nine measurements are 4 % of 45 minutes.
        evaluation=EvaluationConfig(
            every_steps=max(1, steps // 8),
            max_bank_images=2000,
            max_query_images=1000,
            resize_px=96,
            crop_px=96,
        ),
        checkpoints=CheckpointConfig(every_steps=100),
        guard=GuardConfig(patience_steps=max(50, steps // 10)),
    )


def smoke(size: RunSize) -> RunConfig:
    """A minute on any machine; proves the path, not the method."""
    batch_size = size.batch(16)
    steps = size.steps or 20
    return RunConfig(
        recipe="smoke",
        steps=steps,
        batch_size=batch_size,
        backbone=BackboneConfig(name="test_resnet.r160_in1k", image_size_px=32, drop_path=0.0),
        head=HeadConfig(num_prototypes=64, hidden_dim=64, bottleneck_dim=32),
        crops=CropsConfig(global_px=32, local_px=16, local_count=2, blur_sigma_px=(0.1, 0.4)),
        teacher=TeacherConfig(momentum_start=0.9, momentum_end=1.0),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=_at_most(5, steps, share=0.25), clip="global"),
        loading=LoadingConfig(canvas_px=48, workers=2, cache=False),
        evaluation=EvaluationConfig(
            every_steps=max(1, steps // 2),
            max_bank_images=300,
            max_query_images=100,
            resize_px=32,
            crop_px=32,
        ),
        checkpoints=CheckpointConfig(every_steps=10),
    )


def vit_small_16_imagenet(size: RunSize) -> RunConfig:
    """Official ViT-S/16 on ImageNet, 100 epochs: 69.3 % k-NN, 74.0 % linear, 1.75 days on 8 V100.

    Source: facebookresearch/dino, README ("vanilla" run) and `main_dino.py` defaults.
    """
    batch_size = size.batch(512)
    steps = size.steps_for(100, batch_size=batch_size)
    epoch_steps = max(1, steps // 100)
    return RunConfig(
        recipe="vit_small_16_imagenet",
        steps=steps,
        batch_size=batch_size,
        precision="bf16",  # official: float16 with a scaler; bf16 has the same speed and no overflow
        optimizer=OptimizerConfig(
            peak_lr=5e-4 * batch_size / 256,
            warmup_steps=_at_most(10 * epoch_steps, steps, share=0.1),
            freeze_last_layer_steps=_at_most(epoch_steps, steps, share=0.1),
        ),
        loading=LoadingConfig(cache=False),  # 1.28 M canvases of 288 px would take 319 GB
        evaluation=EvaluationConfig(
            every_steps=5 * epoch_steps, max_bank_images=50_000, max_query_images=5000
        ),
    )


def resnet18_imagenette(size: RunSize) -> RunConfig:
    """ResNet-18 on Imagenette at 128 px, 200 epochs at batch 256: 87.3 % k-NN in 75 minutes on an A6000.

    Source: lightly-ai/lightly, `imagenette_benchmark.py` (k = 200, T = 0.1, best epoch of the student).
    """
    batch_size = size.batch(256)
    steps = size.steps_for(200, batch_size=batch_size)
    return RunConfig(
        recipe="resnet18_imagenette",
        steps=steps,
        batch_size=batch_size,
        backbone=BackboneConfig(name="resnet18", image_size_px=128, drop_path=0.0),
        head=HeadConfig(num_prototypes=2048, hidden_dim=2048, bottleneck_dim=256, batch_norm=True),
        crops=CropsConfig(global_px=128, local_px=64, local_count=6),
        teacher=TeacherConfig(momentum_start=0.99, momentum_end=0.99),
        optimizer=OptimizerConfig(
            name="sgd",
            peak_lr=0.06 * batch_size / 256,
            end_lr=0.0,
            weight_decay_start=5e-4,
            weight_decay_end=5e-4,
            clip="none",
        ),
        loading=LoadingConfig(canvas_px=160),
        evaluation=EvaluationConfig(
            every_steps=max(1, steps // 20), neighbours=200, max_bank_images=10_000, max_query_images=4000,
            resize_px=128, crop_px=128,
        ),
        checkpoints=CheckpointConfig(every_steps=500),
    )  # fmt: skip


def small_data(size: RunSize) -> RunConfig:
    """Your own pictures, thousands to hundreds of thousands, on one GPU: values follow from their number.

    Steps K, temperature and momentum by the size of the data as lightly-train's DINO does (its documented
    table), with every warm-up capped at a share of the run: there, a short run never leaves its warm-up.
    """
    batch_size = size.batch(128)
    # 100 passes, and no fewer than 12,500 updates, which is what ImageNet's warm-up alone takes (10 epochs,
    # batch 1024).
    steps = size.steps or max(12_500, size.steps_for(100, batch_size=batch_size))
    target = _by_size(size.num_images, small=0.02, large=0.07)
    return RunConfig(
        recipe="small_data",
        steps=steps,
        batch_size=batch_size,
        precision="bf16",
        backbone=BackboneConfig(name="vit_tiny_patch16_224"),
        head=HeadConfig(num_prototypes=prototypes_for(size.num_images)),
        loss=LossConfig(
            teacher_temperature=round(
                target, 3
            ),  # a sharper teacher does not collapse to uniform on few images
            teacher_temperature_start=round(
                min(target, _by_size(size.num_images, small=0.02, large=0.04)), 3
            ),
            teacher_temperature_warmup_steps=_at_most(37_500, steps, share=0.3),
        ),
        teacher=TeacherConfig(momentum_start=round(_by_size(size.num_images, small=0.99, large=0.996), 4)),
        optimizer=OptimizerConfig(
            peak_lr=5e-4 * batch_size / 256,
            warmup_steps=_at_most(12_500, steps, share=0.1),
            freeze_last_layer_steps=_at_most(1250, steps, share=0.05),
            clip="global",
        ),
        evaluation=EvaluationConfig(every_steps=max(1, steps // 20)),
    )


def prototypes_for(num_images: int) -> int:
    """K by the number of images: about one prototype for ten to twenty of them."""
    for fewer_than, num_prototypes in (
        (20_000, 1024),
        (50_000, 2048),
        (100_000, 4096),
        (200_000, 16_384),
        (500_000, 32_768),
    ):
        if num_images < fewer_than:
            return num_prototypes
    return 65_536


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        recipe.__name__: recipe
        for recipe in (cpu, smoke, small_data, vit_small_16_imagenet, resnet18_imagenette)
    }
)


def _at_most(warmup_steps: int, steps: int, *, share: float) -> int:
    """The wanted warm-up, capped at a share of the run."""
    return min(warmup_steps, int(steps * share))


def _by_size(num_images: int, *, small: float, large: float) -> float:
    """A value between those of 20,000 images and of ImageNet, along a straight line."""
    share = (num_images - 20_000) / (IMAGENET_IMAGES - 20_000)
    return small + (large - small) * min(1.0, max(0.0, share))
