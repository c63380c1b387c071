"""A connection of uvicorn's whose requests' heads are bounded in time and size, which uvicorn's own aren't.

A caller who sends a head byte by byte would hold a connection for ever, one who sends headers without end all
memory. Bodies have bounds of their own, in `app.api`.
"""

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class BoundedHeads(HttpToolsProtocol):
    """Closes itself where a head takes too long or becomes too large.

    Attributes:
        head_timeout_s: From the connection, or the first byte of a later head, to the head's end.
        head_max_bytes: Of a head; the first piece of the body, which may come with it, counts too.
    """

    head_timeout_s: ClassVar[float] = 30.0
    head_max_bytes: ClassVar[int] = 64 * 2**10

    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    # An answer may be complete while the body that it refuses still arrives: the parser alone knows.
    _in_message = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begins to wait for a head."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes a piece of a head or a body."""
        if not self._in_message:
            if self._timer is None:
                self._wait()
            self._head_bytes += len(data)
        super().data_received(data)
        if self._timer is not None and self._head_bytes > self.head_max_bytes:
            self.transport.write(_TOO_LARGE)
            self._close()

    def on_headers_complete(self) -> None:
        """The head is here."""
        self._stop()
        self._in_message = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is here, too."""
        self._in_message = False
        super().on_message_complete()

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.head_timeout_s, self._close)

    def _stop(self) -> None:
        self._head_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._stop()
        if not self.transport.is_closing():
            self.transport.close()
