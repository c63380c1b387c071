import json
import logging
import sys
from typing import get_args

import pytest

from app.inference.engine import Engine, InferenceConfig
from app.inference.stats import CounterName, HistogramName
from app.telemetry import JsonLines, Metrics, Present, set_up_logs
from tests.app.inference.colours import ColourEmbedder


def test_everything_that_the_engine_observes_has_a_metric() -> None:
    metrics = Metrics()
    observer = metrics.of("colours")
    for counter in get_args(CounterName):
        observer.count(counter, 2)
    for histogram in get_args(HistogramName):
        observer.observe(histogram, 0.5)
    lines = metrics.exposition().decode()
    for name in get_args(CounterName):
        assert f"dino_serve_{name}" in lines
    for name in get_args(HistogramName):
        assert f'dino_serve_{name}_count{{model="colours"}} 1.0' in lines


def test_the_engines_state_is_asked_for_at_each_scrape() -> None:
    metrics = Metrics()
    engine = Engine(ColourEmbedder(), InferenceConfig())
    state = engine.gauges()
    metrics.serves(lambda: [Present(engine.model, "vit", state)])
    lines = metrics.exposition().decode()
    assert all(f'dino_serve_{name}{{model="colours"}} ' in lines for name in state)
    state["queue_depth"] = 7
    assert 'dino_serve_queue_depth{model="colours"} 7.0' in metrics.exposition().decode()


def test_every_gauge_of_the_engine_is_explained() -> None:
    metrics = Metrics()
    engine = Engine(ColourEmbedder(), InferenceConfig())
    metrics.serves(lambda: [Present(engine.model, "vit", engine.gauges())])
    helps = [line for line in metrics.exposition().decode().splitlines() if line.startswith("# HELP")]
    assert all(len(line.split(" ", 3)[3].split()) > 1 for line in helps)


def test_a_log_line_is_one_json_object_with_fields_and_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("app", logging.ERROR, "", 1, "hello %s", ("you",), sys.exc_info())
    record.fields = {"request_id": "r"}
    text = JsonLines().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["logger"], line["message"], line["request_id"]) == (
        "error",
        "app",
        "hello you",
        "r",
    )
    assert "ValueError: two" in line["traceback"]


@pytest.mark.parametrize(("json_lines", "requests"), [(True, True), (False, False)])
def test_only_json_logs_have_a_line_for_each_request(json_lines: bool, requests: bool) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        set_up_logs(level="info", json_lines=json_lines)
        assert logging.getLogger("app.requests").isEnabledFor(logging.INFO) is requests
        assert isinstance(root.handlers[0].formatter, JsonLines) is json_lines
    finally:
        root.handlers, root.level = before[0], before[1]
        logging.getLogger("app.requests").setLevel(logging.NOTSET)
        logging.getLogger("uvicorn").setLevel(logging.NOTSET)
