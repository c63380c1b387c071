"""Going on from weights that are good already, on your own pictures."""

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
from training.errors import ConfigError
from training.recipes.size import Resolved, RunSize, at_most
from training.recipes.small_data import prototypes_for
from training.starting import described


def adapt(size: RunSize) -> Resolved:
    """From the weights of a bundle, on your own pictures: the head first, then all, the early layers least.

    A fresh head would send noise into a good network: so the network stands still while the head learns, and
    then layers change the less the nearer they are to the pixels (layer-wise decay 0.75; DINOv2, from
    nothing, takes 0.9). Network, input size, mean and standard deviation are those of the weights.
    """
    if size.weights is None:
        raise ConfigError(
            "the recipe adapt begins with weights: give --backbone.weights models/NAME, a bundle"
        )
    start = described(size.weights)
    side = start.preprocessing.crop_px
    batch_size = size.batch(64)
    # 30 passes, between 500 and 20,000 updates: good features need a nudge, and few pictures are soon learnt.
    steps = size.steps or min(20_000, max(500, size.steps_for(30, batch_size=batch_size)))
    head_warmup = at_most(1000, steps, share=0.1)
    prototypes, limit = prototypes_for(size.num_images)
    config = RunConfig(
        recipe="adapt",
        steps=steps,
        batch_size=batch_size,
        precision="bf16" if size.device == "cuda" else "float32",
        backbone=BackboneConfig(
            name=start.architecture,
            image_size_px=start.image_size_px,
            in_channels=start.in_channels,
            drop_path=0.0,
            pooling=start.pooling,
            model_kwargs=start.model_kwargs,
            weights=size.weights,
        ),
        head=HeadConfig(num_prototypes=prototypes),
        crops=CropsConfig(
            global_px=side,
            local_px=max(32, round(side * 96 / 224 / 32) * 32),
            local_count=4,
            global_area=(0.3, 1.0),
            local_area=(0.05, 0.3),
            blur_sigma_px=(0.1, max(0.2, 2.0 * side / 224)),
            mean=start.preprocessing.mean,
            std=start.preprocessing.std,
        ),
        loss=LossConfig(teacher_temperature=0.04, teacher_temperature_start=0.04),
        teacher=TeacherConfig(momentum_start=0.996),
        optimizer=OptimizerConfig(
            peak_lr=1e-4 * batch_size / 64,
            warmup_steps=at_most(1000, steps, share=0.1),
            weight_decay_end=0.04,
            clip="global",
            freeze_last_layer_steps=0,
            head_warmup_steps=head_warmup,
            layer_decay=0.75,
        ),
        loading=LoadingConfig(canvas_px=round(side * 288 / 224)),
        evaluation=EvaluationConfig(
            every_steps=max(1, steps // 10),
            resize_px=start.preprocessing.resize_px,
            crop_px=side,
        ),
    )
    return Resolved(
        config,
        {
            "backbone.name": f"{start.architecture} at {side} px: that of {size.weights}",
            "head.num_prototypes": f"{prototypes:,}: {size.num_images:,} images are {limit}",
            "steps": f"{steps:,}: 30 passes at batch {batch_size}, from 500 to 20,000",
            "optimizer.head_warmup_steps": f"{head_warmup:,}: the head learns alone for 10 % of the run",
            "optimizer.layer_decay": "0.75: the first layers know edges, which are the same everywhere",
        },
    )
