"""DINO for people who bring their own training loop: one module that gives a loss.

A thin layer over the functions that `training` uses; it is called as the well-known small implementation is
called, and computes what the paper says.

Dimension key: B images · C channels · H W pixels · T teacher views · K prototypes
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, cast

import torch
import torch.distributed
from torch import Tensor, nn

from dino_core.augment import augment, dino_views
from dino_core.backbones import Backbone, HookedBackbone, wrap_module
from dino_core.bundle import Manifest
from dino_core.heads import ProjectionHead
from dino_core.learner_export import export_teacher
from dino_core.learner_views import by_turns, default_local_px, learner_views
from dino_core.losses import all_reduced, dino_loss, sharpen, teacher_logits_sum, updated_center
from dino_core.multicrop import ProjectedNetwork
from dino_core.positions import ResampledPositions, at_other_sizes
from dino_core.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dino_core.teacher import batch_statistics, make_teacher, update_teacher

AugmentFunction = Callable[[Tensor], Tensor]

NUM_GLOBAL_CROPS = 2
# Streams of random numbers of different processes and devices start so far apart that they never meet.
IMAGES_A_LANE = 2**40


class Dino(nn.Module):
    """Self-distillation of any network, for a training loop of your own.

        learner = Dino(net, image_size=256, hidden_layer="to_latent")
        optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-4)
        for images in loader:                      # uint8, or float from 0 to 1; not normalised
            loss = learner(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            learner.update_moving_average()        # after the optimiser; moves teacher and centre
        embedding = learner(images, return_embedding=True, return_projection=False)
        learner.export("models/mine")

    Names and order of the arguments are those of `vit_pytorch.Dino`. Where its default contradicts the paper,
    ours is the paper's: `student_temp` 0.1 (there 0.9, which leaves hardly a gradient), `num_classes_K` 65536
    (there 65336, a slip of the pen), `moving_average_decay` 0.996 (there 0.9, a teacher of ten steps), a head
    of three layers of 2048 before a bottleneck of 256 (there four of 256 and none), `global_lower_crop_scale`
    0.4 (there 0.5). The student sees all crops, local crops are smaller than global ones and there are eight
    of them (there two, at full size), and each image and crop is augmented for itself (there the whole batch
    alike). What `return_embedding` gives is the teacher, which is the better network all through training.

    Gradients may be accumulated over several calls: the centre counts all images since the last
    `update_moving_average`. In evaluation mode a call gives the loss and changes nothing. `nn.DataParallel`
    and `DistributedDataParallel` may wrap the learner; call `update_moving_average` on the learner itself, in
    every process.

    Args:
        net: The network to train, in place: it becomes the student's. Or a `Backbone` of `make_backbone`.
        image_size: Side of the global crops, in pixels; the net's native size.
        hidden_layer: Name or index of the layer whose output is the embedding, vectors, tokens or maps; see
            `wrap_module`. Not looked at for a `Backbone`, which knows.
        projection_hidden_size: Width of the head's hidden layers.
        num_classes_K: Prototypes. 65536 is for ImageNet; some ten thousand images need 1024 to 4096.
        projection_layers: Linear layers of the head before the prototypes.
        student_temp: The student's temperature.
        teacher_temp: The teacher's, lower than the student's. The paper's longer runs raise it from 0.04 to
            0.07 over 30 epochs: give it with each call.
        local_upper_crop_scale: Greatest share of an image that a local crop shows; the least is 0.05.
        global_lower_crop_scale: Least share of an image that a global crop shows; the greatest is 1.
        moving_average_decay: The teacher's momentum. The paper raises it to 1 along a cosine: give it to
            `update_moving_average`.
        center_moving_average_decay: The centre's momentum; 0.999 collapses.
        augment_fn: In place of our colour jitter, blur, flip and normalisation: maps float crops [1,C,H,W]
            from 0 to 1 to what the net takes, once for each image and crop, so that one draw never serves a
            whole batch. Made for the first global crop and every second local one.
        augment_fn2: The same for the other crops; by default `augment_fn`.
        local_size: Side of the local crops; by default 3/7 of `image_size`, as 96 is of 224, to a round
            number. A ViT that only knows its native size has its positions resampled.
        local_crops: How many local crops an image has; 0 trains on the two global ones.
        mean: Of each channel, for values from 0 to 1; by default ImageNet's. Without effect on crops that an
            `augment_fn` makes: then the default is 0, and images to embed are taken as they are.
        std: Of each channel; by default ImageNet's, with an `augment_fn` 1.
        in_channels: Channels of an image.
        tokens: How a layer that gives tokens is pooled: their mean, or the first.
        projection_batch_norm: Puts BatchNorm into the head, as published runs of small convolutional networks
            do.
        seed: Of the augmentation. With it and the number of images seen all draws are fixed.

    Attributes:
        student_network: Backbone and head that the optimiser trains.
        teacher_network: Their moving average.
        center: The centre of the teacher's outputs [K].

    Raises:
        BackboneError: The network has no such layer, or doesn't take the size of the local crops.
    """

    center: Tensor

    def __init__(  # noqa: PLR0913, PLR0917  the names and the order that its users know
        self,
        net: nn.Module,
        image_size: int,
        hidden_layer: str | int = -2,
        projection_hidden_size: int = 2048,
        num_classes_K: int = 65536,
        projection_layers: int = 3,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        local_upper_crop_scale: float = 0.4,
        global_lower_crop_scale: float = 0.4,
        moving_average_decay: float = 0.996,
        center_moving_average_decay: float = 0.9,
        augment_fn: AugmentFunction | None = None,
        augment_fn2: AugmentFunction | None = None,
        *,
        local_size: int | None = None,
        local_crops: int = 8,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        in_channels: int = 3,
        tokens: Literal["mean", "first"] = "mean",
        projection_batch_norm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if augment_fn2 is not None and augment_fn is None:
            raise ValueError(
                "augment_fn2 is given without augment_fn: give both, or only augment_fn for all crops"
            )
        self.image_size = image_size
        self.in_channels = in_channels
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp
        self.moving_average_decay = moving_average_decay
        self.center_moving_average_decay = center_moving_average_decay
        self.augment_fn = augment_fn
        self.augment_fn2 = augment_fn2 or augment_fn
        self.seed = seed
        imagenet = augment_fn is None and in_channels == len(IMAGENET_MEAN)
        self.mean = tuple(mean or (IMAGENET_MEAN if imagenet else [0.0] * in_channels))
        self.std = tuple(std or (IMAGENET_STD if imagenet else [1.0] * in_channels))
        local_px = local_size or default_local_px(image_size)
        self.views = learner_views(
            dino_views(
                global_px=image_size,
                local_px=local_px,
                local_count=local_crops,
                global_area=(global_lower_crop_scale, 1.0),
                local_area=(0.05, local_upper_crop_scale),
            ),
            augmented=augment_fn is None,
        )
        backbone = _backbone_of(
            net,
            hidden_layer,
            sizes_px=(image_size, local_px if local_crops else image_size),
            in_channels=in_channels,
            tokens=tokens,
        )
        head = ProjectionHead(
            backbone.embed_dim,
            num_classes_K,
            hidden_dim=projection_hidden_size,
            num_layers=projection_layers,
            batch_norm=projection_batch_norm,
        )
        device = next(net.parameters(), torch.empty(0)).device
        self.student_network = ProjectedNetwork(backbone, head.to(device))
        self.teacher_network = make_teacher(self.student_network)
        self.register_buffer("center", torch.zeros(num_classes_K, device=device))
        # Dictionaries by device: the replicas of nn.DataParallel share them, and each writes only its own
        # entry.
        self._seen_by_device: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._images_by_lane: dict[int, int] = {}
        self._range_checked = False
        # DistributedDataParallel waits for a gradient of every parameter that it knows. This is where it
        # looks for those that it should leave alone: layers behind the embedding's, such as a classifier.
        self._ddp_params_and_buffers_to_ignore = _without_gradient(
            self, torch.zeros(1, in_channels, image_size, image_size, device=device)
        )

    @property
    def student(self) -> nn.Module:
        """The backbone that is trained: the network that was given, cut at its layer."""
        return self.student_network.backbone

    @property
    def teacher(self) -> nn.Module:
        """The backbone to keep: images [B,C,H,W], normalised -> embeddings [B,D]."""
        return self.teacher_network.backbone

    def forward(
        self,
        images: Tensor,
        return_embedding: bool = False,
        return_projection: bool = True,
        student_temp: float | None = None,
        teacher_temp: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gives the loss of a batch, or its embeddings.

        Args:
            images: [B,C,H,W], uint8 or float from 0 to 1, of any size; not normalised.
            return_embedding: Gives the teacher's embeddings of the images as they are, without gradient.
            return_projection: Together with `return_embedding`: the head's outputs too.
            student_temp: In place of the learner's.
            teacher_temp: In place of the learner's.

        Returns:
            The loss, a scalar in nats; or the embeddings [B,D]; or projections [B,K] and embeddings [B,D].
        """
        self._check_range(images)
        if return_embedding:
            return self._embedded(images, with_projection=return_projection)
        views = self._augmented(images)
        with torch.no_grad(), batch_statistics(self.teacher_network):
            teacher_logits_TBK = self.teacher_network(views[:NUM_GLOBAL_CROPS])
        targets_TBK = sharpen(
            teacher_logits_TBK,
            self.center,
            temperature=self.teacher_temp if teacher_temp is None else teacher_temp,
        )
        loss = dino_loss(
            self.student_network(views),
            targets_TBK,
            student_temperature=self.student_temp if student_temp is None else student_temp,
        )
        if self.training:
            self._count_in(teacher_logits_TBK)
        return loss

    @torch.no_grad()
    def update_moving_average(self, *, momentum: float | None = None) -> None:
        """Moves the teacher towards the student, and the centre towards the teacher's outputs.

        To be called after the optimiser's step, in every process of a distributed run. The centre counts all
        that the teacher said since the last call.

        Args:
            momentum: The teacher's, in place of the learner's: for a schedule.
        """
        update_teacher(
            self.teacher_network,
            self.student_network,
            momentum=self.moving_average_decay if momentum is None else momentum,
        )
        total_K, count = torch.zeros_like(self.center), torch.zeros_like(self.center[0])
        for device_total_K, device_count in self._seen_by_device.values():
            total_K += device_total_K.to(total_K.device)
            count += device_count.to(count.device)
        self._seen_by_device.clear()
        total_K, count = all_reduced(total_K, count)
        moved_K = updated_center(self.center, total_K, count, momentum=self.center_moving_average_decay)
        # Without any image since the last time the mean is 0 / 0, and the centre stays.
        self.center.copy_(torch.where(count > 0, moved_K, self.center))

    @torch.no_grad()
    def reset_moving_average(self) -> None:
        """Makes the teacher a copy of the student again, and forgets the centre."""
        self.teacher_network.load_state_dict(self.student_network.state_dict(), strict=True)
        self.center.zero_()
        self._seen_by_device.clear()

    def export(
        self,
        path: Path | str,
        *,
        architecture: str | None = None,
        model_kwargs: Mapping[str, object] | None = None,
        card: str | None = None,
        overwrite: bool = False,
    ) -> Manifest:
        """Writes the teacher's backbone as a bundle that the service and timm load.

        Args:
            path: Directory to make; its name becomes the model's.
            architecture: The timm model whose weights the net has, if the net doesn't say so itself:
                "resnet18" for torchvision's ResNet-18.
            model_kwargs: Further arguments of that timm model.
            card: Text of the model card.
            overwrite: Whether a bundle that is there already gives way.

        Returns:
            What the bundle says of itself.

        Raises:
            BundleError: No timm model is known that gives the teacher's embeddings.
        """
        return export_teacher(
            self.teacher,
            path,
            architecture=architecture,
            model_kwargs=model_kwargs or {},
            preprocessing=Preprocessing(
                resize_px=round(self.image_size * 256 / 224),
                crop_px=self.image_size,
                mean=self.mean,
                std=self.std,
            ),
            card=card,
            overwrite=overwrite,
        )

    def train(self, mode: bool = True) -> Self:
        """Sets the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher_network.eval()
        return self

    def get_extra_state(self) -> Tensor:
        """Images seen, by lane [L,2]: with the seed, the state of the augmentation."""
        return torch.tensor(sorted(self._images_by_lane.items()), dtype=torch.int64).reshape(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        """Continues the augmentation where `get_extra_state` was taken."""
        self._images_by_lane.clear()
        self._images_by_lane.update((int(lane), int(images)) for lane, images in state)
        self._seen_by_device.clear()

    def _count_in(self, teacher_logits_TBK: Tensor) -> None:
        total_K, count = teacher_logits_sum(teacher_logits_TBK)
        if (seen := self._seen_by_device.get(total_K.device)) is not None:
            total_K, count = total_K + seen[0], count + seen[1]
        self._seen_by_device[total_K.device] = total_K, count

    @torch.no_grad()
    def _embedded(self, images_BCHW: Tensor, *, with_projection: bool) -> Tensor | tuple[Tensor, Tensor]:
        fractions_BCHW = images_BCHW / 255 if images_BCHW.dtype == torch.uint8 else images_BCHW
        mean_C11, std_C11 = (
            torch.tensor(values, device=images_BCHW.device)[:, None, None] for values in (self.mean, self.std)
        )
        embeddings_BD: Tensor = self.teacher((fractions_BCHW - mean_C11) / std_C11)
        if not with_projection:
            return embeddings_BD
        return cast(Tensor, self.teacher_network.head(embeddings_BD)), embeddings_BD

    @torch.no_grad()
    def _augmented(self, images_BCHW: Tensor) -> list[Tensor]:
        ours = self.augment_fn is None
        # Pixels are made in float32, whatever the caller lets the networks compute in.
        with torch.autocast(images_BCHW.device.type, enabled=False):
            crops = augment(
                images_BCHW,
                sizes_px_B2=None,
                views=self.views,
                seed=self.seed,
                epoch=0,
                indices_B=self._next_indices(images_BCHW),
                mean=self.mean if ours else [0.0] * self.in_channels,
                std=self.std if ours else [1.0] * self.in_channels,
            )
        if self.augment_fn is None or self.augment_fn2 is None:
            return crops
        return by_turns((self.augment_fn, self.augment_fn2), crops)

    def _next_indices(self, images_BCHW: Tensor) -> Tensor:
        """Numbers that no other image of the run has, in this process or another."""
        lane = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            lane = torch.distributed.get_rank()
        elif getattr(self, "_is_replica", False):  # made by nn.DataParallel
            lane = images_BCHW.get_device()
        if not self.training:
            return torch.arange(len(images_BCHW))
        start = self._images_by_lane.get(lane, 0)
        self._images_by_lane[lane] = start + len(images_BCHW)
        return lane * IMAGES_A_LANE + start + torch.arange(len(images_BCHW))

    def _check_range(self, images_BCHW: Tensor) -> None:
        """Looks at the first batch only: a look at every one would make the device wait."""
        if self._range_checked:
            return
        self._range_checked = True
        if images_BCHW.dtype != torch.uint8 and not bool(((images_BCHW >= 0) & (images_BCHW <= 1)).all()):
            warnings.warn(
                f"images go from {images_BCHW.min():.3g} to {images_BCHW.max():.3g}, expected uint8 or float "
                "from 0 to 1: give them without normalisation, which the learner adds after augmenting",
                stacklevel=2,
            )


def _backbone_of(
    net: nn.Module,
    hidden_layer: str | int,
    *,
    sizes_px: tuple[int, int],
    in_channels: int,
    tokens: Literal["mean", "first"],
) -> Backbone | HookedBackbone | ResampledPositions:
    if isinstance(net, Backbone):
        return net
    backbone = wrap_module(
        net, layer=hidden_layer, image_size_px=sizes_px[0], in_channels=in_channels, tokens=tokens
    )
    return at_other_sizes(
        backbone, image_size_px=sizes_px[0], other_size_px=sizes_px[1], in_channels=in_channels
    )


def _without_gradient(learner: Dino, blank_1CHW: Tensor) -> list[str]:
    """Names of the student's parameters that its output doesn't depend on."""
    student = learner.student_network
    training = [(module, module.training) for module in student.modules()]
    student.eval()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            student([blank_1CHW]).sum(), list(trained.values()), allow_unused=True
        )
    for module, was_training in training:
        module.training = was_training
    return [
        f"student_network.{name}"
        for name, gradient in zip(trained, gradients, strict=True)
        if gradient is None
    ]
