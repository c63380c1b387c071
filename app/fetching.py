"""Pictures by URL, fetched so that no address leads to what only this machine or its network can see.

    url ─► scheme, host, port ─► resolved once ─► all its addresses public? ─► connection to one of these
     ▲                                                                              │
     └───────── redirect, at most three, looked at as if it were sent ◄─── status ◄─┘

The connection goes to the address that was looked at, never to the name again, so that a name that is
resolved differently a moment later (DNS rebinding) is of no use. No proxy, cookie or credential of this
process is ever sent. What comes is bytes of unknown kind, whatever its server says of it: a picture's header
and limits are checked later, as those of every file.
"""

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

import httpcore

from app.errors import DeadlineExceeded, Overloaded, TooLarge
from app.inference.results import ImageFailure

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve: TypeAlias = Callable[[str, int], Awaitable[list[Address]]]

_MAX_URL_CHARACTERS: Final = 2048
_MAX_REDIRECTS: Final = 3
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_PORTS: Final = (80, 443)
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_ADDRESSES_TRIED: Final = 2
_TIMEOUT_S: Final = 10.0  # for one picture, all its redirects with it
_AT_ONCE: Final = 16
_MOST_WAITING: Final = 1024
_RETRY_AFTER_S: Final = 1.0
# What may stand in a URL (RFC 3986). A backslash is what parsers disagree about (CVE-2026-24779).
_URL: Final = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?\.?|\[[0-9A-Fa-f:.]+\]")

# Beside what `is_global` knows: relays to other networks, and a cloud's own address that looks public.
_SPECIAL_IPV4: Final = [
    ipaddress.IPv4Network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")
]
# Of IPv6 only what is given to networks, without what carries an IPv4 address in it (6to4, Teredo).
_GIVEN_IPV6: Final = ipaddress.IPv6Network("2000::/3")
_SPECIAL_IPV6: Final = [
    ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]


@dataclass(frozen=True)
class ImageAddress:
    """A picture that a request named and did not send.

    Attributes:
        url: As it was sent.
        pointer: Where, as a JSON pointer.
    """

    url: str
    pointer: str


URL_NOT_TAKEN: Final = ImageFailure(
    "url_refused", "Images by URL are not taken by this service: send the image's bytes."
)


class _Refused(Exception):
    """The URL leads where we don't go; the message is for the caller."""


class _Failed(Exception):
    """The URL's server gave no picture; the message is for the caller."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's, and reaches nothing else in disguise."""
    if isinstance(address, ipaddress.IPv6Address):
        # Mapped IPv4, NAT64 and the like are outside of it.
        return address in _GIVEN_IPV6 and not any(address in network for network in _SPECIAL_IPV6)
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in _SPECIAL_IPV4)
    )


