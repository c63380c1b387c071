"""DINO as its paper writes it: loops over pairs, images and parameters, nothing shared or fused.

Written from the equations and algorithm 1 of Caron et al. 2021 (https://arxiv.org/abs/2104.14294) and from
the formulas of the official schedules; the fast code must equal it.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def softmax(logits: list[float]) -> list[float]:
    """Equation 1, in Python's float64."""
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def cross_entropy(target: list[float], logits: list[float]) -> float:
    """Equation 2."""
    log_probs = [math.log(prob) for prob in softmax(logits)]
    return -sum(p * log_q for p, log_q in zip(target, log_probs, strict=True))


def loss_by_hand(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> float:
    """Equation 3: over teacher views t, student views s other than t, and images."""
    total, pairs = 0.0, 0
    for t in range(len(teacher_logits)):
        for s in range(len(student_logits)):
            if s == t:
                continue
            pairs += 1
            for image in range(student_logits.shape[1]):
                centred = (teacher_logits[t, image] - center).double() / teacher_temperature
                scaled = student_logits[s, image].double() / student_temperature
                total += cross_entropy(softmax(centred.tolist()), scaled.tolist()) / student_logits.shape[1]
    return total / pairs


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, *, student_temperature: float) -> Tensor:
    """The same with torch, so that autograd gives its gradient."""
    terms = []
    for t, target in enumerate(teacher_probs):
        for s, logits in enumerate(student_logits):
            if s != t:
                log_probs = torch.log_softmax(logits / student_temperature, dim=-1)
                terms.append(-(target * log_probs).sum(dim=-1).mean())
    return torch.stack(terms).sum() / len(terms)


def updated_center(center: Tensor, teacher_logits: Tensor, *, momentum: float) -> Tensor:
    """Equation 4."""
    return momentum * center + (1 - momentum) * teacher_logits.flatten(0, -2).mean(dim=0)


def update_teacher(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """Algorithm 1, one parameter at a time."""
    with torch.no_grad():
        students = dict(student.named_parameters())
        for name, parameter in teacher.named_parameters():
            parameter.copy_(momentum * parameter + (1 - momentum) * students[name])
        buffers = dict(student.named_buffers())
        for name, buffer in teacher.named_buffers():
            buffer.copy_(buffers[name])


def clip_each(parameters: Sequence[Tensor], *, max_norm: float) -> None:
    """The official clip: each parameter has its own norm."""
    for parameter in parameters:
        if parameter.grad is not None:
            norm = parameter.grad.pow(2).sum().sqrt().item()
            if norm + 1e-6 > max_norm:
                parameter.grad *= max_norm / (norm + 1e-6)


def head(state: dict[str, Tensor], embedding: Tensor) -> Tensor:
    """Appendix C: MLP with GELU between its layers, length 1, prototypes of length weight_g."""
    hidden = embedding
    layers = sorted({int(name.split(".")[1]) for name in state if name.startswith("mlp.")})
    for layer in layers:
        hidden = hidden @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]
        if layer != layers[-1]:
            hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    direction = hidden / hidden.pow(2).sum(dim=-1, keepdim=True).sqrt()
    prototypes = state["last_layer.weight_v"]
    lengths = prototypes.pow(2).sum(dim=-1, keepdim=True).sqrt()
    return direction @ (state["last_layer.weight_g"] * prototypes / lengths).T


def schedule(*, base: float, final: float, steps: int, warmup_steps: int) -> list[float]:
    """All values of a warm-up and cosine, as the official code lists them."""
    gaps = max(warmup_steps - 1, 1)
    values = [base * step / gaps for step in range(warmup_steps)]
    rest = steps - warmup_steps
    return values + [
        final + 0.5 * (base - final) * (1 + math.cos(math.pi * step / rest)) for step in range(rest)
    ]


def knn_votes(
    train: Tensor, labels: Sequence[int], query: Tensor, *, k: int, temperature: float, num_classes: int
) -> list[float]:
    """Votes for each class, one neighbour at a time."""
    similarities = [float(query @ image) for image in train]
    neighbours = sorted(range(len(train)), key=lambda place: -similarities[place])[:k]
    votes = [0.0] * num_classes
    for place in neighbours:
        votes[labels[place]] += math.exp(similarities[place] / temperature)
    return votes


class LiteralTrainer:
    """Algorithm 1 with the official step order, one view a forward.

    Args:
        backbone: Copied, as is the head.
        projection: The head.
        lr: Of AdamW.
        teacher_temperature: Constant here.
        momentum: Of the teacher.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projection: nn.Module,
        *,
        lr: float,
        teacher_temperature: float,
        momentum: float,
    ) -> None:
        self.student = nn.ModuleDict({"backbone": copy.deepcopy(backbone), "head": copy.deepcopy(projection)})
        self.teacher = copy.deepcopy(self.student).eval()
        self.center = torch.zeros_like(projection.last_layer.weight_g[:, 0])  # type: ignore[union-attr, index]
        self.teacher_temperature = teacher_temperature
        self.momentum = momentum
        trained = [(name, p) for name, p in self.student.named_parameters() if p.requires_grad]
        decayed = [p for name, p in trained if not name.endswith(".bias") and p.ndim > 1]
        kept = [p for name, p in trained if name.endswith(".bias") or p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)

    def step(self, global_views: Sequence[Tensor], local_views: Sequence[Tensor]) -> float:
        """Trains on one batch and gives its loss."""
        with torch.no_grad():
            teacher_logits = torch.stack(
                [self.teacher["head"](self.teacher["backbone"](view)) for view in global_views]
            )
        targets = torch.softmax((teacher_logits - self.center) / self.teacher_temperature, dim=-1)
        student_logits = torch.stack(
            [self.student["head"](self.student["backbone"](view)) for view in [*global_views, *local_views]]
        )
        loss = dino_loss(student_logits, targets, student_temperature=0.1)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_each(list(self.student.parameters()), max_norm=3.0)
        self.optimizer.step()
        update_teacher(self.teacher, self.student, momentum=self.momentum)
        self.center = updated_center(self.center, teacher_logits, momentum=0.9)
        return loss.item()
