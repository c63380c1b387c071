"""What a real service says of itself, before and after traffic whose every number is known."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.app.api.serving import multipart
from tests.app.running import Service, picture, running_service, write_tiny_bundle

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running_service(write_tiny_bundle(tmp_path / "tiny"), tmp_path / "data", "--json-logs") as running:
        yield running


def scraped(service: Service) -> Series:
    text = httpx.get(service.url + "/metrics").text
    return {
        (sample.name.removeprefix("dino_serve_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(series: Series, name: str, **labels: str) -> float:
    return series.get((name, frozenset(labels.items())), 0.0)


def test_every_number_means_what_it_says(service: Service) -> None:
    began_s = time.monotonic()
    before = scraped(service)
    assert value(before, "images_total", model="tiny", outcome="embedded") == 0
    assert ("images_total", frozenset({("model", "tiny"), ("outcome", "embedded")})) in before
    files = [picture(1), picture(2), picture(3), b"not an image"]
    with httpx.Client(base_url=service.url) as http:
        assert http.post("/embed", files=multipart(files)).json()["usage"] == {"images": 4, "failed": 1}
        assert http.post("/embed", files=multipart(files[:2])).status_code == 200  # from the cache
        assert http.post("/embed", files=multipart([picture(1)] * 300)).status_code == 413
        assert http.get("/nowhere/at/all").status_code == 404
    after = scraped(service)
    wall_s = time.monotonic() - began_s

    def grew(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    model = {"model": "tiny"}
    assert grew("images_total", outcome="embedded", **model) == 5
    assert grew("images_total", outcome="failed", **model) == 1
    assert grew("image_errors_total", reason="unsupported_format", **model) == 1
    assert grew("cache_hits_total", kind="stored", **model) == 2
    # Three were decoded and computed, in one to three launches.
    assert grew("decode_seconds_count", **model) == 3
    assert grew("queue_wait_seconds_count", **model) == 3
    assert grew("batch_size_sum", **model) == 3
    launches = grew("batch_size_count", **model)
    assert 1 <= launches <= 3
    assert grew("forward_seconds_count", **model) == launches
    assert grew("padding_images_total", **model) == 0  # a CPU runs any size
    busy_s = grew("device_busy_seconds_total", **model)
    # One batch at a time on a CPU: busy is the sum of the forwards, and part of the time that passed.
    assert busy_s == pytest.approx(grew("forward_seconds_sum", **model), rel=0.05)
    assert 0 < busy_s <= wall_s
    decode_cpu_s = grew("decode_cpu_seconds_total", **model)
    assert 0 < decode_cpu_s <= wall_s * 64
    assert grew("decode_seconds_sum", **model) > 0
    assert decode_cpu_s <= grew("process_cpu_seconds_total") + 0.02  # the kernel counts in hundredths
    assert grew("requests_total", route="/embed", code="200") == 2
    assert grew("requests_total", route="/embed", code="413") == 1
    assert grew("requests_total", route="none", code="404") == 1
    assert grew("request_duration_seconds_count", route="/embed") == 3
    assert 0 < grew("request_duration_seconds_sum", route="/embed") <= wall_s
    for name in ("queue_depth", "inflight_images", "inflight_bytes", "inflight_batches", "queue_pixels"):
        assert value(after, name, **model) == 0
    assert value(after, "ready", **model) == 1
    assert value(after, "inflight_requests") == 1  # the scrape itself
    assert value(after, "process_resident_memory_bytes") > 50 * 2**20
    (info,) = [dict(labels) for name, labels in after if name == "model_info"]
    assert info["fingerprint"] == httpx.get(service.url + "/info").json()["model"]["fingerprint"]
    assert (info["model"], info["architecture"], info["dimensions"]) == ("tiny", "vit_tiny_patch16_224", "48")
    routes = {dict(labels).get("route") for name, labels in after if name == "requests_total"}
    assert routes <= {"/embed", "/metrics", "none", "/info"}


def test_each_request_is_one_line_of_json_with_its_id_and_no_bytes(service: Service) -> None:
    headers = {"X-Request-Id": "mine.1"}
    answer = httpx.post(service.url + "/embed", files=multipart([picture(1), picture(2)]), headers=headers)
    assert answer.headers["X-Request-Id"] == "mine.1"
    made = httpx.get(service.url + "/nowhere", headers={"X-Request-Id": "two\twords"})
    made_id = made.headers["X-Request-Id"]
    assert made.json()["request_id"] == made_id
    assert made_id != "two\twords"
    service.process.terminate()
    service.process.wait(30)
    deadline_s = time.monotonic() + 30
    while not any(made_id in line for line in service.log) and time.monotonic() < deadline_s:
        time.sleep(0.01)  # what it said is read by another thread
    lines = [json.loads(line) for line in service.log if line.startswith("{")]
    requests = {line["request_id"]: line for line in lines if "request_id" in line}
    assert len([line for line in lines if line.get("logger") == "app.requests"]) == 2
    mine = requests["mine.1"]
    assert (mine["method"], mine["route"], mine["status"], mine["images"]) == ("POST", "/embed", 200, 2)
    assert (requests[made_id]["route"], requests[made_id]["status"]) == ("none", 404)
    assert "JFIF" not in "".join(service.log)
