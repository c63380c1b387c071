"""What a run tells: JSON lines for programs, a progress bar or plain lines for people."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from training.step import StepMetrics, StepValues
from training.trackers import Tracker, numbers_in

PLAIN_LINE_EVERY_S = (
    20.0  # where there is no terminal: often enough to see that it lives, seldom enough for a log
)


class MetricsLog:
    """A file of JSON objects, one a line, each with `step` and `kind` ("step", "evaluation" or "event")."""

    def __init__(self, path: Path, *, keep_to_step: int, trackers: Sequence[Tracker] = ()) -> None:
        """Opens the log and forgets what came after a step, which a resumed run will do again.

        Args:
            path: Of the file.
            keep_to_step: The step that the run goes on from.
            trackers: Which get the numbers of each line too.
        """
        self._trackers, self._path = trackers, path
        self._file = self._kept(keep_to_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Adds a line; NaN and infinity become null, which JSON has no other word for."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps({"step": step, "kind": kind, **plain}) + "\n")
        for tracker in self._trackers:
            tracker.write(step, numbers_in(kind, plain))

    def go_back(self, step: int) -> None:
        """Forgets what came after a step; trackers that can do so too."""
        self._file.close()
        self._file = self._kept(step)
        for tracker in self._trackers:
            tracker.go_back(step)

    def tell_once(self, step: int, event: str, words: str) -> None:
        """Adds an event, unless the log has it: a run that was killed in the middle may not know."""
        told = [(line.get("event"), line["step"], line.get("words")) for line in read_metrics(self._path)]
        if (event, step, words) not in told:
            self.write(step, "event", {"event": event, "words": words})

    def _kept(self, to_step: int) -> TextIOWrapper:
        """The file, open for more, without what came after a step."""
        kept = [line for line in read_metrics(self._path) if line["step"] <= to_step]
        write_lines(self._path, kept)
        return self._path.open("a", buffering=1)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON objects, one a line, all or nothing."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a log; a last line that a crash cut off is left out."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def step_line(metrics: StepMetrics, values: StepValues, pace: "Pace") -> dict[str, Any]:
    """What the log keeps of a step."""
    measured = {name: value for name, value in asdict(metrics).items() if name != "vitals"}
    return {
        **measured,
        **(asdict(metrics.vitals) if metrics.vitals else {}),
        **asdict(values),
        "images_per_s": round(pace.images_per_s, 2),
        "data_wait_share": round(pace.data_wait_share, 4),
    }


@dataclass
class Pace:
    """How fast the run goes, over its last steps.

    Attributes:
        images_per_s: Images of all steps together per second.
        data_wait_share: Share of the time in which the training waited for images, from 0 to 1.
        images_per_step: Of the last step.
    """

    images_per_s: float = 0.0
    data_wait_share: float = 0.0
    images_per_step: int = 0
    _last: float | None = field(default=None, repr=False)

    def step(self, *, images: int, waited_s: float, now_s: float) -> None:
        """Takes in one step that ended now."""
        self.images_per_step = images
        if self._last is not None and now_s > self._last:
            took_s = now_s - self._last
            # About the last twenty steps; from the first, so that the bar does not start at zero.
            weight = 1.0 if self.images_per_s == 0 else 0.05
            self.images_per_s += weight * (images / took_s - self.images_per_s)
            self.data_wait_share += weight * (min(waited_s / took_s, 1.0) - self.data_wait_share)
        self._last = now_s

    def pause(self) -> None:
        """Forgets the time until the next step: something else than training was done."""
        self._last = None


class Screen:
    """Progress for people, on stderr: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, *, total_steps: int, num_prototypes: int, console: Console) -> None:
        self._total_steps = total_steps
        self._uniform_nats = math.log(num_prototypes)
        self._console = console
        self._last_line_s = -math.inf
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, sentence: str) -> None:
        """Prints a sentence above the bar."""
        self._console.print(sentence, highlight=False, soft_wrap=True, markup=False)

    def step(self, step: int, metrics: StepMetrics, pace: Pace) -> None:
        """Shows a step."""
        numbers = (
            f"loss {metrics.loss_nats:.3f} = entropy {metrics.teacher_entropy_nats:.3f} + KL "
            f"{metrics.kl_nats:.3f} (uniform {self._uniform_nats:.2f})  {pace.images_per_s:.0f} images/s  "
            f"waiting for data {pace.data_wait_share:.0%}"
        )
        if self._console.is_terminal:
            if self._task is None:
                self._task = self._progress.add_task(
                    "", total=self._total_steps, completed=step, numbers=numbers
                )
            self._progress.update(self._task, completed=step, numbers=numbers)
            return
        now_s = time.monotonic()
        if now_s - self._last_line_s >= PLAIN_LINE_EVERY_S or step == self._total_steps:
            self._last_line_s = now_s
            self.say(f"step {step}/{self._total_steps}  {numbers}{self._left(step, pace)}")

    def _left(self, step: int, pace: Pace) -> str:
        if pace.images_per_step == 0 or pace.images_per_s == 0:
            return ""
        seconds = (self._total_steps - step) * pace.images_per_step / pace.images_per_s
        return f"  left {int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
