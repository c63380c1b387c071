"""One question to the service, whoever sends it: what to send, how to read the answer, when to ask again.

Nothing here waits or connects: `app.client.transport` does, once for code that blocks and once for asyncio.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, Literal, TypeVar

import httpx

from app.client.errors import NoService, refusal

Answer = TypeVar("Answer")
Method = Literal["GET", "POST", "PUT", "DELETE"]

_BUSY: Final = (429, 503)
_NO_CONTENT: Final = 204
_TRIES_WITHOUT_ANSWER: Final = 4
_FIRST_PAUSE_S: Final = 0.25  # doubles: 0.25, 0.5, 1 s
_LONGEST_PAUSE_S: Final = 2.0
# Added to each pause, at most: many clients that were refused together must not come back together.
_JITTER: Final = 0.25


@dataclass(frozen=True, kw_only=True)
class Call(Generic[Answer]):
    """A question.

    Attributes:
        method: Of HTTP.
        path: Below the base address.
        read: Makes the result of an answer, or raises what the answer means.
        request: Further arguments, as httpx takes them.
        embeds: Whether the client's deadline, priority and model go with it.
        repeatable: Whether sending it twice does what sending it once does. If not, it is asked again only
            where the service can't have seen it, or said that it did nothing.
        retry: Whether it may be asked again at all.
    """

    method: Method
    path: str
    read: Callable[[httpx.Response], Answer]
    request: Mapping[str, Any] = field(default_factory=dict)
    embeds: bool = False
    repeatable: bool = True
    retry: bool = True


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a service is asked again.

    Attributes:
        busy_s: In all, while it says that it is busy.
        absence_s: While nobody answers, beyond some tries.
    """

    busy_s: float
    absence_s: float


class Attempts:
    """Decides after each attempt of one call whether there is another, and when.

    Args:
        call: Which.
        patience: Of its client.
        base_url: For what it says.
    """

    def __init__(self, call: "Call[Any]", patience: Patience, base_url: str) -> None:
        self._call = call
        self._patience = patience
        self._base_url = base_url
        self._began_s = time.monotonic()
        self._give_up_s = self._began_s + patience.busy_s
        self._tries_left = _TRIES_WITHOUT_ANSWER if call.retry else 1
        self._pause_s = _FIRST_PAUSE_S

    def pause_after_break(self, error: httpx.TransportError) -> float:
        """How long to wait before the next attempt, after one without an answer.

        Raises:
            NoService: There is no next attempt.
        """
        if isinstance(error, httpx.UnsupportedProtocol):
            raise NoService(f"{self._base_url!r} is no address of a service: {error}") from None
        self._tries_left -= 1
        unseen = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        may_repeat = self._call.retry and (unseen or self._call.repeatable)
        is_overdue = time.monotonic() - self._began_s >= self._patience.absence_s
        if not may_repeat or (self._tries_left <= 0 and is_overdue):
            reason = str(error) or type(error).__name__
            raise NoService(f"no service answers at {self._base_url} ({reason})") from None
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return _spread(pause_s)

    def pause_after_answer(self, response: httpx.Response) -> float | None:
        """How long to wait before asking again; None where the answer is the last."""
        asked_s = retry_after_s(response) if response.status_code in _BUSY and self._call.retry else None
        if asked_s is None:
            return None
        pause_s = _spread(asked_s)
        if time.monotonic() + pause_s > self._give_up_s:
            return None
        self._began_s = time.monotonic() + pause_s  # it is there
        return pause_s


def retry_after_s(response: httpx.Response) -> float | None:
    """When an answer wants the client back, in seconds; None where it doesn't say."""
    try:
        if (milliseconds := response.headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1_000)
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def json_of(response: httpx.Response) -> Any:  # noqa: ANN401 - JSON
    """An answer's JSON object; None where it has no content.

    Raises:
        ServiceRefused: It is an error; of the subclass that its status has.
        NoService: It is not ours.
    """
    if response.status_code == _NO_CONTENT:
        return None
    try:
        content = response.json()
    except ValueError:
        content = None
    if response.is_success and isinstance(content, dict):
        return content
    raise _error_of(response, content)


def content_of(response: httpx.Response) -> bytes:
    """An answer's bytes, where it is no JSON.

    Raises:
        ServiceRefused: As `json_of`, and so NoService.
    """
    if not response.is_success:
        json_of(response)
    return response.content


def not_ours(response: httpx.Response, found: str) -> NoService:
    """The error where an answer can't be ours."""
    url = response.request.url
    return NoService(f"what answers at {url.scheme}://{url.netloc.decode()} is not a dinoserve ({found})")


def _error_of(response: httpx.Response, content: object) -> Exception:
    if isinstance(content, dict) and "code" in content:
        return refusal(response.status_code, content, retry_after_s=retry_after_s(response))
    return not_ours(response, f"status {response.status_code}, not our JSON")


def _spread(pause_s: float) -> float:
    return pause_s * random.uniform(1, 1 + _JITTER)