async def resolve(host: str, port: int) -> list[Address]:
    """All addresses of a name, as the system knows them.

    Raises:
        OSError: It has none.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:  # a label that is empty or too long
        raise OSError("that is no name of a host") from None
    texts = dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in found)
    return [ipaddress.ip_address(text) for text in texts]


class Fetcher:
    """Fetches pictures for requests, so many at once for all of them.

    Args:
        max_image_bytes: Of one picture.
        max_request_bytes: Of all pictures of a request.
        max_wait_s: For all pictures of a request.
        hosts: Only these, if there are any: `images.example.org`, or `images.example.org:8443` for a port
            beside 80 and 443.
        timeout_s: For one picture.
        resolve: A name to its addresses.
        allows: Whether a connection to an address may be made. Another one than the default is for tests.
    """

    def __init__(
        self,
        *,
        max_image_bytes: int,
        max_request_bytes: int,
        max_wait_s: float,
        hosts: Iterable[str] = (),
        timeout_s: float = _TIMEOUT_S,
        resolve: Resolve = resolve,
        allows: Callable[[Address], bool] = is_public,
    ) -> None:
        self._max_image_bytes = max_image_bytes
        self._max_request_bytes = max_request_bytes
        self._max_wait_s = max_wait_s
        self._timeout_s = timeout_s
        self._allows = allows
        self._hosts = frozenset(host.lower() for host in hosts)
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=_AT_ONCE,
            max_keepalive_connections=0,  # a connection is of one address, looked at for one request
            network_backend=_CheckedConnections(resolve, allows),
        )

    async def close(self) -> None:
        """Closes what is open."""
        await self._pool.aclose()

    async def fetch_all(self, addresses: Sequence[ImageAddress]) -> list[bytes | ImageFailure]:
        """Fetches the pictures of one request.

        Returns:
            For each address, in their order, a file or why there is none.

        Raises:
            Overloaded: Too many pictures of other requests wait.
            TooLarge: Together they have more bytes than a request may.
            DeadlineExceeded: They took too long.
        """
        if self._waiting and self._waiting + len(addresses) > _MOST_WAITING:
            raise Overloaded(
                f"{self._waiting} images are being fetched for other requests: try again soon",
                retry_after_s=_RETRY_AFTER_S,
                reason="fetches",
            )
        budget = _Budget(self._max_request_bytes)
        self._waiting += len(addresses)
        try:
            async with asyncio.timeout(self._max_wait_s), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._fetch(one.url, budget)) for one in addresses]
        except TimeoutError:
            raise DeadlineExceeded(
                f"the images' servers had not sent them all after {self._max_wait_s:g} s: name fewer at once"
            ) from None
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first; the others were cancelled
        finally:
            self._waiting -= len(addresses)
        return [task.result() for task in tasks]

    async def _fetch(self, url: str, budget: "_Budget") -> bytes | ImageFailure:
        async with self._slots:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._follow(url, budget)
            except TimeoutError:
                return _failure(f"Its server did not send it within {self._timeout_s:g} s.")
            except _Refused as refused:
                return ImageFailure("url_refused", f"The URL is not fetched: {refused}.")
            except _Failed as failed:
                return _failure(str(failed))
            except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError):
                # No word of the library's: it may tell of this machine's network.
                return _failure("Its server could not be reached, or broke off.")

    async def _follow(self, url: str, budget: "_Budget") -> bytes | ImageFailure:
        for _ in range(_MAX_REDIRECTS + 1):
            parts = self._checked(url)
            async with self._pool.stream(
                "GET", _target(parts), headers=_headers(parts), extensions={"timeout": self._timeouts()}
            ) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response, budget)
                url = urljoin(url, _header(response, b"location") or "")
        raise _Failed(f"It redirects more than {_MAX_REDIRECTS} times.")

    def _checked(self, url: str) -> SplitResult:
        """The parts of a URL that may be fetched; where its host leads is looked at when it is connected."""
        if len(url) > _MAX_URL_CHARACTERS:
            raise _Refused(f"it has {len(url):,} characters, at most {_MAX_URL_CHARACTERS:,} are taken")
        if not _URL.fullmatch(url):
            raise _Refused("it has a character that no URL has: percent-encode it")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _Refused("it is malformed") from None
        if parts.scheme not in _DEFAULT_PORTS:
            raise _Refused("it must begin with https:// or http://")
        if "@" in parts.netloc:
            raise _Refused("it has a user name or a password in it")
        host = parts.netloc.rpartition(":")[0] if port is not None else parts.netloc
        if not _HOST.fullmatch(host.rstrip(":")):
            raise _Refused("its host is malformed")
        self._check_place(host.lower(), port or _DEFAULT_PORTS[parts.scheme])
        return parts

    def _check_place(self, host: str, port: int) -> None:
        if f"{host}:{port}" in self._hosts:
            return
        if port not in _PORTS:
            raise _Refused(f"its port is {port}, and only {_PORTS[0]} and {_PORTS[1]} are taken")
        if self._hosts and host not in self._hosts:
            raise _Refused("its host is not one that this service fetches from")

    def _timeouts(self) -> dict[str, float]:
        return dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_s)

    async def _read(self, response: httpcore.Response, budget: "_Budget") -> bytes | ImageFailure:
        if response.status != 200:
            raise _Failed(f"Its server answered {response.status}.")
        if (coding := _header(response, b"content-encoding")) not in {None, "", "identity"}:
            # We asked for none. A megabyte of gzip may be a gigabyte.
            raise _Failed(f"Its server sent it compressed ({(coding or '')[:20]!r}), unasked.")
        declared = _header(response, b"content-length") or "0"
        if declared.isdecimal() and int(declared) > self._max_image_bytes:
            return self._too_large(int(declared))
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.aiter_stream():
            size += len(chunk)
            if size > self._max_image_bytes:
                return self._too_large(size)
            budget.spend(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)

    def _too_large(self, actual: int) -> ImageFailure:
        limit = self._max_image_bytes
        return ImageFailure(
            "image_too_large",
            f"The image has {actual:,} bytes or more, at most {limit:,} are accepted.",
            limit=limit,
            actual=actual,
        )


class _Budget:
    """Bytes that a request may still fetch."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._spent = 0

    def spend(self, size_bytes: int) -> None:
        self._spent += size_bytes
        if self._spent > self._limit:
            raise TooLarge(
                f"the images at the request's URLs have more than {self._limit:,} bytes together, which is "
                "what a request may have: name fewer at once",
                limit=self._limit,
                actual=self._spent,
            )


class _CheckedConnections(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were looked at, never to names."""

    def __init__(self, resolve: Resolve, allows: Callable[[Address], bool]) -> None:
        self._resolve = resolve
        self._allows = allows
        self._connections = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connects to the host's address, if all that it has may be connected to."""
        addresses = await self._resolve(host.strip("[]"), port)
        if not addresses or not all(self._allows(address) for address in addresses):
            raise _Refused("its host is not on the public internet")
        *first, last = addresses[:_ADDRESSES_TRIED]
        for address in first:
            with contextlib.suppress(httpcore.NetworkError, httpcore.ConnectTimeout):
                return await self._connections.connect_tcp(str(address), port, timeout)
        return await self._connections.connect_tcp(str(last), port, timeout)

    async def sleep(self, seconds: float) -> None:
        """Sleeps."""
        await self._connections.sleep(seconds)


def _failure(reason: str) -> ImageFailure:
    return ImageFailure("url_not_fetched", f"The image at the URL could not be fetched. {reason}")


def _target(parts: SplitResult) -> httpcore.URL:
    """From the parts that were checked: were the text parsed again, it could be read differently."""
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return httpcore.URL(scheme=parts.scheme, host=parts.hostname or "", port=parts.port, target=path)


def _headers(parts: SplitResult) -> dict[bytes | str, bytes | str]:
    return {
        "Host": parts.netloc,
        "User-Agent": "dinoserve",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def _header(response: httpcore.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key.lower() == name:
            return value.decode("latin-1").strip().lower() if name != b"location" else value.decode("latin-1")
    return None
