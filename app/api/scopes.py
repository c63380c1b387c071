"""What each route needs of a key; a service that has a route which isn't here doesn't start."""

from collections.abc import Iterable
from typing import Final

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from app.api.keys import KeyScope
from app.api.refusals import MissingScope
from app.api.state import StateDep

_ITEMS: Final = "/collections/{name}/items"
# None: any key. What changes a collection needs `write`, what tells of it `search`.
SCOPES: Final[dict[str, KeyScope | None]] = {
    "GET /info": None,
    "GET /metrics": None,
    "GET /v1/models": None,
    "GET /v1/models/{model}": None,
    "POST /embed": "embed",
    "POST /embed/stream": "embed",
    "POST /attention": "embed",
    "POST /v1/embeddings": "embed",
    "POST /similar": "search",
    "GET /collections": "search",
    "POST /collections": "write",
    "GET /collections/{name}": "search",
    "DELETE /collections/{name}": "write",
    "POST /collections/{name}/count": "search",
    "GET /collections/{name}/map": "search",
    "GET /collections/{name}/duplicates": "search",
    "GET /collections/{name}/clusters": "search",
    "GET /collections/{name}/export": "search",
    "POST /collections/{name}/import": "write",
    "GET /collections/{name}/reindex": "search",
    "POST /collections/{name}/reindex": "write",
    "DELETE /collections/{name}/reindex": "write",
    f"GET {_ITEMS}": "search",
    f"POST {_ITEMS}": "write",
    f"POST {_ITEMS}/get": "search",
    f"POST {_ITEMS}/delete": "write",
    f"POST {_ITEMS}/undelete": "write",
    f"GET {_ITEMS}/{{item_id:path}}": "search",
    f"DELETE {_ITEMS}/{{item_id:path}}": "write",
    f"GET {_ITEMS}/{{item_id:path}}/thumbnail": "search",
    "GET /aliases": "search",
    "PUT /aliases/{alias}": "write",
    "DELETE /aliases/{alias}": "write",
    "GET /snapshots": "search",
    "POST /snapshots": "write",
    "GET /snapshots/{name}": "search",
    "DELETE /snapshots/{name}": "write",
    "POST /snapshots/{name}/restore": "write",
    "POST /admin/reload": "admin",
}


def name_of(method: str, path: str) -> str:
    """A route's name in `SCOPES`."""
    return f"{method} {path}"


def check_scopes(routes: Iterable[BaseRoute]) -> None:
    """Refuses routes that `SCOPES` has nothing of.

    Args:
        routes: Those that need a key.

    Raises:
        LookupError: There is one.
    """
    for route in routes:
        if isinstance(route, APIRoute):
            for method in route.methods or ():
                if name_of(method, route.path) not in SCOPES:
                    raise LookupError(f"app.api.scopes says not what {method} {route.path} needs of a key")


async def require_scope(request: Request, state: StateDep) -> None:
    """Refuses keys that may not use the route.

    Raises:
        MissingScope: The key's scopes don't have the route's.
    """
    needed = SCOPES[name_of(request.scope["method"], request.scope["route"].path)]
    given = state["scopes"]
    if needed is not None and needed not in given:
        has = f"this key may {', '.join(sorted(given))}" if given else "this key may do nothing"
        raise MissingScope(
            f"{has}, and this needs {needed!r}: use a key that has it in the service's --api-key-file"
        )
