"""The settings of a run: one frozen model for each part, checked when made.

A default is the value of the official ImageNet run of ViT-S/16 (facebookresearch/dino, `main_dino.py`, 100
epochs); a recipe in `training.recipes` names every value in which it differs. Everything that is counted is
counted in steps (one step = one update of the student), so that an "epoch" cannot mean two things.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from dino_core.augment import View
from dino_core.backbones import Pooling
from dino_core.planes import Planes, eight_bit_planes
from dino_core.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dino_core.vit import PositionInterpolation

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
AreaRange = tuple[Fraction, Fraction]
TrackerName = Literal["wandb", "mlflow"]


class Part(BaseModel):
    """Settings of one part: immutable, and a key that does not exist is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class BackboneConfig(Part):
    """The network that becomes the product."""

    name: str = "vit_small_patch16_224"
    """A timm architecture."""
    image_size_px: Count = 224
    """The side that the network is built for; ViTs interpolate their positions for other sides."""
    in_channels: Count = 3
    """Colour channels of the images."""
    drop_path: Fraction = 0.1
    """Stochastic depth of the student; the teacher has none."""
    pooling: Pooling | None = None
    """What becomes the embedding; none takes the network's own (class token, else mean)."""
    model_kwargs: dict[str, JsonValue] = {}
    """Further arguments of the timm model, recorded in the bundle."""
    position_interpolation: PositionInterpolation = "official"
    """How a ViT's positions are made to fit other sizes: as DINO does, transformers, or timm."""
    norm_statistics: Literal["batch", "frozen"] = "batch"
    """BatchNorm in the network goes by the batch; or by what it has learnt before, which then stays."""
    weights: str | None = None
    """What the network begins with: a bundle, a run, a file of tensors, timm:NAME; none is random."""
    weights_fingerprint: str | None = None
    """Which weights exactly; filled in when the run is made, and kept with it."""


class HeadConfig(Part):
    """The projection head, which is thrown away after training."""

    num_prototypes: Count = 65_536
    """K, the width of the output; fewer for fewer images."""
    hidden_dim: Count = 2048
    """Width of the hidden layers."""
    bottleneck_dim: Count = 256
    """Width before the last layer, where vectors are L2-normalised."""
    num_layers: Count = 3
    """Layers of the MLP."""
    norm_last_layer: bool = True
    """Keep the prototypes at length 1; steadier."""
    batch_norm: bool = False
    """BatchNorm in the MLP, as convolutional recipes use it."""


class CropsConfig(Part):
    """Which views of an image the networks see, and what is done to each."""

    global_px: Count = 224
    """Side of the two crops that the teacher sees too."""
    local_px: Count = 96
    """Side of the crops that only the student sees."""
    local_count: Annotated[int, Field(ge=0)] = 8
    """Local crops an image."""
    global_area: AreaRange = (0.4, 1.0)
    """Share of the image's area that a global crop covers."""
    local_area: AreaRange = (0.05, 0.4)
    """Share of the image's area that a local crop covers."""
    jitter_probability: Fraction = 0.8
    """How often colours are jittered."""
    jitter: tuple[Fraction, Fraction, Fraction, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.2, 0.1)
    """Strength for brightness, contrast, saturation and hue."""
    grey_probability: Fraction = 0.2
    """How often a crop turns grey."""
    blur_probability: tuple[Fraction, Fraction, Fraction] = (1.0, 0.1, 0.5)
    """How often the first global, the second global and a local crop are blurred."""
    blur_sigma_px: tuple[Positive, Positive] = (0.1, 2.0)
    """Range of the blur, in pixels of the crop."""
    solarise_probability: tuple[Fraction, Fraction, Fraction] = (0.0, 0.2, 0.0)
    """How often the first global, the second global and a local crop are solarised."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, with pixels in [0, 1]."""
    std: tuple[Positive, ...] = IMAGENET_STD
    """Standard deviation of each channel, with pixels in [0, 1]."""

    @model_validator(mode="after")
    def _ranges_go_up(self) -> Self:
        for name in ("global_area", "local_area", "blur_sigma_px"):
            low, high = getattr(self, name)
            if low > high or high == 0:
                raise ValueError(
                    f"{name} is ({low}, {high}): give the smaller number first, the other above 0"
                )
        return self

    def views(self) -> tuple[View, ...]:
        """All views of an image: the two global ones, then the local ones."""
        brightness, contrast, saturation, hue = self.jitter
        first, second, local = (
            View(
                size_px=size_px,
                area=area,
                jitter_probability=self.jitter_probability,
                brightness=brightness,
                contrast=contrast,
                saturation=saturation,
                hue=hue,
                grey_probability=self.grey_probability,
                blur_probability=blur_probability,
                blur_sigma_px=self.blur_sigma_px,
                solarise_probability=solarise_probability,
            )
            for size_px, area, blur_probability, solarise_probability in zip(
                (self.global_px, self.global_px, self.local_px),
                (self.global_area, self.global_area, self.local_area),
                self.blur_probability,
                self.solarise_probability,
                strict=True,
            )
        )
        return (first, second, *[local] * self.local_count)


