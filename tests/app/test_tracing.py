"""Spans of real requests, kept in memory by OpenTelemetry's own exporter; and none where none are wanted."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.inference.stages import Passage, Stages
from app.settings import SettingsInvalid
from app.tracing import Tracing, make_tracing
from dino_core.bundle import load_bundle
from tests.app.api.serving import Api, multipart, photo, serving
from tests.app.running import ROOT, write_tiny_bundle

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def api(exporter: InMemorySpanExporter, tmp_path: Path) -> Iterator[Api]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    bundle = load_bundle(write_tiny_bundle(tmp_path / "tiny"), device="cpu")
    with serving(bundle, tmp_path / "data", tracing=Tracing(provider)) as api:
        yield api


def spans_of(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """The spans of a trace that has a root of such a name, once that has ended: just after its answer."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        spans = exporter.get_finished_spans()
        roots = [span for span in spans if span.name == name]
        if roots:
            trace_id = roots[-1].context.trace_id
            return [span for span in spans if span.context.trace_id == trace_id]
        time.sleep(0.01)
    raise AssertionError(f"no span {name!r} in {[span.name for span in exporter.get_finished_spans()]}")


def test_a_request_is_a_span_of_the_callers_trace_with_its_parts_in_order(
    api: Api, exporter: InMemorySpanExporter
) -> None:
    headers = {"traceparent": CALLER, "X-Request-Id": "r1"}
    answer = api.http.post("/embed", files=multipart([photo(1), photo(2)]), headers=headers)
    spans = spans_of(exporter, "POST /embed")
    (root,) = [span for span in spans if span.name == "POST /embed"]
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == "b7ad6b7169203331"
    _, trace_id, span_id, _ = answer.headers["traceparent"].split("-")
    assert trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert span_id == format(root.context.span_id, "016x")
    assert root.attributes is not None
    assert (root.attributes["http.response.status_code"], root.attributes["dino.request_id"]) == (200, "r1")
    parts = [span for span in spans if span is not root]
    assert [span.name for span in parts] == ["queue", "decode", "queue", "forward"]
    ends = [root.start_time, *(span.end_time for span in parts), root.end_time]
    assert all(span.parent is not None and span.parent.span_id == root.context.span_id for span in parts)
    assert ends == sorted(ends)  # type: ignore[type-var]
    timing = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
    (decode,) = [span for span in parts if span.name == "decode"]
    assert decode.end_time is not None
    assert decode.start_time is not None
    assert (decode.end_time - decode.start_time) / 1e6 == pytest.approx(float(timing["decode"]), abs=0.06)


def test_without_a_caller_the_trace_is_the_services_own_and_a_refusal_has_no_parts(
    api: Api, exporter: InMemorySpanExporter
) -> None:
    answer = api.http.post("/embed", content=b"x", headers={"Content-Type": "text/plain"})
    (root,) = spans_of(exporter, "POST /embed")
    assert root.parent is None
    assert root.attributes is not None
    assert root.attributes["http.response.status_code"] == answer.status_code == 415


def test_a_malformed_traceparent_begins_a_trace_of_its_own(api: Api, exporter: InMemorySpanExporter) -> None:
    api.http.get("/info", headers={"traceparent": "nonsense"})
    (root,) = spans_of(exporter, "GET /info")
    assert root.parent is None


def test_an_image_from_the_cache_has_no_parts(api: Api, exporter: InMemorySpanExporter) -> None:
    api.http.post("/embed", files=multipart([photo(5)]))
    spans_of(exporter, "POST /embed")
    exporter.clear()
    api.http.post("/embed", files=multipart([photo(5)]))
    assert [span.name for span in spans_of(exporter, "POST /embed")] == ["POST /embed"]


def test_without_an_endpoint_neither_sdk_nor_exporter_is_imported() -> None:
    # Of its API, which does nothing by itself, FastAPI imports parts.
    extra = "('opentelemetry.sdk', 'opentelemetry.exporter')"
    program = f"import sys, app.cli; sys.exit(any(name in sys.modules for name in {extra}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsInvalid, match=r"dinoserve\[otel\]"):
        make_tracing("http://127.0.0.1:4318")


def test_a_collector_receives_spans_over_http(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        tracing = make_tracing(f"http://127.0.0.1:{server.server_port}")
        span = tracing.begin(httpx.Headers(), "GET")
        span.end("/info", 200, "r1", [Passage(1.0, Stages(1.1, 1.2, 1.3, 1.4), 1.5, 1)])
        tracing.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    ((path, body),) = received
    assert path == "/v1/traces"
    assert b"GET /info" in body
    assert b"forward" in body


def test_the_parts_of_a_passage_add_up_whatever_is_missing_or_came_early() -> None:
    whole = Passage(10.0, Stages(10.1, 10.3, 10.6, 11.0), 11.5, 3)
    assert whole.parts_ms() == pytest.approx({"queue": 400, "decode": 200, "forward": 400, "answer": 500})
    joined = Passage(10.5, Stages(10.1, 10.3, 10.6, 11.0), 11.5, 1)  # the same bytes were under way
    assert joined.parts_ms() == pytest.approx({"queue": 100, "decode": 0, "forward": 400, "answer": 500})
    for passage in (whole, joined, Passage(1.0, None, 1.5, 1), Passage(1.0, Stages(), 1.5, 1)):
        total_ms = (passage.ended_s - passage.began_s) * 1_000
        assert sum(passage.parts_ms().values()) == pytest.approx(total_ms)
