"""The outermost layer of every request: its id, its answer's headers, its metrics, its log line. Pure ASGI.

Not Starlette's BaseHTTPMiddleware, which would hide from routes that a caller has left.
"""

import logging
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import problem_response
from app.api.refusals import InternalError
from app.api.state import State, give_models_back
from app.served_models import ServedModels
from app.telemetry import Metrics

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
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, models: ServedModels) -> None:
        self._app = app
        self._metrics = metrics
        self._models = models

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
        request_id = state["request_id"] = _request_id(Headers(scope=scope))
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                state.setdefault("timings_ms", {})["total"] = (time.perf_counter() - started_s) * 1000
                self._add_headers(MutableHeaders(scope=message), state)
            await send(message)

        try:
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
            self._tell(scope, request_id, status or _LEFT, time.perf_counter() - started_s)

    def _add_headers(self, headers: MutableHeaders, state: State) -> None:
        held = state.get("held")
        model = (held[-1] if held else self._models.get()).info
        headers["X-Request-Id"] = state["request_id"]
        headers["X-Model-Id"] = model.id
        headers["X-Model-Fingerprint"] = model.fingerprint
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Server-Timing"] = ", ".join(
            f"{part};dur={ms:.1f}" for part, ms in state["timings_ms"].items()
        )

    def _tell(self, scope: Scope, request_id: str, status: int, duration_s: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.request(route, status, duration_s)
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_ms": round(duration_s * 1000, 1),
        }
        request_logger.info("%s %s", scope["method"], scope["path"], extra={"fields": fields})


def _request_id(headers: Headers) -> str:
    """The caller's own id where it is harmless, otherwise a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