class LossConfig(Part):
    """Temperatures and centring of the DINO objective."""

    student_temperature: Positive = 0.1
    """Of the student's softmax."""
    teacher_temperature: Positive = 0.04
    """Of the teacher's softmax after the warm-up; above 0.06 without a warm-up the loss stays at ln K."""
    teacher_temperature_start: Positive = 0.04
    """Of the teacher's softmax at step 0."""
    teacher_temperature_warmup_steps: Steps = 0
    """Steps in which it rises, in a straight line."""
    teacher_temperature_hold_steps: Count = 1
    """Steps for which it stays the same; the official code changes it once an epoch."""
    center_momentum: Fraction = 0.9
    """Of the running mean of the teacher's outputs; 0.999 collapses in the paper's ablation."""

    @model_validator(mode="after")
    def _teacher_is_sharper(self) -> Self:
        for name in ("teacher_temperature", "teacher_temperature_start"):
            if getattr(self, name) > self.student_temperature:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, above student_temperature "
                    f"({self.student_temperature}): the teacher must be the sharper one, so lower it"
                )
        return self


class TeacherConfig(Part):
    """How slowly the teacher follows the student."""

    momentum_start: Fraction = 0.996
    """At step 0; 0.9995 suits batches of 256 in long runs, 0.99 short ones."""
    momentum_end: Fraction = 1.0
    """At the last step, reached along a cosine."""


