"""The two ways to wait for an answer: a thread that blocks, and a coroutine; what both do is in `calls`."""

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import httpx

from app.client.calls import Attempts, Call, Patience
from app.client.errors import NoService

DEFAULT_URL: Final = "http://127.0.0.1:8000"
URL_VARIABLE: Final = "DINO_SERVE_URL"
KEY_VARIABLE: Final = "DINO_SERVE_API_KEY"
_CONNECT_S: Final = 5.0
_CONNECTIONS: Final = 64
_LONGEST_DEADLINE_S: Final = 600.0  # that the service takes

Answer = TypeVar("Answer")
Priority = Literal["interactive", "bulk"]


@dataclass(frozen=True, kw_only=True)
class Connecting:
    """How a client speaks with its service.

    Attributes:
        base_url: None for the variable DINO_SERVE_URL, and without that http://127.0.0.1:8000.
        api_key: None for the variable DINO_SERVE_API_KEY, if it is there.
        timeout_s: For one answer.
        patience: With a service that is busy or away.
        priority: Of what embeds; None leaves it to the service.
        model: Which of a service's models; None leaves it to the service.
    """

    base_url: str | None
    api_key: str | None = field(repr=False)
    timeout_s: float
    patience: Patience
    priority: Priority | None
    model: str | None

    @property
    def url(self) -> str:
        """The address in use."""
        url = self.base_url if self.base_url is not None else os.environ.get(URL_VARIABLE, DEFAULT_URL)
        return url.rstrip("/")

    def http_arguments(self) -> dict[str, Any]:
        """For httpx's clients."""
        api_key = self.api_key or os.environ.get(KEY_VARIABLE)
        return {
            "base_url": self.url,
            "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            "timeout": httpx.Timeout(self.timeout_s, connect=_CONNECT_S),
            "limits": httpx.Limits(max_connections=_CONNECTIONS),
        }

    def request_of(self, call: Call[Answer]) -> Mapping[str, Any]:
        """The arguments of a call, with the client's own where it embeds."""
        if not call.embeds:
            return call.request
        # The deadline is told to the service, whose own is for people who wait: a large request may take
        # longer. The others only where they were given: an older service knows no such parameters.
        own: dict[str, Any] = {"timeout": min(self.timeout_s, _LONGEST_DEADLINE_S)}
        own |= {} if self.priority is None else {"priority": self.priority}
        own |= {} if self.model is None else {"model": self.model}
        return {**call.request, "params": {**own, **call.request.get("params", {})}}


class BlockingTransport:
    """Asks and waits. Safe to use from many threads.

    Raises:
        NoService: The address is none.
    """

    def __init__(self, connecting: Connecting) -> None:
        self.connecting = connecting
        try:
            self.http = httpx.Client(**connecting.http_arguments())
        except (httpx.InvalidURL, ValueError) as error:
            raise _no_address(connecting, error) from None

    def do(self, call: Call[Answer]) -> Answer:
        """The result of a call, asked for again for as long as it makes sense."""
        attempts = Attempts(call, self.connecting.patience, self.connecting.url)
        request = self.connecting.request_of(call)
        while True:
            try:
                response = self.http.request(call.method, call.path, **request)
            except httpx.TransportError as error:
                time.sleep(attempts.pause_after_break(error))
                continue
            if (pause_s := attempts.pause_after_answer(response)) is None:
                return call.read(response)
            time.sleep(pause_s)


class AsyncTransport:
    """Asks and awaits. Belongs to one event loop.

    Raises:
        NoService: The address is none.
    """

    def __init__(self, connecting: Connecting) -> None:
        self.connecting = connecting
        try:
            self.http = httpx.AsyncClient(**connecting.http_arguments())
        except (httpx.InvalidURL, ValueError) as error:
            raise _no_address(connecting, error) from None

    async def do(self, call: Call[Answer]) -> Answer:
        """As `BlockingTransport.do`."""
        attempts = Attempts(call, self.connecting.patience, self.connecting.url)
        request = self.connecting.request_of(call)
        while True:
            try:
                response = await self.http.request(call.method, call.path, **request)
            except httpx.TransportError as error:
                await asyncio.sleep(attempts.pause_after_break(error))
                continue
            if (pause_s := attempts.pause_after_answer(response)) is None:
                return call.read(response)
            await asyncio.sleep(pause_s)


def _no_address(connecting: Connecting, error: Exception) -> NoService:
    return NoService(f"{connecting.base_url or connecting.url!r} is no address of a service: {error}")
