"""A run directory -> what happened in it, with a verdict in plain words; reads files, draws nothing.

Whatever is missing (an unfinished run, one of another version) is left out: this reads JSON, not settings.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from training.errors import RunDirectoryError
from training.evaluation.intervals import wilson_interval
from training.guard import LEAST_INFORMATION_NATS, information_nats
from training.rundir import CONFIG_FILE, RESULT_FILE
from training.runlog import read_metrics

State = Literal["healthy", "doubtful", "sick", "unfinished"]

_LAST_LINES = 5  # a single step proves nothing
WHERE_TO_LOOK = (
    "It did not collapse, and nothing proves that it got better. Look at the nearest images below: are they "
    "alike in what matters to you? At the augmented views: is it still to be seen in them? At the k-NN "
    "curve: does it still rise (train for more --steps), or has it fallen since (lower --optimizer.peak-lr)? "
    "A labelled --val-data, or more of it, measures what this run could not."
)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened at a step."""

    step: int
    name: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the run went: one word, and sentences."""

    state: State
    sentences: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Story:
    """What a run directory tells.

    Attributes:
        run_dir: Where it lies.
        config: All settings, as saved.
        saved: The whole of config.json.
        steps: Log lines of steps.
        evaluations: Log lines of measurements.
        events: In the order of steps.
        result: What the run ended with; none while it has not.
        skipped: Files that could not be read, with the reason.
        data_check: What the check of the data found, if there was one.
        verdict: How it went.
    """

    run_dir: Path
    config: Mapping[str, Any]
    saved: Mapping[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[Event]
    result: Mapping[str, Any] | None
    skipped: Mapping[str, Any]
    data_check: Mapping[str, Any] | None
    verdict: Verdict

    @property
    def num_prototypes(self) -> int:
        """K."""
        return int(_part(self.config, "head").get("num_prototypes", 0))

    @property
    def last_step(self) -> int:
        """The last step that the log knows."""
        return max((line["step"] for line in [*self.steps, *self.evaluations]), default=0)


def read_story(run_dir: Path) -> Story:
    """Reads a run's folder.

    Raises:
        RunDirectoryError: There is no run in it.
    """
    saved = _json(run_dir / CONFIG_FILE)
    if saved is None or not isinstance(saved.get("config"), dict):
        raise RunDirectoryError(
            f"there is no run in {run_dir} ({CONFIG_FILE} is missing or cannot be read): give the folder of "
            "a run, such as runs/NAME"
        )
    config: dict[str, Any] = saved["config"]
    lines = read_metrics(run_dir / "metrics.jsonl")
    steps = [line for line in lines if line.get("kind") == "step"]
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    told = [line for line in lines if line.get("kind") == "event"]
    result = _json(run_dir / RESULT_FILE)
    last_step = max((line["step"] for line in [*steps, *evaluations]), default=0)
    return Story(
        run_dir=run_dir,
        config=config,
        saved=saved,
        steps=steps,
        evaluations=evaluations,
        events=_events(config, told, last_step),
        result=result,
        skipped=_json(run_dir / "skipped.json") or {},
        data_check=_json(run_dir / "data-check.json"),
        verdict=_verdict(config, steps, evaluations, told, result=result),
    )


def _information_in(line: Mapping[str, Any], num_prototypes: int) -> float | None:
    """`information_nats` of a log line; None where it doesn't say enough."""
    usage, entropy = line.get("prototype_usage"), line.get("teacher_entropy_nats")
    if not isinstance(usage, int | float) or not isinstance(entropy, int | float) or num_prototypes < 1:
        return None
    return information_nats(usage, entropy, num_prototypes=num_prototypes)


def _events(config: Mapping[str, Any], told: list[dict[str, Any]], last_step: int) -> list[Event]:
    """What the schedules bring, as far as the run has come, and what the log tells."""
    optimizer, loss = _part(config, "optimizer"), _part(config, "loss")
    planned = (
        (optimizer.get("warmup_steps"), "warm-up ends", "the learning rate is at its peak"),
        (optimizer.get("freeze_last_layer_steps"), "last layer thaws", "the prototypes begin to learn"),
        (
            loss.get("teacher_temperature_warmup_steps"),
            "temperature at its end",
            f"the teacher's temperature stays at {loss.get('teacher_temperature')}",
        ),
    )
    events = [
        Event(step=int(step), name=name, words=words)
        for step, name, words in planned
        if isinstance(step, int) and 0 < step <= last_step
    ]
    events += [
        Event(step=line["step"], name=str(line.get("event", "event")), words=str(line.get("words", "")))
        for line in told
    ]
    return sorted(events, key=lambda event: event.step)