class OptimizerConfig(Part):
    """How the student learns; learning rates are the ones used, for the batch size of the run."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW for ViTs; SGD with momentum in the published convolutional recipes."""
    peak_lr: Positive = 0.001
    """After the warm-up. Official: 5e-4 * batch / 256, here for batch 512."""
    end_lr: Annotated[float, Field(ge=0)] = 1e-6
    """At the last step, reached along a cosine."""
    warmup_steps: Steps = 0
    """Steps in which the learning rate rises, in a straight line from 0."""
    weight_decay_start: Annotated[float, Field(ge=0)] = 0.04
    """At step 0; biases and 1-d parameters have none."""
    weight_decay_end: Annotated[float, Field(ge=0)] = 0.4
    """At the last step, reached along a cosine."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of AdamW."""
    momentum: Fraction = 0.9
    """Of SGD."""
    clip: Literal["per_parameter", "global", "none"] = "per_parameter"
    """Official DINO clips each parameter's gradient for itself; `global` clips the norm of all."""
    clip_norm: Positive = 3.0
    """The longest gradient that passes unchanged."""
    head_warmup_steps: Steps = 0
    """First steps in which only the head learns, so that a fresh one does not spoil good weights."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from each layer to the one before it; 1 treats all alike."""
    freeze_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Layers whose factor is smaller stand still, and cost no backward pass; 0 lets all learn."""
    freeze_last_layer_steps: Steps = 0
    """First steps in which the prototypes stand still; longer if the loss falls to nothing."""


def _cache_of(saved: object) -> object:
    """Runs that were saved when there was a disk or nothing have a boolean, and can still be resumed."""
    return {True: "disk", False: "off"}[saved] if isinstance(saved, bool) else saved


class LoadingConfig(Part):
    """How images are read."""

    scale_low: tuple[float, ...] = ()
    """Of images with other channels than RGB or other depths than 8 bits: what becomes 0, for each channel;
    measured on a sample if not given."""
    scale_high: tuple[float, ...] = ()
    """Of such images: what becomes 255, for each channel; measured on a sample if not given."""
    canvas_px: Count = 288
    """Side of the square to which every decoded image is resized; crops are cut from it."""
    workers: Annotated[int, Field(ge=0)] = 8
    """Threads that decode ahead of the training."""
    cache: Annotated[Literal["disk", "memory", "off"], BeforeValidator(_cache_of)] = "disk"
    """Keep decoded images on disk, or in memory that all processes of the machine share and that goes with
    them, so that each file is decoded once; or decode them each time."""
    cache_dir: Path | None = None
    """Where `disk` keeps them; a folder in the run directory if not given."""
    check: Literal["sample", "whole", "off"] = "sample"
    """Look before the run for images that cannot be read, are there twice or are too small: at 256 of them,
    or at all."""


class EvaluationConfig(Part):
    """The k-NN accuracy during the run, where folders are classes; never seen by the training."""

    every_steps: Count = 2500
    """Steps between measurements."""
    neighbours: Count = 20
    """k of the k-NN; 20 is consistently best in the paper."""
    max_bank_images: Count = 5000
    """Images that are searched: more is slower and more exact."""
    max_query_images: Count = 1000
    """Images that are classified."""
    resize_px: Count = 256
    """Shorter side before the centre crop; also the exported teacher's preprocessing."""
    crop_px: Count = 224
    """Side of the centre crop; also the exported teacher's preprocessing."""


class CheckpointConfig(Part):
    """When the state is saved, and how much is kept."""

    every_steps: Count = 1000
    """Steps between checkpoints; also at the end and when the run is interrupted."""
    keep: Count = 2
    """Newest checkpoints that stay on disk; the one before the last survives a damaged last one."""
    keep_every_steps: Steps = 0
    """Checkpoints at multiples of it stay for good, to compare or go back to; 0: none but the newest."""

    @model_validator(mode="after")
    def _kept_are_written(self) -> Self:
        if self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"keep_every_steps is {self.keep_every_steps}, and there is a checkpoint every "
                f"{self.every_steps} steps (every_steps): give a multiple of that"
            )
        return self


class GuardConfig(Part):
    """When a run counts as sick."""

    patience_steps: Count = 1000
    """Steps in which a sickness must last before it is named."""
    max_nonfinite_steps: Count = 20
    """Steps with NaN or infinite gradients in a row (each is skipped) before the run goes back to the
    newest checkpoint from before them; after `max_rollbacks` of that, before it stops."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """How often a run may go back for such gradients; 0 lets it stop at once."""
    rollback_lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What learning rates are multiplied by when a run has gone back; images go on from where they were."""
    max_data_wait_s: Positive = 600.0
    """Seconds without images, as from a disk that hangs, before the run ends; after a tenth it says so."""
    stop: bool = True
    """Stop a run that has collapsed or whose images are all alike, instead of warning only."""


