"""What a run works with, and what it does between steps: measure and save."""

from dataclasses import dataclass

from training.checkpoint import save_checkpoint
from training.config import RunConfig
from training.data.images import Images
from training.data.loader import CanvasLoader
from training.distributed import World
from training.evaluation.monitor import Monitor
from training.export import teacher_model
from training.report.gallery import Gallery
from training.rundir import RunDirectory
from training.runlog import MetricsLog, Screen
from training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run works with, from start to stop."""

    config: RunConfig
    directory: RunDirectory
    images: Images
    loader: CanvasLoader
    monitor: Monitor | None
    gallery: Gallery | None
    log: MetricsLog | None
    screen: Screen
    world: World


def evaluate(state: TrainState, parts: Parts) -> None:
    """Measures the teacher, draws what it sees, and says so; nothing but the first process does."""
    if parts.monitor is None or parts.log is None:
        return
    teacher = teacher_model(state, parts.config)
    measured = parts.monitor.measure(teacher)
    parts.log.write(state.step, "evaluation", measured)
    if parts.gallery is not None:
        parts.gallery.hang(state.step, teacher)
    words = (
        f"effective dimensions {measured['rank_me']:.1f}" if "rank_me" in measured else "nothing to measure"
    )
    if "knn_percent" in measured:
        words = f"k-NN ({measured['knn_kind']}) {measured['knn_percent']:.1f} %, {words}"
    begun = "as the weights came" if parts.config.backbone.weights else "untrained"
    parts.screen.say(f"step {state.step}: {words}" + (f" ({begun})" if state.step == 0 else ""))


def save(state: TrainState, parts: Parts) -> None:
    """Writes a checkpoint; nothing but the first process does."""
    if parts.world.is_first:
        save_checkpoint(parts.directory.checkpoints, state, parts.config)
