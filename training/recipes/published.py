"""Small runs whose results others have published: what to check us against in an afternoon on one GPU."""

from training.config import (
    BackboneConfig,
    CheckpointConfig,
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


def resnet18_imagenette(size: RunSize) -> Resolved:
    """ResNet-18 on Imagenette at 128 px, 200 epochs at batch 256: 87.3 % k-NN in 75 minutes on an A6000.

    Source: lightly-ai/lightly, `imagenette_benchmark.py` (k = 200, T = 0.1, best epoch of the student).
    """
    batch_size = size.batch(256)
    steps = size.steps_for(200, batch_size=batch_size)
    return Resolved(
        RunConfig(
            recipe="resnet18-imagenette",
            steps=steps,
            batch_size=batch_size,
            backbone=BackboneConfig(name="resnet18", image_size_px=128, drop_path=0.0),
            head=HeadConfig(num_prototypes=2048, batch_norm=True),
            crops=CropsConfig(global_px=128, local_px=64, local_count=6),
            teacher=TeacherConfig(momentum_start=0.99, momentum_end=0.99),
            optimizer=_sgd(0.06 * batch_size / 256),
            loading=LoadingConfig(canvas_px=160),
            evaluation=EvaluationConfig(
                every_steps=max(1, steps // 20),
                neighbours=200,
                max_bank_images=10_000,
                max_query_images=4000,
                resize_px=128,
                crop_px=128,
            ),
            checkpoints=CheckpointConfig(every_steps=500),
        )
    )


def resnet18_cifar10(size: RunSize) -> Resolved:
    """ResNet-18 on CIFAR-10, 200 epochs at batch 128: 84.0 % k-NN in 120 minutes on an A6000.

    Source: lightly-ai/lightly, `cifar10_benchmark.py` (k = 200, T = 0.1, best epoch of the student). No local
    crops, no blur. There the first layer keeps the size of the picture; timm's shrinks it to a quarter, so
    crops are drawn four times larger, and all later layers see maps of the published size. CIFAR-10 saved as
    JPEG is not comparable.
    """
    batch_size = size.batch(128)
    steps = size.steps_for(200, batch_size=batch_size)
    return Resolved(
        RunConfig(
            recipe="resnet18-cifar10",
            steps=steps,
            batch_size=batch_size,
            backbone=BackboneConfig(name="resnet18", image_size_px=128, drop_path=0.0),
            head=HeadConfig(num_prototypes=2048, num_layers=2, batch_norm=True),
            crops=CropsConfig(global_px=128, local_px=128, local_count=0, blur_probability=(0.0, 0.0, 0.0)),
            teacher=TeacherConfig(momentum_start=0.99, momentum_end=0.99),
            optimizer=_sgd(0.06 * batch_size / 128),
            loading=LoadingConfig(canvas_px=32),
            evaluation=EvaluationConfig(
                every_steps=max(1, steps // 20),
                neighbours=200,
                max_bank_images=50_000,
                max_query_images=10_000,
                resize_px=128,
                crop_px=128,
            ),
        )
    )


def vit_small_16_imagenette(size: RunSize) -> Resolved:
    """ViT-S/16 on Imagenette at 224 px, 200 epochs at batch 128: 83.8 % k-NN, 86.1 % linear on an A100.

    Source: galilai-group/stable-pretraining, `benchmarks/imagenet10` (k = 20, teacher, best epoch). Blur and
    solarise are as likely in every crop. Rates change with the epoch there, and with the step here.
    """
    batch_size = size.batch(128)
    steps = size.steps_for(200, batch_size=batch_size)
    epoch_steps = max(1, steps // 200)
    return Resolved(
        RunConfig(
            recipe="vit-small-16-imagenette",
            steps=steps,
            batch_size=batch_size,
            precision="bf16",
            backbone=BackboneConfig(drop_path=0.0),
            crops=CropsConfig(
                local_count=6, blur_probability=(0.5, 0.5, 0.5), solarise_probability=(0.2, 0.2, 0.2)
            ),
            loss=LossConfig(
                teacher_temperature=0.07,
                teacher_temperature_start=0.04,
                teacher_temperature_warmup_steps=at_most(10 * epoch_steps, steps, share=0.05),
                teacher_temperature_hold_steps=epoch_steps,
            ),
            optimizer=OptimizerConfig(
                peak_lr=5e-4,  # not scaled by the batch
                warmup_steps=at_most(10 * epoch_steps, steps, share=0.05),
                weight_decay_start=0.05,
                weight_decay_end=0.05,
                betas=(0.9, 0.95),
                freeze_last_layer_steps=0,
                clip="global",
            ),
            evaluation=EvaluationConfig(
                every_steps=max(1, steps // 20), max_bank_images=10_000, max_query_images=4000
            ),
        )
    )


def _sgd(peak_lr: float) -> OptimizerConfig:
    return OptimizerConfig(
        name="sgd",
        peak_lr=peak_lr,
        end_lr=0.0,
        weight_decay_start=5e-4,
        weight_decay_end=5e-4,
        clip="none",
    )
