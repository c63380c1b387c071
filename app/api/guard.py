"""Who may ask, and how much: host, origin, API key, bytes. Pure ASGI, before anything is parsed."""

import re
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.keys import ALL_SCOPES, USUAL_SCOPES, KeyRing, KeyScope
from app.api.problems import problem_response
from app.api.refusals import CrossOrigin, Unauthorized, UntrustedHost
from app.errors import ServiceError, TooLarge
from app.settings import Settings

_OWN_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")
_CHANGES_NOTHING: Final = ("GET", "HEAD", "OPTIONS")
# Neither tells anything of what is kept here. A browser can't send a key when it opens a page.
_OPEN_TO_ALL: Final = ("/", "/docs", "/openapi.json", "/health", "/health/live", "/health/ready")
_OPEN_FOLDER: Final = "/page/"
_IMPORT: Final = re.compile("/collections/[^/]+/import")
LINES_MEDIA_TYPE: Final = "application/x-ndjson"
_STREAM_PATH: Final = re.compile(r"/collections/[^/]+/items|/embed/stream")


class Guard:
    """Refuses requests from elsewhere and requests without a key.

    A page of any site can make a browser send requests to this machine. Three things keep such pages out: the
    Host header must name this machine (against DNS rebinding), a request that changes something must not have
    another site's Origin, and no answer carries a CORS header.

    Args:
        app: What is inside.
        settings: Host, allowed hosts and allowed origins.
        keys: And what each may do.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, keys: KeyRing) -> None:
        self._app = app
        # On other addresses the names are the network's own, and we can't know them unless we are told.
        knows_its_names = settings.is_loopback or bool(settings.allowed_hosts)
        own_names = (*_OWN_NAMES, *(name.lower() for name in settings.allowed_hosts))
        self._hosts = frozenset(own_names) if knows_its_names else None
        self._origins = frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins)
        self._keys = keys
        # Who reaches a service that asks for no key may be anybody, unless that is this machine alone.
        self._without_key = ALL_SCOPES if settings.is_loopback else USUAL_SCOPES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            self._check_origin(scope["method"], headers)
            scope.setdefault("state", {})["scopes"] = self._scopes(scope["path"], headers)
        except ServiceError as error:
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        host = _without_port(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            raise UntrustedHost(
                f"the Host header is {host[:100]!r}, and this service answers to "
                f"{', '.join(sorted(self._hosts))}: name others with --allowed-hosts"
            )

    def _check_origin(self, method: str, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or method in _CHANGES_NOTHING or origin.lower() in self._origins:
            return
        if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            raise CrossOrigin(
                f"the request comes from a page of {origin[:100]!r}: allow its site with --allowed-origins"
            )

    def _scopes(self, path: str, headers: Headers) -> frozenset[KeyScope]:
        """What the request may do; `app.api.scopes` compares it with what its route needs."""
        if not self._keys.needs_key:
            return self._without_key
        if path in _OPEN_TO_ALL or path.startswith(_OPEN_FOLDER):
            return frozenset()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        scopes = self._keys.scopes_of(key)
        if scopes is None:
            raise Unauthorized("this service wants an API key: send the header `Authorization: Bearer KEY`")
        return scopes


def is_line_stream(scope: Scope) -> bool:
    """Whether a request's body is a stream of lines, which may be as long as it likes.

    Two routes take such bodies, and they bound each line, what they hold of them, and the time between two
    pieces. The guard's other checks, keys among them, come before any of it.
    """
    media_type, _, _ = Headers(scope=scope).get("content-type", "").partition(";")
    return (
        media_type.strip().lower() == LINES_MEDIA_TYPE
        and scope["method"] == "POST"
        and _STREAM_PATH.fullmatch(scope["path"]) is not None
    )


class BodyLimit:
    """Refuses bodies above a limit: by Content-Length before a byte is read, and by counting them all.

    Streams of lines are let through: see `is_line_stream`.

    Args:
        app: What is inside.
        max_bytes: Of a whole body.
        max_import_bytes: Of a file to import, which is not kept in memory.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_import_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_import_bytes = max_import_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] != "http" or is_line_stream(scope):
            await self._app(scope, receive, send)
            return
        limit = self._max_import_bytes if _IMPORT.fullmatch(scope["path"]) else self._max_bytes
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            await _refuse(_too_large(int(declared), limit), scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    raise _too_large(received, limit)
            return message

        await self._app(scope, counted, send)


class EncodedItemPaths:
    """Lets routes of items see their path as it was sent, so that an id may contain an encoded slash.

    Servers decode `%2F` before routing: the item `a/thumbnail` and the thumbnail of `a` would be one path.
    Below `/collections/` the router therefore gets the encoded path, and `decoded_id` decodes each part by
    itself.

    Args:
        app: What is inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        raw_path = scope.get("raw_path")
        if scope["type"] == "http" and raw_path and scope["path"].startswith("/collections/"):
            scope["path"] = raw_path.partition(b"?")[0].decode("ascii")
        await self._app(scope, receive, send)


def _too_large(actual: int, limit: int) -> TooLarge:
    return TooLarge(
        f"the body has {actual:,} bytes or more, at most {limit:,} are taken: send less at once",
        limit=limit,
        actual=actual,
    )


async def _refuse(error: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
    request_id = scope.get("state", {}).get("request_id", "")
    answer = problem_response(error, request_id=request_id, instance=scope["path"])
    await answer(scope, receive, send)


def _without_port(host: str) -> str:
    """`localhost:8000` to `localhost`, `[::1]:8000` to `[::1]`."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() else host.lower()
