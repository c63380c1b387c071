"""The log and the screen: lines that programs can read, after a crash too, and numbers that people can."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from training.runlog import MetricsLog, Pace, Screen, read_metrics
from training.step import StepMetrics

METRICS = StepMetrics(
    loss_nats=3.5,
    teacher_entropy_nats=3.0,
    kl_nats=0.5,
    prototype_usage=0.5,
    gradient_norm=1.0,
    is_finite=True,
)


def test_a_resumed_log_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, keep_to_step=0) as log:
        for step in (1, 2, 3):
            log.write(step, "step", {"loss_nats": step / 2})
    with MetricsLog(path, keep_to_step=2) as log:
        log.write(3, "step", {"loss_nats": 9.0})
    assert [(line["step"], line["loss_nats"]) for line in read_metrics(path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "kind": "step"}\n{"step": 2, "ki')
    assert [line["step"] for line in read_metrics(path)] == [1]


def test_nan_becomes_null(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "log", keep_to_step=0) as log:
        log.write(1, "step", {"loss_nats": float("nan"), "gradient_norm": float("inf")})
    assert read_metrics(tmp_path / "log") == [
        {"step": 1, "kind": "step", "loss_nats": None, "gradient_norm": None}
    ]


def test_the_pace_is_images_over_time_and_the_share_of_waiting() -> None:
    pace = Pace()
    for second in range(4):
        pace.step(images=8, waited_s=0.25, now_s=float(second))
    assert (pace.images_per_s, pace.data_wait_share) == (8.0, 0.25)


def test_a_pause_is_no_slow_step() -> None:
    pace = Pace()
    pace.step(images=8, waited_s=0, now_s=0.0)
    pace.step(images=8, waited_s=0, now_s=1.0)
    pace.pause()
    pace.step(images=8, waited_s=0, now_s=100.0)
    pace.step(images=8, waited_s=0, now_s=101.0)
    assert pace.images_per_s == pytest.approx(8.0)


def test_plain_lines_have_speed_waiting_split_and_time_left() -> None:
    text = io.StringIO()
    pace = Pace()
    pace.step(images=10, waited_s=0, now_s=0.0)
    pace.step(images=10, waited_s=0.5, now_s=1.0)
    with Screen(total_steps=3725, num_prototypes=64, console=Console(file=text, width=200)) as screen:
        screen.step(2, METRICS, pace)
        screen.step(3, METRICS, pace)
    line = text.getvalue()
    assert line.count("\n") == 1, "a second line comes only after some seconds"
    for words in (
        "step 2/3725",
        "loss 3.500 = entropy 3.000 + KL 0.500",
        "uniform 4.16",
        "10 images/s",
        "50%",
        "1:02:03",
    ):
        assert words in line


def test_a_terminal_gets_a_bar_and_sentences_above_it() -> None:
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True)
    with Screen(total_steps=10, num_prototypes=64, console=console) as screen:
        screen.step(2, METRICS, Pace(images_per_s=5.0))
        screen.say("k-NN [val] 40 %")
    assert "2/10" in text.getvalue()
    assert "k-NN [val] 40 %" in text.getvalue()
