"""The official DINO recipe, literally, for a network and a time that a laptop has.

From `main_dino.py` of facebookresearch/dino as it stands without flags: AdamW, rate 0.0005 * batch / 256,
weight decay 0.04 to 0.4, teacher momentum 0.996 to 1, temperature 0.04, K = 65,536, no BatchNorm in the head,
2 + 8 crops made by PIL in the loader's workers, clipping, moving average and loss one tensor at a time, the
teacher in training mode. What it counts in epochs of its 100 is the same share of the steps here: 10 of
warm-up, 1 with the last layer frozen. Left out are half precision and pinned memory, which need a GPU, and
dropped paths, which it has for ViTs alone.
"""

import copy
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.augmentation import official_views
from dino_core.backbones import Backbone, make_backbone
from dino_core.heads import ProjectionHead
from dino_core.multicrop import ProjectedNetwork
from tests.references.dino_loop import clip_each, dino_loss, schedule, updated_center

PROTOTYPES = 65_536


def new_backbone(name: str, *, image_size_px: int, seed: int = 0) -> Backbone:
    """The network untrained, with the same weights as `training.state.new_state` draws from the seed."""
    torch.manual_seed(seed)
    return make_backbone(name, image_size_px=image_size_px)


class OfficialRun:
    """One run: `step` trains on a batch of views and moves the teacher.

    Args:
        backbone: The student's; the teacher begins as its copy.
        batch_size: Images a step.
        steps: At which all schedules end.
        num_prototypes: K.
    """

    def __init__(
        self, backbone: Backbone, *, batch_size: int, steps: int, num_prototypes: int = PROTOTYPES
    ) -> None:
        self.student = ProjectedNetwork(backbone, ProjectionHead(backbone.embed_dim, num_prototypes)).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(requires_grad=False)
        self.center_K = torch.zeros(num_prototypes)
        self.steps_taken = 0
        trained = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        decayed = [p for name, p in trained if not name.endswith(".bias") and p.ndim > 1]
        kept = [p for name, p in trained if name.endswith(".bias") or p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)
        peak_lr = 0.0005 * batch_size / 256
        self.rates = schedule(base=peak_lr, final=1e-6, steps=steps, warmup_steps=steps // 10)
        self.decays = schedule(base=0.04, final=0.4, steps=steps, warmup_steps=0)
        self.momenta = schedule(base=0.996, final=1.0, steps=steps, warmup_steps=0)
        self.frozen_steps = steps // 100

    def step(self, views: list[Tensor]) -> float:
        """Trains on the views [B,C,H,W] of a batch, the two global ones first; gives the loss in nats."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.steps_taken]
        self.optimizer.param_groups[0]["weight_decay"] = self.decays[self.steps_taken]
        with torch.no_grad():
            teacher_logits = self.teacher(views[:2])
        targets = torch.softmax((teacher_logits - self.center_K) / 0.04, dim=-1)
        loss = dino_loss(self.student(views), targets, student_temperature=0.1)
        self.center_K = updated_center(self.center_K, teacher_logits, momentum=0.9)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_each(list(self.student.parameters()), max_norm=3.0)
        if self.steps_taken < self.frozen_steps:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None
        self.optimizer.step()
        self._follow(momentum=self.momenta[self.steps_taken])
        self.steps_taken += 1
        return loss.item()

    @property
    def teacher_backbone(self) -> Backbone:
        """What the run is for."""
        assert isinstance(self.teacher.backbone, Backbone)  # a copy of what it was given
        return self.teacher.backbone

    @torch.no_grad()
    def _follow(self, *, momentum: float) -> None:
        """Parameters alone: the teacher in training mode has BatchNorm statistics of its own."""
        for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            ours.mul_(momentum).add_((1 - momentum) * theirs)


class Views:
    """All crops of one picture, as a transform that the loader's workers run."""

    def __init__(self, *, global_px: int, local_px: int) -> None:
        self.views = official_views(global_px=global_px, local_px=local_px)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Makes the crops."""
        return [view(image) for view in self.views]


def batches(
    folder: Path, *, batch_size: int, global_px: int, local_px: int
) -> Generator[list[Tensor], None, None]:
    """Views of batches, epoch after epoch without end; a worker a core."""
    dataset = ImageFolder(str(folder), transform=Views(global_px=global_px, local_px=local_px))
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=torch.get_num_threads(),
        multiprocessing_context="fork",
    )
    while True:
        for views, _ in loader:
            yield views


def train(
    run: OfficialRun,
    data: Iterator[list[Tensor]],
    *,
    seconds: float,
    after_step: Callable[[int, float], None],
) -> None:
    """Trains until the schedules or the time end.

    Args:
        run: Changed in place.
        data: Batches; their making counts.
        seconds: From now on.
        after_step: Told the number of steps done, and the seconds since the start.
    """
    began_s = time.perf_counter()
    while run.steps_taken < len(run.rates) and time.perf_counter() - began_s < seconds:
        run.step(next(data))
        after_step(run.steps_taken, time.perf_counter() - began_s)
