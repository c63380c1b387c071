"""The routes that are asked most, reached without the framework's router and dependencies. Pure ASGI.

FastAPI resolves six dependencies for each request, and compares it with each route: half of what the event
loop does for a picture (docs/lab-notes.md, 2026-11-28). A request that is what these routes expect goes to
its function at once. Every other, be it one header that can't be read, goes the framework's way, which knows
how to refuse it; so there is one definition of what is refused, and how.
"""

import math
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, get_args

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.problems import problem_response
from app.api.scopes import SCOPES, name_of
from app.api.state import State
from app.errors import ServiceError
from app.inference.lanes import Lane

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
        if (needed is not None and needed not in state["scopes"]) or not _read_headers(scope, state):
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        endpoint: Callable[..., Awaitable[Response]] = route.endpoint
        try:
            answer = await endpoint(request=Request(scope, receive, send), state=state)
        except ServiceError as error:
            answer = problem_response(error, request_id=state["request_id"], instance=scope["path"])
        await answer(scope, receive, send)


def _read_headers(scope: Scope, state: State) -> bool:
    """Keeps what the headers say, as `read_urgency` does; False where the framework has to look."""
    headers = Headers(scope=scope)
    if _PINS in headers:
        return False
    if (timeout_ms := headers.get("x-request-timeout-ms")) is not None:
        try:
            timeout_s = float(timeout_ms) / 1000
        except ValueError:
            return False
        if not 0 < timeout_s < math.inf:
            return False
        state["timeout_said_s"] = timeout_s
    if (priority := headers.get("x-priority")) is not None:
        lanes: dict[str, Lane] = {lane: lane for lane in get_args(Lane)}
        if priority not in lanes:
            return False
        state["priority_said"] = lanes[priority]
    return True