class RunConfig(Part):
    """Everything that decides what a run does."""

    recipe: str
    """The recipe that these settings came from."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of weights, data order and augmentation."""
    steps: Count
    """Updates of the student."""
    batch_size: Count
    """Images a step, over all processes and accumulated parts; `auto` finds the largest that fits."""
    recompute: bool = True
    """In float32, compute norms and GELUs of transformer blocks again instead of keeping them: a sixth of
    the memory less, a tenth more time."""
    accumulation_steps: Count = 1
    """Parts in which a batch is computed, where it does not fit in memory at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU when there is one."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """bf16 and fp16 compute the networks in half the bits; losses, centre and weights stay in float32. fp16
    is for GPUs without bf16."""
    log_every_steps: Count = 10
    """Steps between two lines of the log."""
    trackers: tuple[TrackerName, ...] = ()
    """Where the log goes too: wandb, mlflow (installed and set up); TensorBoard files are always written."""
    backbone: BackboneConfig = BackboneConfig()
    head: HeadConfig = HeadConfig()
    crops: CropsConfig = CropsConfig()
    loss: LossConfig = LossConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loading: LoadingConfig = LoadingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size ({self.batch_size}) cannot be cut into {self.accumulation_steps} equal parts: "
                "choose accumulation_steps that divide it"
            )
        channels = self.backbone.in_channels
        if not len(self.crops.mean) == len(self.crops.std) == channels:
            raise ValueError(
                f"crops.mean and crops.std must have {channels} numbers each, one a channel of the backbone"
            )
        low, high = self.loading.scale_low, self.loading.scale_high
        if len(low) != len(high) or len(low) not in (0, channels):
            raise ValueError(
                f"loading.scale_low and loading.scale_high must have {channels} numbers each, one a "
                "channel of the backbone, or none"
            )
        for name, warmup_steps in (
            ("optimizer.warmup_steps", self.optimizer.warmup_steps),
            ("loss.teacher_temperature_warmup_steps", self.loss.teacher_temperature_warmup_steps),
        ):
            if warmup_steps >= self.steps:
                raise ValueError(
                    f"{name} ({warmup_steps}) must be below steps ({self.steps}): shorten the warm-up"
                )
        return self

    def preprocessing(self) -> Preprocessing:
        """How the exported teacher, and the k-NN during the run, see an image."""
        return Preprocessing(
            resize_px=self.evaluation.resize_px,
            crop_px=self.evaluation.crop_px,
            mean=self.crops.mean,
            std=self.crops.std,
            planes=self.planes(),
        )

    def planes(self) -> Planes | None:
        """How images become uint8 that are no RGB pictures; None for those that are."""
        loading, channels = self.loading, self.backbone.in_channels
        if loading.scale_low:
            return Planes(channels=channels, low=loading.scale_low, high=loading.scale_high)
        return eight_bit_planes(channels) if channels != 3 else None


def sentence_of(error: ValidationError) -> str:
    """The first complaint of a validation as one sentence that names the setting."""
    complaints = error.errors(include_url=False)
    first = complaints[0]
    where = ".".join(str(key) for key in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"there is no such setting{nearest_setting(where)}"
    elif first["type"] == "missing":
        message = "is required"
    elif not first["type"].startswith("value_error"):
        message = f"{message[0].lower()}{message[1:]}, found {first['input']!r}"
    more = f" ({len(complaints) - 1} more like this)" if len(complaints) > 1 else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def setting_names(part: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """The dotted names of all settings of a part, and of the parts in it."""
    names: list[str] = []
    for name, field in part.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += setting_names(field.annotation, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def nearest_setting(misspelt: str, among: type[BaseModel] = RunConfig) -> str:
    """`: did you mean …?` for a dotted name that is none; where nothing is near, what lists all names."""
    names = setting_names(among)
    # `peak_lr` is nearer to `optimizer.peak_lr` than its letters say: its part was left out.
    whole = [name for name in names if name.rpartition(".")[2] == misspelt]
    nearest = whole or get_close_matches(misspelt, names, n=1, cutoff=0.7)
    return f": did you mean {nearest[0]}?" if nearest else "; `dino-train run --help` lists all of them"


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The settings in which two runs differ, as `name (old -> new)`."""
    return _differences(old.model_dump(), new.model_dump(), prefix="")


def _differences(old: Mapping[str, object], new: Mapping[str, object], *, prefix: str) -> list[str]:
    found: list[str] = []
    for key, value in old.items():
        other = new.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and key != "model_kwargs":
            found += _differences(value, other, prefix=f"{prefix}{key}.")
        elif value != other:
            found.append(f"{prefix}{key} ({value} -> {other})")
    return found