def _verdict(
    config: Mapping[str, Any],
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    told: list[dict[str, Any]],
    *,
    result: Mapping[str, Any] | None,
) -> Verdict:
    """Sick where the guard spoke or the end shows collapse; healthy where the run is known to have helped."""
    sentences: list[str] = []
    total, last = config.get("steps"), steps[-1]["step"] if steps else 0
    prototypes = int(_part(config, "head").get("num_prototypes", 0))
    found = [_information_in(line, prototypes) for line in steps[-_LAST_LINES:]]
    known = [nats for nats in found if nats is not None]
    said = [str(line.get("words", "")) for line in told if line.get("event") == "sickness"]
    has_collapsed = len(known) >= _LAST_LINES and median(known) <= LEAST_INFORMATION_NATS
    if has_collapsed:
        sentences.append(
            "The teacher gives every image the same answer: its embeddings are worthless, whatever the loss "
            "says."
        )
    sentences += [f"The guard said: {words}." for words in said[-1:]]
    if went_back := sum(line.get("event") == "rollback" for line in told):
        sentences.append(
            f"Gradients were NaN or infinite, and the run went back {went_back} times and on with smaller "
            "learning rates; a lower --optimizer.peak-lr would have spared it that."
        )
    if result is None:
        sentences.append(
            f"The run has come to step {last:,} of {total:,}; it goes on with dino-train run --resume."
            if isinstance(total, int)
            else f"The run has come to step {last:,}."
        )
    else:
        sentences.append(f"All {last:,} steps were taken, and the teacher is written as a bundle.")
    has_helped, gained = _gain(evaluations)
    sentences += gained
    state: State = "healthy" if has_helped else "doubtful"
    if said or has_collapsed:
        state = "sick"
    elif result is None:
        state = "unfinished"
    elif not has_helped:
        sentences.append(WHERE_TO_LOOK)
    return Verdict(state=state, sentences=tuple(sentences))


def _gain(evaluations: list[dict[str, Any]]) -> tuple[bool, list[str]]:
    """Whether k-NN is above that of before the training by more than its interval; and that in words."""
    measured = [line for line in evaluations if isinstance(line.get("knn_percent"), int | float)]
    if not measured:
        return False, [_about_rank(evaluations)]
    first, last = measured[0], measured[-1]
    on = "held-out images" if last.get("knn_kind") == "val" else "images of the training folder"
    sentence = f"k-NN on {on}: {last['knn_percent']:.1f} % at step {last['step']:,}"
    if first["step"] != 0 or last is first:
        return False, [f"{sentence}; there is no second measurement to hold it to."]
    gained = last["knn_percent"] - first["knn_percent"]
    sentence += f", {first['knn_percent']:.1f} % before the training: {gained:+.1f} points"
    queries = last.get("knn_queries")
    if not isinstance(queries, int) or queries < 1 or queries != first.get("knn_queries"):
        return False, [f"{sentence}, of queries that the log does not count."]
    low, high = difference_interval(first["knn_percent"] / 100, last["knn_percent"] / 100, queries)
    sentence += f" ({100 * low:+.1f} to {100 * high:+.1f} with {queries:,} queries)"
    if low > 0:
        return True, [f"{sentence}: the training has helped."]
    meaning = (
        "the training has done harm" if high < 0 else "so far nothing shows that the training has helped"
    )
    return False, [f"{sentence}: {meaning}."]


def difference_interval(before: float, after: float, count: int) -> tuple[float, float]:
    """The 95 % interval of after - before, two shares of as many queries, by Newcombe's tenth method (1998).

    The queries are the same, so the true one is narrower; how they pair up is not in the log.
    """
    (before_low, before_high), (after_low, after_high) = (
        wilson_interval(share, count) for share in (before, after)
    )
    gained = after - before
    return (
        gained - math.hypot(after - after_low, before_high - before),
        gained + math.hypot(after_high - after, before - before_low),
    )


def _about_rank(evaluations: list[dict[str, Any]]) -> str:
    """What there is to say where there are no classes."""
    ranks = [line for line in evaluations if isinstance(line.get("rank_me"), int | float)]
    if not ranks:
        return "Nothing was measured yet."
    return (
        f"There are no classes to measure accuracy with; the embeddings use {ranks[-1]['rank_me']:.1f} "
        f"effective dimensions (before the training {ranks[0]['rank_me']:.1f})."
    )


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _json(path: Path) -> dict[str, Any] | None:
    """An object in a file; none where there is no such file, or something else in it."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
