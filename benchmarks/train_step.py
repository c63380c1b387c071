"""One full step of ViT-Ti/16 against the official way of doing it: `python -m benchmarks.train_step`.

    ours      training.step.train_step, as a run does it
    literal   the official step: attention that forms its weights, a forward for each size of crop, the loss
              as a double loop over pairs of views, clipping and moving average one parameter at a time,
              AdamW as torch gives it by default

Both train the same network (2 x 224 + 8 x 96 px, K = 65,536, batch 16, float32, no dropped paths) on the same
crops from the same weights, each in a process of its own, in turns; so memory is each one's own, and losses
can be compared. The first two steps are not timed. The share of a large matrix product counts the operations
of `flops`. Nothing else may compute meanwhile.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.references.dino_loop import clip_each, dino_loss, update_teacher, updated_center
from training.config import BackboneConfig, HeadConfig, OptimizerConfig, RunConfig
from training.machine import keep_freed_memory
from training.state import TrainState, new_state
from training.step import train_step

BATCH, GLOBAL_PX, LOCAL_PX, LOCALS, PROTOTYPES = 16, 224, 96, 8, 65_536
WIDTH, DEPTH, PATCH_PX = 192, 12, 16
STEPS, ROUNDS = 5, 3
RESULT = Path(__file__).with_suffix(".json")


def config() -> RunConfig:
    """ViT-Ti/16 with the official settings, but for dropped paths, which would differ."""
    return RunConfig(
        recipe="benchmark",
        steps=1000,
        batch_size=BATCH,
        backbone=BackboneConfig(name="vit_tiny_patch16_224", drop_path=0.0),
        head=HeadConfig(num_prototypes=PROTOTYPES),
        optimizer=OptimizerConfig(warmup_steps=10),
    )


def crops() -> list[Tensor]:
    """The same views each time."""
    generator = torch.Generator().manual_seed(0)
    sides = [GLOBAL_PX] * 2 + [LOCAL_PX] * LOCALS
    return [torch.randn(BATCH, 3, side, side, generator=generator) for side in sides]


def ours() -> Callable[[], float]:
    """A step as `dino-train run` does it."""
    keep_freed_memory()
    state = new_state(config(), device=torch.device("cpu"))
    views = [view.contiguous(memory_format=torch.channels_last) for view in crops()]
    return lambda: train_step(state, [views], config=config()).loss_nats


def literal() -> Callable[[], float]:
    """The official step, from the same weights."""
    settings = config().model_copy(update={"recompute": False})
    state: TrainState = new_state(settings, device=torch.device("cpu"))
    student, teacher = state.student, state.teacher
    for network in (student, teacher):
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if not name.endswith(".bias") and p.ndim > 1]
    kept = [p for name, p in trained if name.endswith(".bias") or p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": kept, "weight_decay": 0.0}])
    views, center, step = crops(), state.center_K, 0

    def logits(network: Any, some: list[Tensor]) -> Tensor:  # noqa: ANN401
        sizes = sorted({view.shape[-1] for view in some}, reverse=True)
        groups = [torch.cat([view for view in some if view.shape[-1] == size]) for size in sizes]
        embedded = torch.cat([network.backbone(group) for group in groups])
        out: Tensor = network.head(embedded)
        return out.view(len(some), BATCH, -1)

    def one() -> float:
        nonlocal center, step
        optimizer.param_groups[0] |= {"lr": 0.001 * step / 9, "weight_decay": 0.04}
        optimizer.param_groups[1] |= {"lr": 0.001 * step / 9}
        with torch.no_grad():
            teacher_logits = logits(teacher, views[:2])
        targets = torch.softmax((teacher_logits - center) / 0.04, dim=-1)
        loss = dino_loss(logits(student, views), targets, student_temperature=0.1)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_each(list(student.parameters()), max_norm=3.0)
        optimizer.step()
        update_teacher(teacher, student, momentum=0.996)
        center = updated_center(center, teacher_logits, momentum=0.9)
        step += 1
        return loss.item()

    return one


def flops() -> float:
    """Multiplications and additions of a step: matrix products and attention; twice more to go back."""
    tokens = {side: (side // PATCH_PX) ** 2 + 1 for side in (GLOBAL_PX, LOCAL_PX)}

    def forward(images: int, side: int) -> float:
        linear = DEPTH * 12 * WIDTH**2 * tokens[side] + 3 * PATCH_PX**2 * WIDTH * (tokens[side] - 1)
        attention = DEPTH * 2 * tokens[side] ** 2 * WIDTH
        return 2.0 * images * (linear + attention)

    def head(images: int) -> float:
        return 2.0 * images * (WIDTH * 2048 + 2048**2 + 2048 * 256 + 256 * PROTOTYPES)

    seen_by_teacher = forward(2 * BATCH, GLOBAL_PX) + head(2 * BATCH)
    seen_by_student = seen_by_teacher + forward(LOCALS * BATCH, LOCAL_PX) + head(LOCALS * BATCH)
    return seen_by_teacher + 3 * seen_by_student


def matrix_flops_per_s() -> float:
    """What a large float32 matrix product reaches, the best of ten."""
    a, b = torch.randn(3072, 3072), torch.randn(3072, 3072)
    best_s = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.mm(a, b)
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * 3072**3 / best_s


def child(which: str) -> None:
    """Runs one side, and prints what was measured."""
    one = {"ours": ours, "literal": literal}[which]()
    losses = [one(), one()]
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        losses.append(one())
        seconds.append(time.perf_counter() - began)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_mb": peak_mb}))


def main() -> None:
    """Measures both in turns, prints a table, and writes it as JSON."""
    if len(sys.argv) > 1:
        child(sys.argv[1])
        return
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "literal": []}
    for _ in range(ROUNDS):
        for which, done in runs.items():
            words = [sys.executable, "-m", "benchmarks.train_step", which]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            done.append(json.loads(output.splitlines()[-1]))
    step_s = {
        name: statistics.median(s for run in done for s in run["seconds"]) for name, done in runs.items()
    }
    peak_mb = {name: statistics.median(run["peak_mb"] for run in done) for name, done in runs.items()}
    losses = {name: done[0]["losses"] for name, done in runs.items()}
    peak_flops = matrix_flops_per_s()
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "n": f"{ROUNDS} processes of {STEPS} steps each, medians",
        "images_per_s": {name: BATCH / seconds for name, seconds in step_s.items()},
        "speed_ratio": step_s["literal"] / step_s["ours"],
        "peak_mb": peak_mb,
        "memory_ratio": peak_mb["ours"] / peak_mb["literal"],
        "gflop_a_step": flops() / 1e9,
        "share_of_matrix_product": flops() / step_s["ours"] / peak_flops,
        "matrix_gflop_per_s": peak_flops / 1e9,
        "largest_relative_difference_of_losses": max(
            abs(a - b) / b for a, b in zip(losses["ours"], losses["literal"], strict=True)
        ),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
