"""The outermost layer of every request: its id, its answer's headers, its metrics, its log line. Pure ASGI.

Not Starlette's BaseHTTPMiddleware, which would hide from routes that a caller has left.
"""

import logging
import re
import secrets
import time
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem_response
from app.api.refusals import InternalError
from app.api.state import State, give_models_back
from app.inference.stages import Passages, passages
from app.served_models import ServedModels
from app.telemetry import Metrics
from app.tracing import RequestSpan, Tracing

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("app.requests")

_REQUEST_ID: Final = re.compile(
    r"[A-Za-z0-9._-]{1,64}"
)  # what is echoed must not be able to break a header or a log
_LEFT: Final = 499


class RequestContext:
    """Gives each request an id and each answer its headers; answers what nothing else caught.

    Args:
        app: What is inside.
        metrics: Hears of every request.
        models: Of which every answer names the one that it is of, or the default.
        tracing: Where spans go; None: there are none.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, models: ServedModels, tracing: Tracing | None = None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._models = models
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # As GET; the server keeps the method in its own scope, and leaves the body away.
            scope = {**scope, "method": "GET"}
        started_s = time.perf_counter()
        state: State = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        request_id = state["request_id"] = _request_id(headers)
        seen = Passages()
        passages.set(seen)  # of this request's task, and of those that it begins
        span = self._tracing.begin(headers, scope["method"]) if self._tracing is not None else None
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                timing = server_timing(state, seen, total_ms=(time.perf_counter() - started_s) * 1000)
                added = self._headers(state) | {"server-timing": timing}
                if span is not None:
                    added["traceparent"] = span.traceparent
                message["headers"] = [*message["headers"], *_raw(added)]
            await send(message)

        try:
            with self._metrics.request_under_way():
                await self._app(scope, receive, send_with_headers)
        except Exception:
            # The caller learns the id and nothing more: an exception's text may hold paths or pixels.
            logger.exception("request %s failed in an unforeseen way", request_id)
            if status:
                raise  # too late for another answer; the server closes the connection
            error = InternalError(f"the service failed on this request; its log says more under {request_id}")
            answer = problem_response(error, request_id=request_id, instance=scope["path"])
            await answer(scope, receive, send_with_headers)
        finally:
            give_models_back(state)
            self._tell(scope, seen, span, status or _LEFT, time.perf_counter() - started_s)

    def _headers(self, state: State) -> dict[str, str]:
        held = state.get("held")
        model = (held[-1] if held else self._models.get()).info
        return {
            "x-request-id": state["request_id"],
            "x-model-id": model.id,
            "x-model-fingerprint": model.fingerprint,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    def _tell(
        self, scope: Scope, seen: Passages, span: RequestSpan | None, status: int, duration_s: float
    ) -> None:
        route = getattr(scope.get("route"), "path", "none")
        request_id = scope["state"]["request_id"]
        self._metrics.request(route, status, duration_s)
        fields: dict[str, object] = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "route": route,
            "status": status,
            "duration_ms": round(duration_s * 1000, 1),
            "images": sum(passage.images for passage in seen.seen),
        }
        if span is not None:
            span.end(route, status, request_id, seen.seen)
            fields["trace_id"] = span.trace_id
        request_logger.info("%s %s", scope["method"], scope["path"], extra={"fields": fields})


def server_timing(state: State, seen: Passages, *, total_ms: float) -> str:
    """The header: the parts of a request's time, and `other`, so that they add up to the total.

    Of calls of the engine that ran beside each other the longest counts.
    """
    timings_ms = dict(state.get("timings_ms", {}))
    embed_ms = timings_ms.pop("embed", None)
    if embed_ms is not None and seen.seen:
        longest = max(seen.seen, key=lambda passage: passage.ended_s - passage.began_s)
        timings_ms |= {part: ms for part, ms in longest.parts_ms().items() if part != "answer"}
    other_ms = total_ms - sum(timings_ms.values())
    timings_ms |= {"other": max(0.0, other_ms), "total": total_ms}
    return ", ".join(f"{part};dur={ms:.1f}" for part, ms in timings_ms.items())


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


def _request_id(headers: Headers) -> str:
    """The caller's own id where it is harmless, otherwise a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
