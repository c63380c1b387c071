"""The page at `/`, the API's description at `/docs`, and their files. Nothing comes from another host."""

import hashlib
from importlib.resources import files
from typing import Final

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.refusals import UnknownRoute

_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Pictures also from `blob:`, which are those that the visitor chose, and thumbnails fetched with an API key.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Pages:
    """The page's files, read once."""

    def __init__(self) -> None:
        folder = files("app").joinpath("page")
        self._files = {
            entry.name: entry.read_bytes()
            for entry in folder.iterdir()
            if entry.is_file() and _extension(entry.name) in _MEDIA_TYPES
        }

    def answer(self, name: str, request: Request) -> Response:
        """One file, or 304 where the browser has it.

        Raises:
            UnknownRoute: There is no such file.
        """
        content = self._files.get(name)
        if content is None:
            raise UnknownRoute(f"nothing is at {request.scope['path']}")
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            # Asked again each time: after an upgrade an old page would call new routes.
            "Cache-Control": "no-cache",
            "Content-Security-Policy": _POLICY,
        }
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=_MEDIA_TYPES[_extension(name)], headers=headers)


def page_router(pages: Pages) -> APIRouter:
    """The routes of the pages."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def front(request: Request) -> Response:
        return pages.answer("index.html", request)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        return pages.answer("docs.html", request)

    @router.get("/page/{name}")
    async def asset(request: Request, name: str) -> Response:
        return pages.answer(name, request)

    return router


def _extension(name: str) -> str:
    return "." + name.rpartition(".")[2]
