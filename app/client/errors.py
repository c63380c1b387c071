"""What can go wrong for a client, as a tree.

ClientError
├── NoService            nobody answers at the address, or not a dinoserve
└── ServiceRefused       the service answered with an error; `code` says which
    ├── Invalid          the request can't be (400, 405, 406, 415, 422)
    ├── NotAllowed       an API key is missing, or may not do this (401, 403)
    ├── NotFound         no such collection, item, model or route (404)
    ├── TimedOut         the body or the answer took too long (408, 504)
    ├── Conflict         what is there is of another kind: say another model's (409)
    ├── TooLarge         above a limit; `members` has `limit` and `actual` (413)
    ├── Busy             no room now, and patience had an end; `retry_after_s` (429, 503)
    └── ServiceFailed    a fault of the service, or of its disk (500 and the like)
"""

from collections.abc import Mapping
from typing import Any, Final

_NO_MEMBERS: Final[Mapping[str, Any]] = {}


class ClientError(Exception):
    """The service could not be asked, or refused."""


class NoService(ClientError):
    """Nobody answers at the address, or somebody who is not a dinoserve."""


class ServiceRefused(ClientError):
    """The service answered with an error.

    Attributes:
        status: Of HTTP.
        code: Stable and machine-readable.
        detail: A sentence for people.
        request_id: Under which the service's log has it; empty where it said none.
        retry_after_s: When the service wants to be asked again, or None.
        members: All that the problem says, by its names: `limit`, `actual`, `parameter`, …
    """

    def __init__(
        self,
        *,
        status: int,
        code: str,
        detail: str,
        request_id: str = "",
        retry_after_s: float | None = None,
        members: Mapping[str, Any] = _NO_MEMBERS,
    ) -> None:
        super().__init__(f"the service refused ({status} {code}): {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.members = dict(members)


class Invalid(ServiceRefused):
    """The request can't be: its body, a parameter, or an image that all of it depends on."""


class NotAllowed(ServiceRefused):
    """An API key is missing, or may not do this."""


class NotFound(ServiceRefused):
    """There is no such collection, item, model or route."""


class TimedOut(ServiceRefused):
    """The body did not arrive in time, or the answer was not there in time."""


class Conflict(ServiceRefused):
    """What is there is of another kind: a collection of another model, a name that is taken."""


class TooLarge(ServiceRefused):
    """The request is above a limit; sending it again can't help."""


class Busy(ServiceRefused):
    """The service has no room now, or isn't ready, and the client's patience had an end."""


class ServiceFailed(ServiceRefused):
    """A fault of the service, or of what keeps its data."""


_KINDS: Final[dict[int, type[ServiceRefused]]] = {
    400: Invalid,
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    405: Invalid,
    406: Invalid,
    408: TimedOut,
    409: Conflict,
    413: TooLarge,
    415: Invalid,
    422: Invalid,
    429: Busy,
    503: Busy,
    504: TimedOut,
}


def refusal(status: int, problem: Mapping[str, Any], *, retry_after_s: float | None) -> ServiceRefused:
    """The error of an answer.

    Args:
        status: Of HTTP.
        problem: The answer's JSON (RFC 9457), with our `code`.
        retry_after_s: As the answer's headers say.
    """
    kind = _KINDS.get(status, ServiceFailed if status >= 500 else ServiceRefused)
    return kind(
        status=status,
        code=str(problem["code"]),
        detail=str(problem.get("detail", "")),
        request_id=str(problem.get("request_id", "")),
        retry_after_s=retry_after_s,
        members=problem,
    )
