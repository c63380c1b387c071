"""Runs for two cores: a useful teacher in an hour, and a proof of the path in a minute."""

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
from training.recipes.size import Resolved, RunSize, at_most


def cpu(size: RunSize) -> Resolved:
    """Two cores and about 10,000 small images: a useful teacher in under an hour."""
    return Resolved(small_convolutional(size))


def small_convolutional(size: RunSize) -> RunConfig:
    """The settings of `cpu`, which `small-data` begins with where there is no GPU.

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
            warmup_steps=at_most(200, steps, share=0.1),
            weight_decay_start=0.04,
            weight_decay_end=0.1,
            clip="global",
            clip_norm=3.0,
            freeze_last_layer_steps=at_most(150, steps, share=0.05),  # an epoch of 10k images, as official
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


def smoke(size: RunSize) -> Resolved:
    """A minute on any machine; proves the path, not the method."""
    batch_size = size.batch(16)
    steps = size.steps or 20
    config = RunConfig(
        recipe="smoke",
        steps=steps,
        batch_size=batch_size,
        backbone=BackboneConfig(name="test_resnet.r160_in1k", image_size_px=32, drop_path=0.0),
        head=HeadConfig(num_prototypes=64, hidden_dim=64, bottleneck_dim=32),
        crops=CropsConfig(global_px=32, local_px=16, local_count=2, blur_sigma_px=(0.1, 0.4)),
        teacher=TeacherConfig(momentum_start=0.9, momentum_end=1.0),
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=at_most(5, steps, share=0.25), clip="global"),
        loading=LoadingConfig(canvas_px=48, workers=2, cache="off"),
        evaluation=EvaluationConfig(
            every_steps=max(1, steps // 2),
            max_bank_images=300,
            max_query_images=100,
            resize_px=32,
            crop_px=32,
        ),
        checkpoints=CheckpointConfig(every_steps=10),
    )
    return Resolved(config)
