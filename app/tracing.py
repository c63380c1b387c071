"""OpenTelemetry spans of requests, where `--otlp-endpoint` names a collector; needs the extra `otel`.

    POST /embed                     of the caller's trace, where `traceparent` says which
    ├── queue   for a decoder
    ├── decode
    ├── queue   for the device
    └── forward

The parts are those of the picture that kept its caller waiting; they are written down when the request has
ended, from moments that are taken anyhow. Without an endpoint nothing here runs, and neither SDK nor exporter
is imported. FastAPI's own telemetry, which knows no queue and no batch, stays off unless its variables ask.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Protocol

from app.inference.stages import Passage
from app.settings import SettingsInvalid

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_NS_PER_S: Final = 1_000_000_000
_SERVER_FAULT: Final = 500
_CLOSE_MS: Final = 5_000


class RequestSpan(Protocol):
    """The span of one request."""

    @property
    def traceparent(self) -> str:
        """Its header, as W3C's Trace Context has it."""
        ...

    @property
    def trace_id(self) -> str:
        """In hexadecimal, for logs."""
        ...

    def end(self, route: str, status: int, request_id: str, passages: Sequence[Passage]) -> None:
        """Ends it, with the parts that the engine noted."""
        ...


class Tracing:
    """Makes spans.

    Args:
        provider: Of OpenTelemetry's SDK; whoever made it shuts it down.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace  # noqa: PLC0415 - an extra, which may be missing
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415 - likewise
            TraceContextTextMapPropagator,
        )

        self._provider = provider
        self._tracer = provider.get_tracer("dinoserve", version("dinoserve"))
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def begin(self, headers: Mapping[str, str], method: str) -> RequestSpan:
        """Begins a request's span, as a child of the caller's."""
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        span = self._tracer.start_span(
            method, context=self._propagator.extract(carrier), kind=self._trace.SpanKind.SERVER
        )
        return _RequestSpan(self, span, method)

    def close(self) -> None:
        """Sends what is left."""
        self._provider.force_flush(_CLOSE_MS)
        self._provider.shutdown()

    def traceparent_of(self, span: "Span") -> str:
        """A span's header."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context=self._trace.set_span_in_context(span))
        return carrier["traceparent"]

    def add_parts(self, span: "Span", passage: Passage, *, epoch_ns: int) -> None:
        """Adds the parts of a call of the engine below a request's span."""
        below = self._trace.set_span_in_context(span)
        for name, began_s, ended_s, attributes in _parts(passage):
            part = self._tracer.start_span(
                name,
                context=below,
                start_time=epoch_ns + int(began_s * _NS_PER_S),
                attributes={"dino.images": passage.images, **attributes},
            )
            part.end(epoch_ns + int(ended_s * _NS_PER_S))

    def failed(self) -> Any:  # noqa: ANN401 - OpenTelemetry's status
        """The status of a request that failed by our fault."""
        return self._trace.Status(self._trace.StatusCode.ERROR)


class _RequestSpan:
    def __init__(self, tracing: Tracing, span: "Span", method: str) -> None:
        self._tracing = tracing
        self._span = span
        self._method = method
        # Moments are of the monotonic clock; spans are of the calendar's.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    @property
    def traceparent(self) -> str:
        return self._tracing.traceparent_of(self._span)

    @property
    def trace_id(self) -> str:
        return format(self._span.get_span_context().trace_id, "032x")

    def end(self, route: str, status: int, request_id: str, passages: Sequence[Passage]) -> None:
        span = self._span
        if span.is_recording():
            span.update_name(f"{self._method} {route}")
            span.set_attributes(
                {
                    "http.request.method": self._method,
                    "http.route": route,
                    "http.response.status_code": status,
                    "dino.request_id": request_id,
                }
            )
            if status >= _SERVER_FAULT:
                span.set_status(self._tracing.failed())
            for passage in passages:
                self._tracing.add_parts(span, passage, epoch_ns=self._epoch_ns)
        span.end()


def make_tracing(endpoint: str) -> Tracing:
    """Sends spans to a collector that speaks OTLP over HTTP, in batches, from a thread of its own.

    What else OpenTelemetry can be told by its variables (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …) counts.

    Args:
        endpoint: Say http://127.0.0.1:4318; its path /v1/traces may be left out.

    Raises:
        SettingsInvalid: The extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - an extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - likewise
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - likewise
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - likewise
    except ImportError:
        raise SettingsInvalid(
            "otlp_endpoint is set, and OpenTelemetry is not installed: pip install 'dinoserve[otel]'"
        ) from None
    path = "/v1/traces"
    address = endpoint.rstrip("/")
    address += "" if address.endswith(path) else path
    # OTEL_SERVICE_NAME, where it is set, wins over the first.
    provider = TracerProvider(resource=Resource({"service.name": "dinoserve"}).merge(Resource.create()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=address)))
    return Tracing(provider)


def _parts(passage: Passage) -> Iterator[tuple[str, float, float, dict[str, str]]]:
    began_s, decoding_s, decoded_s, launched_s, computed_s = passage.moments_s()
    names: tuple[tuple[str, float, float, dict[str, str]], ...] = (
        ("queue", began_s, decoding_s, {"dino.for": "decoder"}),
        ("decode", decoding_s, decoded_s, {}),
        ("queue", decoded_s, launched_s, {"dino.for": "device"}),
        ("forward", launched_s, computed_s, {}),
    )
    return (part for part in names if part[2] > part[1])
