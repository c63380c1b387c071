"""The routes that are asked most, reached without the framework's router and dependencies. Pure ASGI.

FastAPI resolves six dependencies for each request, and compares it with each route: half of what the event
loop does for a picture (docs/lab-notes.md, 2026-11-28). A request that is what these routes expect goes to
its function at once. Every other, be it one header that can't be read, goes the framework's way, which knows
how to refuse it; so there is one definition of what is refused, and how.
"""

import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.problems import problem_response
from app.api.scopes import SCOPES, name_of
from app.api.state import State
from app.api.urgency import read_urgency
from app.errors import ServiceError
from app.inference.lanes import LANES, Lane

_PINS: Final = "x-expect-fingerprint"


class DirectRoutes:
    """Serves some routes by itself.

    Args:
        app: What serves all others.
        routes: Without parts of the path that vary; their functions take `request` and `state`.
    """

    def __init__(self, app: ASGIApp, *, routes: Iterable[APIRoute]) -> None:
        self._app = app
        self._routes = {
            (method, route.path): (route, SCOPES[name_of(method, route.path)])
            for route in routes
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        found = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        route, needed = found
        state: State = scope["state"]
        said = _said_by(Headers(scope=scope))
        if said is None or (needed is not None and needed not in state["scopes"]):
            await self._app(scope, receive, send)
            return
        await read_urgency(state, *said)
        scope["route"] = route
        endpoint: Callable[..., Awaitable[Response]] = route.endpoint
        try:
            answer = await endpoint(request=Request(scope, receive, send), state=state)
        except ServiceError as error:
            answer = problem_response(error, request_id=state["request_id"], instance=scope["path"])
        await answer(scope, receive, send)


def _said_by(headers: Headers) -> tuple[Lane | None, float | None] | None:
    """Lane and milliseconds, as `read_urgency` takes them; None where the framework has to look."""
    if _PINS in headers:
        return None
    timeout_ms = None
    if (text := headers.get("x-request-timeout-ms")) is not None:
        try:
            timeout_ms = float(text)
        except ValueError:
            return None
        if not 0 < timeout_ms < math.inf:
            return None
    said = headers.get("x-priority")
    lane = next((lane for lane in LANES if lane == said), None)
    return None if lane != said else (lane, timeout_ms)
