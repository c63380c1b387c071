"""Going on from weights that are good already, on your own pictures."""

from training.config import (
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
from training.starting import Start

_PASSES, _FEWEST, _MOST = 30, 500, 20_000
# What `cpu` looks at in an hour on two cores: 96,000 images of 2 * 64^2 + 4 * 32^2 pixels.
_CPU_PIXELS = 96_000 * 12_288


def adapt(size: RunSize) -> Resolved:
    """From weights that are good already, on your own pictures: the head first, the early layers least.

    A fresh head would send noise into a good network: so the network stands still while the head learns, and
    then layers change the less the nearer they are to the pixels (layer-wise decay 0.75; DINOv2, from
    nothing, takes 0.9). Network, input size, mean and standard deviation are those of the weights.
    """
    start = size.start
    if start is None:
        raise ConfigError(
            "the recipe adapt begins with weights: give --backbone.weights models/NAME, a bundle; or a run, "
            "a file of tensors, or timm:NAME"
        )
    batch_size = size.batch(64)
    head, head_reason = _head(size, start)
    crops = _crops(start)
    steps, steps_reason = _steps(size, crops, batch_size=batch_size)
    # A head that comes along knows the network already.
    head_warmup = 0 if start.head else at_most(1000, steps, share=0.1)
    config = RunConfig(
        recipe="adapt",
        steps=steps,
        batch_size=batch_size,
        precision="bf16" if size.device == "cuda" else "float32",
        backbone=start.backbone.model_copy(
            update={
                "weights": start.weights,
                "weights_fingerprint": start.fingerprint,
                "norm_statistics": "frozen" if start.has_batch_norm else "batch",
            }
        ),
        head=head,
        crops=crops,
        loss=LossConfig(teacher_temperature=0.04, teacher_temperature_start=0.04),
        teacher=TeacherConfig(momentum_start=0.996),
        optimizer=OptimizerConfig(
            peak_lr=1e-4 * batch_size / 64,
            warmup_steps=at_most(1000, steps, share=0.1),
            weight_decay_end=0.04,  # more would pull good weights to nothing
            clip="global",
            head_warmup_steps=head_warmup,
            layer_decay=0.75,
            freeze_below=0.03 if size.device == "cpu" else 0.0,
        ),
        loading=LoadingConfig(
            canvas_px=max(start.preprocessing.resize_px, round(crops.global_px * 288 / 224))
        ),
        evaluation=EvaluationConfig(
            every_steps=max(1, steps // 10),
            resize_px=start.preprocessing.resize_px,
            crop_px=start.preprocessing.crop_px,
        ),
    )
    reasons = {
        "backbone.name": f"{start.backbone.name} at {crops.global_px} px: that of {start.weights}",
        "head.num_prototypes": f"{head.num_prototypes:,}: {head_reason}",
        "steps": f"{steps:,}: {steps_reason}",
        "optimizer.peak_lr": f"{config.optimizer.peak_lr:g}: 1e-4 * {batch_size} / 64, a tenth of what "
        "the recipe cpu begins with",
        "optimizer.head_warmup_steps": f"{head_warmup:,}: "
        + ("the head comes with the weights" if start.head else "the head learns alone for 10 % of the run"),
        "optimizer.layer_decay": "0.75: the first layers know edges, which are the same everywhere",
        "crops.local_px": f"{crops.local_px}: 96 for 224, in whole cells of {start.cell_px} px",
    }
    if config.optimizer.freeze_below:
        reasons["optimizer.freeze_below"] = (
            f"{config.optimizer.freeze_below:g}: the first layers would move by less, and half of a step's "
            "time goes into their backward pass"
        )
    if start.has_batch_norm:
        reasons["backbone.norm_statistics"] = (
            "frozen: what the weights were trained with stays true of them while they move little, and the "
            "teacher answers in the run as it will in the service"
        )
    return Resolved(config, reasons)


def _head(size: RunSize, start: Start) -> tuple[HeadConfig, str]:
    if start.head is not None:
        return start.head, f"those of {start.weights}, whose head goes on"
    prototypes, limit = prototypes_for(size.num_images)
    # BatchNorm in the head as the published convolutional runs have it; on a CPU a narrower one.
    head = HeadConfig(
        num_prototypes=prototypes,
        hidden_dim=2048 if size.device == "cuda" else 1024,
        batch_norm=start.has_batch_norm,
    )
    return head, f"{size.num_images:,} images are {limit}"


def _crops(start: Start) -> CropsConfig:
    side, cell_px = start.preprocessing.crop_px, start.cell_px
    return CropsConfig(
        global_px=side,
        local_px=max(cell_px, round(side * 96 / 224 / cell_px) * cell_px),
        local_count=4,
        global_area=(0.3, 1.0),
        local_area=(0.05, 0.3),
        blur_sigma_px=(0.1, max(0.2, 2.0 * side / 224)),
        mean=start.preprocessing.mean,
        std=start.preprocessing.std,
    )


def _steps(size: RunSize, crops: CropsConfig, *, batch_size: int) -> tuple[int, str]:
    """Good features need a nudge, few pictures are soon learnt, and a laptop has an hour or two."""
    if size.steps:
        return size.steps, "as you set it"
    steps = min(_MOST, max(_FEWEST, size.steps_for(_PASSES, batch_size=batch_size)))
    reason = f"{_PASSES} passes at batch {batch_size}, from {_FEWEST} to {_MOST:,}"
    if size.device == "cpu":
        pixels = 2 * crops.global_px**2 + crops.local_count * crops.local_px**2
        affordable = max(100, _CPU_PIXELS // pixels // batch_size)
        if affordable < steps:
            return (
                affordable,
                f"as many pixels as the recipe cpu sees, at batch {batch_size}; no fewer than 100",
            )
    return steps, reason
