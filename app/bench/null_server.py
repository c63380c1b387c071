"""A service that does nothing: it answers each request as `/embed` would. Measures the generator itself.

`python -m app.bench.null_server` prints its port and serves until its standard input ends.
"""

import asyncio
import re
import sys
from typing import Final, cast

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD_END: Final = b"\r\n\r\n"
_ANSWER_BYTES: Final = 2_400  # of one image with 384 dimensions in base64


class NullService(asyncio.Protocol):
    """One connection, whose requests may come in any pieces, one after the other."""

    def __init__(self) -> None:
        body = b'{"data":"' + b"A" * _ANSWER_BYTES + b'"}'
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._answer = head.encode() + body
        self._head = bytearray()
        self._missing_bytes = 0  # of the body that is being read
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's don't inherit from it

    def data_received(self, data: bytes) -> None:
        """Called by the loop."""
        if self._missing_bytes == 0:
            self._head += data
            end = self._head.find(_HEAD_END)
            if end < 0:
                return
            length = _LENGTH.search(self._head)
            self._missing_bytes = end + len(_HEAD_END) + int(length.group(1) if length else 0)
            data = bytes(self._head)
            self._head.clear()
        self._missing_bytes -= len(data)
        if self._missing_bytes == 0 and self._transport is not None:
            self._transport.write(self._answer)


async def serve() -> None:
    """Serves until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(NullService, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve())
