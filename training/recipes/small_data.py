"""Your own pictures: every value follows from how many there are, from the batch and from the machine.

K, temperature and momentum go by the size of the data as lightly-train's DINO does (its documented table),
with every warm-up capped at a share of the run: there, a short run never leaves its warm-up.
"""

from dataclasses import replace

from training.config import (
    BackboneConfig,
    EvaluationConfig,
    HeadConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
)
from training.recipes.laptop import small_convolutional
from training.recipes.size import IMAGENET_IMAGES, Resolved, RunSize, at_most

_FEWEST = 20_000
_MANY = 100_000  # from here on a ViT-S: its 22 M weights see each picture a hundred times
_TINY_PX = 112  # half of a ViT's 224 px: below, most of what it sees was made up by the resampling


def small_data(size: RunSize) -> Resolved:
    """Your own pictures, thousands to hundreds of thousands: values follow from them, each explained."""
    base = _base(size)
    reasons = dict(base.reasons)
    images, steps = f"{size.num_images:,} images", base.config.steps

    prototypes, limit = prototypes_for(size.num_images)
    reasons["head.num_prototypes"] = (
        f"{prototypes:,}: {images} are {limit}; more prototypes than pictures can fill stay empty"
    )
    target = round(_by_size(size.num_images, small=0.02, large=0.07), 3)
    start = round(min(target, _by_size(size.num_images, small=0.02, large=0.04)), 3)
    place = f"{images} lie {_share(size.num_images):.0%} of the way from 20,000 to ImageNet"
    reasons["loss.teacher_temperature"] = (
        f"{target}: {place}, from 0.02 to 0.07; a sharper teacher doesn't collapse to uniform on few images"
    )
    usual = RunSize(num_images=size.num_images, device=size.device, side_px=size.side_px)
    usual_batch = _base(replace(usual, num_images=max(size.num_images, 128))).config.batch_size
    momentum = round(
        _by_size(size.num_images, small=0.99, large=0.996) ** (base.config.batch_size / usual_batch), 5
    )
    reasons["teacher.momentum_start"] = (
        f"{momentum:g}: {place}, from 0.99 to 0.996, to the power of {base.config.batch_size} / "
        f"{usual_batch} images a step: the teacher looks back on as many images at every batch size"
    )
    warmup = at_most(37_500, steps, share=0.3)
    reasons["loss.teacher_temperature_warmup_steps"] = (
        f"{warmup:,}: 37,500, but at most 30 % of {steps:,} steps"
    )
    lr_warmup = at_most(12_500, steps, share=0.1)
    reasons["optimizer.warmup_steps"] = f"{lr_warmup:,}: 12,500, but at most 10 % of {steps:,} steps"
    frozen = at_most(1250, steps, share=0.05)
    reasons["optimizer.freeze_last_layer_steps"] = f"{frozen:,}: 1,250, but at most 5 % of {steps:,} steps"

    config = base.config
    return Resolved(
        config.model_copy(
            update={
                "recipe": "small-data",
                "head": config.head.model_copy(update={"num_prototypes": prototypes}),
                "loss": LossConfig(
                    teacher_temperature=target,
                    teacher_temperature_start=start,
                    teacher_temperature_warmup_steps=warmup,
                ),
                "teacher": TeacherConfig(momentum_start=momentum),
                "optimizer": config.optimizer.model_copy(
                    update={"warmup_steps": lr_warmup, "freeze_last_layer_steps": frozen}
                ),
            }
        ),
        reasons,
    )


def prototypes_for(num_images: int) -> tuple[int, str]:
    """K by the number of images, about one prototype for ten to twenty of them, and the rule in words."""
    for fewer_than, num_prototypes in (
        (20_000, 1024),
        (50_000, 2048),
        (100_000, 4096),
        (200_000, 16_384),
        (500_000, 32_768),
    ):
        if num_images < fewer_than:
            return num_prototypes, f"fewer than {fewer_than:,}"
    return 65_536, "500,000 or more"


def _base(size: RunSize) -> Resolved:
    """The settings that depend on the machine, and on the size of the pictures where there is a choice."""
    if size.device == "cpu":
        return _small(
            size, "there is no GPU; a small convolutional network learns from few pictures on few cores"
        )
    if size.side_px is not None and size.side_px < _TINY_PX:
        return _small(size, f"pictures of {size.side_px} px hold too few patches for a ViT at 224 px")
    return _on_gpu(size)


def _on_gpu(size: RunSize) -> Resolved:
    batch_size = size.batch(128)
    # 100 passes, and no fewer than 12,500 updates, which is what ImageNet's warm-up alone takes (10 epochs,
    # batch 1024).
    steps = size.steps or max(12_500, size.steps_for(100, batch_size=batch_size))
    name, weights = (
        ("vit_tiny_patch16_224", "5.5 M weights")
        if size.num_images < _MANY
        else ("vit_small_patch16_224", "22 M weights")
    )
    config = RunConfig(
        recipe="small-data",
        steps=steps,
        batch_size=batch_size,
        precision="bf16",
        backbone=BackboneConfig(name=name),
        head=HeadConfig(),
        optimizer=OptimizerConfig(peak_lr=5e-4 * batch_size / 256, clip="global"),
        evaluation=EvaluationConfig(every_steps=max(1, steps // 20)),
    )
    return Resolved(
        config,
        {
            "backbone.name": f"{name}: there is a GPU; {weights} suit {size.num_images:,} pictures",
            "steps": f"{steps:,}: 100 passes over {size.num_images:,} images at batch {batch_size}, and no "
            "fewer than 12,500",
            "optimizer.peak_lr": f"{config.optimizer.peak_lr:g}: 5e-4 * {batch_size} / 256",
        },
    )


def _small(size: RunSize, because: str) -> Resolved:
    config = small_convolutional(size)
    if size.device == "cuda":
        # An hour of two cores is a minute of a GPU: as many passes as a ViT has.
        steps = size.steps or max(config.steps, size.steps_for(100, batch_size=config.batch_size))
        config = config.model_copy(
            update={
                "steps": steps,
                "evaluation": config.evaluation.model_copy(update={"every_steps": max(1, steps // 20)}),
            }
        )
    return Resolved(
        config,
        {
            "backbone.name": f"{config.backbone.name} at {config.crops.global_px} px: {because}",
            "steps": f"{config.steps:,}: 96,000 images at batch {config.batch_size}, about an hour on two "
            "cores"
            if size.device == "cpu"
            else f"{config.steps:,}: 100 passes at batch {config.batch_size}, at least 96,000 images",
            "optimizer.peak_lr": f"{config.optimizer.peak_lr:g}: 1e-3 * {config.batch_size} / 64",
        },
    )


def _share(num_images: int) -> float:
    return min(1.0, max(0.0, (num_images - _FEWEST) / (IMAGENET_IMAGES - _FEWEST)))


def _by_size(num_images: int, *, small: float, large: float) -> float:
    """A value between those of 20,000 images and of ImageNet, along a straight line."""
    return small + (large - small) * _share(num_images)
