"""Everything that changes while a network trains, in one place.

Data order, augmentation, schedules and dropped paths are functions of the seed and the step, so this is all
that a run needs to go on as if it had never stopped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from dino_core.backbones import make_backbone
from dino_core.heads import ProjectionHead
from dino_core.multicrop import ProjectedNetwork
from dino_core.optim import layer_scales, weight_decay_groups
from dino_core.recompute import recompute_cheap_activations
from dino_core.teacher import keep_statistics, make_teacher
from training.config import OptimizerConfig, RunConfig
from training.loss_scale import LossScale
from training.starting import take_weights


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """A return to an earlier state (training.healing).

    Attributes:
        sick_from: The last step before gradients stopped being finite.
        from_step: The step at which the run gave up.
        to_step: The step of the state that it went back to; images go on from where they were.
        lr_factor: What learning rates are multiplied by from there on.
    """

    sick_from: int
    from_step: int
    to_step: int
    lr_factor: float


@dataclass(kw_only=True)
class TrainState:
    """What a step changes, and a checkpoint keeps.

    Attributes:
        student: Learns by gradient; in training mode.
        teacher: Follows the student; in evaluation mode, but for BatchNorm during a step (see
            dino_core.teacher.batch_statistics). Its backbone is the product.
        optimizer: Of the student.
        center_K: Running mean of the teacher's outputs, float32.
        step: Steps taken, skipped ones included.
        nonfinite_in_a_row: Steps skipped since the last good one.
        rollbacks: Every return to an earlier state, in order.
        loss_scale: Of fp16; none in other precisions.
    """

    student: ProjectedNetwork
    teacher: ProjectedNetwork
    optimizer: Optimizer
    center_K: Tensor
    step: int = 0
    nonfinite_in_a_row: int = 0
    rollbacks: tuple[Rollback, ...] = ()
    loss_scale: LossScale | None = None

    @property
    def next_batch(self) -> int:
        """Which batch comes next, counted from the first of the first epoch; none is given twice."""
        return self.step + sum(one.from_step - one.to_step for one in self.rollbacks)

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.center_K.device

    def set_rates(self, *, learning_rate: float, weight_decay: float) -> None:
        """Gives the optimiser what the schedules say, each group its share of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
            if group["decays"]:
                group["weight_decay"] = weight_decay

    def buffers(self) -> list[Tensor]:
        """Copies of the student's buffers, which a forward pass moves; the teacher's stay."""
        return [buffer.clone() for buffer in self.student.buffers()]

    @torch.no_grad()
    def restore_buffers(self, buffers: list[Tensor]) -> None:
        """Puts back what `buffers` copied."""
        for buffer, before in zip(self.student.buffers(), buffers, strict=True):
            buffer.copy_(before)


def new_state(config: RunConfig, *, device: torch.device) -> TrainState:
    """The state before the first step; the teacher equals the student, but for a head that came along.

    Raises:
        BackboneError: There is no such network.
    """
    backbone = config.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # weights are drawn on the CPU: the same on every device
        student = ProjectedNetwork(
            network := make_backbone(
                backbone.name,
                image_size_px=backbone.image_size_px,
                in_channels=backbone.in_channels,
                drop_path=backbone.drop_path,
                position_interpolation=backbone.position_interpolation,
                model_kwargs=backbone.model_kwargs,
            ),
            ProjectionHead(
                network.embed_dim,
                config.head.num_prototypes,
                hidden_dim=config.head.hidden_dim,
                bottleneck_dim=config.head.bottleneck_dim,
                num_layers=config.head.num_layers,
                norm_last_layer=config.head.norm_last_layer,
                batch_norm=config.head.batch_norm,
            ),
        )
    teacher_head = take_weights(student, backbone)
    for name, scale in _learning_rate_scales(student, config.optimizer).items():
        if scale < config.optimizer.freeze_below:
            student.get_parameter(name).requires_grad = False
    # Convolutions run faster on pixels whose channels lie together; other layers don't mind.
    student.to(device).to(memory_format=torch.channels_last)
    student.train()
    if backbone.norm_statistics == "frozen":
        keep_statistics(network)
    teacher = make_teacher(student)
    if teacher_head:
        teacher.head.load_state_dict(teacher_head, strict=True)
    if config.recompute and config.precision == "float32":
        recompute_cheap_activations(student.backbone.get_submodule("network"))
    return TrainState(
        student=student,
        teacher=teacher,
        optimizer=make_optimizer(student, config.optimizer, device=device),
        center_K=torch.zeros(config.head.num_prototypes, device=device),
        loss_scale=LossScale() if config.precision == "fp16" else None,
    )


def make_optimizer(student: ProjectedNetwork, config: OptimizerConfig, *, device: torch.device) -> Optimizer:
    """The optimiser of the student's groups: those that decay and those that don't, layer by layer."""
    groups = weight_decay_groups(student, _learning_rate_scales(student, config))
    on_gpu = device.type == "cuda"
    match config.name:
        case "adamw":
            return AdamW(
                groups,
                lr=config.peak_lr,
                betas=config.betas,
                weight_decay=config.weight_decay_start,
                fused=True,  # one pass over each parameter; on CPUs too
            )
        case "sgd":
            return SGD(
                groups,
                lr=config.peak_lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay_start,
                fused=on_gpu or None,
            )


def _learning_rate_scales(student: ProjectedNetwork, config: OptimizerConfig) -> dict[str, float]:
    if config.layer_decay == 1.0:
        return {}
    network = student.backbone.get_submodule("network")
    scales = layer_scales(network, decay=config.layer_decay)
    return {f"backbone.network.{name}": scale for name, scale in scales.items()}
