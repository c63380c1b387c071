"""HTTP/1.1 as a load generator needs it: one request at a time on a connection, bytes made beforehand.

A general client costs a few tenths of a millisecond a request, of a core that the service under test may
need. This one writes prepared bytes, and reads of an answer its status and its length.
"""

import asyncio
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast
from urllib.parse import urlsplit

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] (\d{3})")
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSES: Final = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_HEAD_END: Final = b"\r\n\r\n"
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
_MAX_HEAD_BYTES: Final = 64 * 1024
_CONNECT_S: Final = 10.0


class NotHttp(Exception):
    """The other side's bytes are no answer that we can read."""


@dataclass(frozen=True)
class Endpoint:
    """Where a service listens."""

    host: str
    port: int
    tls: bool = False

    @classmethod
    def of(cls, url: str) -> "Endpoint":
        """Of a base URL.

        Raises:
            ValueError: It is none; a path is none either.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"{url!r} is no address of a service; it is like http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls)

    @property
    def host_header(self) -> str:
        """As requests carry it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Connection(asyncio.Protocol):
    """One connection, kept open; `connect` makes it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[int] | None = None
        self._received = bytearray()
        self._total_bytes: int | None = None  # of the answer, head included
        self._chunked = False
        self._closing = False

    @property
    def usable(self) -> bool:
        """Whether it takes another request."""
        return self._transport is not None and not self._closing and not self._transport.is_closing()

    def ask(self, segments: Sequence[bytes]) -> "asyncio.Future[int]":
        """Writes a whole request.

        Args:
            segments: Its bytes, in pieces.

        Returns:
            A future of the answer's status, done when its last byte is here. It fails with ConnectionError
            where the connection breaks, and with NotHttp.
        """
        assert self._transport is not None, "asked before the connection was made: this is a bug"
        assert self._answered is None, "a connection was given two requests at once: this is a bug"
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.writelines(segments)
        return self._answered

    def close(self) -> None:
        """Closes it at once; a request that is under way fails."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's don't inherit from it

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        received = self._received
        received += data
        if self._total_bytes is None and not self._chunked and not self._read_head():
            return
        if self._chunked:
            # Only the end counts. Answers of embeddings have a length; errors of proxies may come like this.
            if not received.endswith(_LAST_CHUNK):
                return
        elif len(received) < (self._total_bytes or 0):
            return
        status = int(received[9:12])
        received.clear()
        self._total_bytes, self._chunked = None, False
        if self._closing:
            self.close()
        self._end(status)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the loop."""
        self._closing = True
        self._end(ConnectionResetError("the connection broke before the answer was whole"))

    def _read_head(self) -> bool:
        end = self._received.find(_HEAD_END)
        if end < 0:
            if len(self._received) > _MAX_HEAD_BYTES:
                self._give_up("an endless head")
            return False
        head = bytes(self._received[:end])
        if not _STATUS_LINE.match(head):
            self._give_up("no status line")
            return False
        self._closing = _CLOSES.search(head) is not None
        self._chunked = _CHUNKED.search(head) is not None
        length = _LENGTH.search(head)
        if length is None and not self._chunked:
            self._give_up("an answer of unknown length")
            return False
        self._total_bytes = end + len(_HEAD_END) + int(length.group(1)) if length else None
        return True

    def _give_up(self, found: str) -> None:
        self._end(NotHttp(f"what answers sent {found}: is it a dinoserve?"))
        self.close()

    def _end(self, outcome: int | Exception) -> None:
        answered, self._answered = self._answered, None
        if answered is None or answered.done():
            return
        if isinstance(outcome, Exception):
            answered.set_exception(outcome)
        else:
            answered.set_result(outcome)


async def connect(endpoint: Endpoint) -> Connection:
    """Opens a connection.

    Raises:
        OSError: Nobody listens, or takes too long to answer.
    """
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context() if endpoint.tls else None
    async with asyncio.timeout(_CONNECT_S):
        _, connection = await loop.create_connection(Connection, endpoint.host, endpoint.port, ssl=context)
    return connection
