"""The dashboard and the alerts name metrics that the service has, with labels that these have."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.inference.config import InferenceConfig
from app.inference.engine import Engine
from app.telemetry import Metrics, Present
from tests.app.inference.colours import ColourEmbedder

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "docs/grafana.json").read_text())
PAGE = (ROOT / "docs/watching.md").read_text()
ALERTS = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0])

PANELS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
RULES = {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}
EXPRESSIONS = PANELS | RULES
_NAME = re.compile(r"\b(?:dino_serve|process)_\w+")
_SELECTOR = re.compile(r"\b((?:dino_serve|process)_\w+)\{([^}]*)\}")


def exposed() -> dict[str, set[str]]:
    """Every series' name, and the labels that it can have."""
    metrics = Metrics()
    engine = Engine(ColourEmbedder(), InferenceConfig())
    observer = metrics.of("colours")
    observer.count("image_errors_total", label="undecodable_image")
    metrics.request("/embed", 200, 0.1)
    metrics.serves(lambda: [Present(engine.model, "vit", engine.gauges())])
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


EXPOSED = exposed()


@pytest.mark.parametrize("place", sorted(EXPRESSIONS))
def test_every_expression_names_metrics_and_labels_that_are_exposed(place: str) -> None:
    expression = EXPRESSIONS[place]
    names = set(_NAME.findall(expression))
    assert names
    assert names <= set(EXPOSED)
    for name, selector in _SELECTOR.findall(expression):
        asked = set(re.findall(r"(\w+)\s*[=!]", selector))
        assert asked <= EXPOSED[name] | {"instance", "job"}, selector  # those two are Prometheus's own


def test_the_page_names_every_metric() -> None:
    families = {
        re.sub(r"^dino_serve_|_(bucket|sum|count|created)$", "", name)
        for name in EXPOSED
        if name.startswith("dino_serve_") and not name.endswith("_created")
    }
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in families}
    assert {name for name in families if f"`{name}`" not in PAGE} == set()


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]}
    ids = {panel["id"] for panel in DASHBOARD["panels"]}
    assert len(places) == len(ids) == len(DASHBOARD["panels"])
    for variable in ("$instance", "$model"):
        assert any(variable in expression for expression in PANELS.values())
