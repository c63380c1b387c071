"""Pictures by URL, against real servers on this machine that do what a hostile one would."""

import asyncio
import contextlib
import gzip
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.errors import DeadlineExceeded, Overloaded, TooLarge
from app.fetching import Address, Fetcher, ImageAddress, is_public
from app.inference.results import ImageFailure

BODY = b"not really a picture"
LOOPBACK = ipaddress.ip_address("127.0.0.1")
Serve = Callable[[socket.socket], None]


class Site:
    """A server that hands each connection, once its head was read, to a function."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.serve: Serve = answering(BODY)
        self.ends = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self.ends.set()
        # Wakes `accept` up, which closing alone doesn't.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self.ends.is_set():
            connection, _ = self._listener.accept()
            thread = threading.Thread(target=self._answer, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := connection.recv(65536)):
                    return
                head += piece
            self.heads.append(head)
            self.serve(connection)


def answering(body: bytes, *, status: str = "200 OK", **headers: str) -> Serve:
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {text}" for name, text in headers.items())]
    if "Content_Length" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return lambda connection: connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def redirecting(target: str, *, status: str = "302 Found") -> Serve:
    return answering(b"", status=status, Location=target)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.close()


def fetch(url: str, **options: Any) -> bytes | ImageFailure:  # noqa: ANN401
    return fetch_all([url], **options)[0]


def fetch_all(urls: list[str], **options: Any) -> list[bytes | ImageFailure]:  # noqa: ANN401
    bounds = {"max_image_bytes": 1000, "max_request_bytes": 10_000, "max_wait_s": 30.0}

    async def run() -> list[bytes | ImageFailure]:
        async with contextlib.aclosing(_Closing(Fetcher(**(bounds | options)))) as closing:
            return await closing.fetcher.fetch_all([ImageAddress(url, "/images/0") for url in urls])

    return asyncio.run(run())


class _Closing:
    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher = fetcher

    async def aclose(self) -> None:
        await self.fetcher.close()


def from_loopback(site: Site, url: str = "", **options: Any) -> bytes | ImageFailure:  # noqa: ANN401
    """Fetches with the one seam that lets tests be on this machine."""
    defaults = {"hosts": [site.place], "allows": lambda address: address == LOOPBACK}
    return fetch(url or f"http://{site.place}/a.jpg", **(defaults | options))


def code(result: bytes | ImageFailure) -> str:
    return result.code if isinstance(result, ImageFailure) else "fetched"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("0.0.0.0", id="this host"),
        pytest.param("0.1.2.3", id="this network"),
        pytest.param("10.1.2.3", id="private"),
        pytest.param("172.16.0.1", id="private 172"),
        pytest.param("192.168.1.1", id="private 192"),
        pytest.param("127.0.0.1", id="loopback"),
        pytest.param("127.255.255.254", id="loopback's end"),
        pytest.param("169.254.169.254", id="metadata"),
        pytest.param("168.63.129.16", id="Azure's wire server"),
        pytest.param("100.100.100.200", id="Alibaba's metadata"),
        pytest.param("192.0.0.192", id="Oracle's metadata"),
        pytest.param("100.64.0.1", id="CGNAT"),
        pytest.param("192.88.99.1", id="6to4 relay"),
        pytest.param("198.18.0.1", id="benchmarks"),
        pytest.param("203.0.113.1", id="documentation"),
        pytest.param("224.0.0.1", id="multicast"),
        pytest.param("240.0.0.1", id="reserved"),
        pytest.param("255.255.255.255", id="broadcast"),
        pytest.param("::", id="unspecified"),
        pytest.param("::1", id="loopback v6"),
        pytest.param("::ffff:127.0.0.1", id="mapped loopback"),
        pytest.param("::ffff:8.8.8.8", id="mapped public"),
        pytest.param("::7f00:1", id="compatible"),
        pytest.param("64:ff9b::a9fe:a9fe", id="NAT64"),
        pytest.param("64:ff9b:1::1", id="local NAT64"),
        pytest.param("2002:a9fe:a9fe::1", id="6to4"),
        pytest.param("2001:0:53aa:64c::1", id="Teredo"),
        pytest.param("2001:db8::1", id="documentation v6"),
        pytest.param("3fff::1", id="documentation v6, new"),
        pytest.param("fc00::1", id="unique local"),
        pytest.param("fd00:ec2::254", id="AWS metadata v6"),
        pytest.param("fe80::1", id="link-local"),
        pytest.param("fec0::1", id="site-local"),
        pytest.param("ff02::1", id="multicast v6"),
        pytest.param("5f00::1", id="segment routing"),
    ],
)
def test_no_address_of_this_machine_or_its_network_is_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "151.101.1.69", "2606:4700::6810:85e5", "2a00::1"])
def test_the_internets_addresses_are_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("ftp://example.org/a.jpg", id="ftp"),
        pytest.param("gopher://example.org/", id="gopher"),
        pytest.param("//example.org/a.jpg", id="no scheme"),
        pytest.param("http:///a.jpg", id="no host"),
        pytest.param("http://user:word@example.org/a.jpg", id="password"),
        pytest.param("http://example.org@127.0.0.1/", id="user"),
        pytest.param("http://example.org\\@127.0.0.1/", id="backslash"),
        pytest.param("http://exa\tmple.org/", id="tab"),
        pytest.param("http://example.org/a b.jpg", id="space"),
        pytest.param("http://example.org/\r\nHost: x", id="header"),
        pytest.param("http://example.org:22/", id="port 22"),
        pytest.param("http://example.org:8080/", id="port 8080"),
        pytest.param("http://example.org:99999/", id="no port"),
        pytest.param("http://[::1/", id="half a bracket"),
        pytest.param("http://exämple.org/", id="not ASCII"),
        pytest.param("http://a%2eexample.org/", id="encoded host"),
        pytest.param("http://-x/", id="malformed host"),
        pytest.param("http://example.org/" + "a" * 2048, id="too long"),
    ],
)
def test_a_url_that_is_not_plain_is_refused_before_anybody_is_asked(url: str) -> None:
    async def never(host: str, port: int) -> list[Address]:
        raise AssertionError(f"{host} was looked up")

    assert code(fetch(url, resolve=never)) == "url_refused"


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_this_machine_is_refused_however_it_is_spelled(host: str) -> None:
    refused = fetch(f"http://{host}/")
    assert isinstance(refused, ImageFailure)
    assert (refused.code, "not on the public internet" in refused.title) == ("url_refused", True)


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".test", "nowhere.invalid"])
def test_a_name_that_leads_nowhere_is_one_pictures_failure(host: str) -> None:
    assert code(fetch(f"http://{host}/")) == "url_not_fetched"


@pytest.mark.parametrize("private_first", [True, False])
def test_a_name_with_one_private_address_is_refused(private_first: bool) -> None:
    both = [ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("8.8.8.8")]

    async def resolve(host: str, port: int) -> list[Address]:
        return list(both if private_first else reversed(both))

    assert code(fetch("http://example.org/", resolve=resolve)) == "url_refused"


def test_a_picture_is_fetched_with_nothing_of_this_process(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    assert from_loopback(site, f"http://{site.place}/a.jpg?size=1#part") == BODY
    (head,) = site.heads
    lines = head.decode().strip().split("\r\n")
    assert lines[0] == "GET /a.jpg?size=1 HTTP/1.1"
    assert sorted(line.split(":")[0].lower() for line in lines[1:]) == [
        "accept",
        "accept-encoding",
        "connection",
        "host",
        "user-agent",
    ]
    assert "Accept-Encoding: identity" in lines


def test_a_name_is_resolved_once_and_the_connection_goes_there(site: Site) -> None:
    # DNS rebinding: the second answer would be an address that is not allowed.
    answers = iter(["127.0.0.1", "127.0.0.2"])

    async def resolve(host: str, port: int) -> list[Address]:
        assert host == "images.test"
        return [ipaddress.ip_address(next(answers))]

    url = f"http://images.test:{site.port}/"
    assert from_loopback(site, url, hosts=[f"images.test:{site.port}"], resolve=resolve) == BODY
    assert f"Host: images.test:{site.port}".encode() in site.heads[0]
    assert next(answers) == "127.0.0.2"


@pytest.mark.parametrize(
    ("found", "ends"),
    [
        pytest.param(["127.0.0.1"], "fetched", id="here"),
        pytest.param(["127.0.0.2", "127.0.0.1"], "fetched", id="the second"),
        pytest.param(["127.0.0.2", "127.0.0.3"], "url_not_fetched", id="elsewhere"),
    ],
)
def test_only_the_addresses_that_were_found_are_asked_and_never_the_name(
    site: Site, found: list[str], ends: str
) -> None:
    async def resolve(host: str, port: int) -> list[Address]:
        return [ipaddress.ip_address(text) for text in found]

    place = f"localhost:{site.port}"  # a name that would lead to the site
    result = from_loopback(
        site,
        f"http://{place}/",
        hosts=[place],
        resolve=resolve,
        allows=lambda address: address.is_loopback,
    )
    assert code(result) == ends


def test_a_name_that_leads_elsewhere_after_a_redirect_is_looked_at_again(site: Site) -> None:
    answers = iter(["127.0.0.1", "127.0.0.2"])

    async def resolve(host: str, port: int) -> list[Address]:
        return [ipaddress.ip_address(next(answers))]

    place = f"images.test:{site.port}"
    site.serve = redirecting(f"http://{place}/again")
    assert code(from_loopback(site, f"http://{place}/", hosts=[place], resolve=resolve)) == "url_refused"
    assert len(site.heads) == 1


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/",
        "http://localhost/",
        "file:///etc/passwd",
        "http://127.0.0.1:22/",
        "//user@127.0.0.1/",
        "http://evil\\@127.0.0.1/",
    ],
)
def test_a_redirect_is_looked_at_as_if_it_were_sent(site: Site, target: str) -> None:
    site.serve = redirecting(target)
    result = from_loopback(
        site,
        hosts=[site.place, "169.254.169.254", "[fd00:ec2::254]"],
        allows=lambda address: address == LOOPBACK or is_public(address),
    )
    assert code(result) == "url_refused"
    assert len(site.heads) == 1


def test_three_redirects_are_followed_and_no_fourth(site: Site) -> None:
    left = 3

    def serve(connection: socket.socket) -> None:
        nonlocal left
        left -= 1
        (redirecting("/next") if left >= 0 else answering(BODY))(connection)

    site.serve = serve
    assert from_loopback(site) == BODY
    left = 4
    assert code(from_loopback(site)) == "url_not_fetched"
    assert len(site.heads) == 4 + 4


def test_a_host_beside_the_list_is_refused() -> None:
    async def never(host: str, port: int) -> list[Address]:
        raise AssertionError(f"{host} was looked up")

    for url in ("https://evil.example/", "https://images.example.org.evil.example/"):
        assert code(fetch(url, hosts=["images.example.org"], resolve=never)) == "url_refused"


def test_what_is_larger_than_a_picture_may_be_is_not_read_to_its_end(site: Site) -> None:
    site.serve = answering(b"", Content_Length="1001")
    declared = from_loopback(site)
    assert isinstance(declared, ImageFailure)
    assert (declared.code, declared.limit, declared.actual) == ("image_too_large", 1000, 1001)

    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:  # until the fetcher hangs up
            connection.sendall(b"x" * 500)

    site.serve = endless
    assert code(from_loopback(site)) == "image_too_large"


def test_a_slow_server_has_its_time_in_all(site: Site) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
        while not site.ends.wait(0.05):  # each piece comes soon enough, all of them don't
            connection.sendall(b"x")

    site.serve = drip
    assert code(from_loopback(site, timeout_s=0.5)) == "url_not_fetched"
    site.serve = lambda connection: None if site.ends.wait(5) else None  # no answer at all
    assert code(from_loopback(site, timeout_s=0.5)) == "url_not_fetched"


def test_what_comes_compressed_is_never_unpacked(site: Site) -> None:
    bomb = gzip.compress(bytes(10**6))
    assert len(bomb) > 900
    site.serve = answering(bomb[:900], Content_Encoding="gzip")
    result = from_loopback(site)
    assert isinstance(result, ImageFailure)
    assert (result.code, "compressed" in result.title) == ("url_not_fetched", True)


@pytest.mark.parametrize(
    "serve",
    [
        pytest.param(answering(b"", status="404 Not Found"), id="not found"),
        pytest.param(answering(b"", status="304 Not Modified"), id="not modified"),
        pytest.param(answering(b"abc", Content_Length="900"), id="breaks off"),
        pytest.param(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), id="not HTTP"),
        pytest.param(lambda connection: None, id="says nothing"),
        pytest.param(
            lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000),
            id="a head of 300 kB",
        ),
    ],
)
def test_what_is_no_answer_is_one_pictures_failure(site: Site, serve: Serve) -> None:
    site.serve = serve
    assert code(from_loopback(site)) == "url_not_fetched"


def test_pictures_of_one_request_have_its_bytes_together(site: Site) -> None:
    site.serve = answering(b"x" * 900)
    urls = [f"http://{site.place}/{number}" for number in range(4)]
    options: dict[str, Any] = {"hosts": [site.place], "allows": lambda address: address == LOOPBACK}
    assert len(fetch_all(urls, **options)) == 4
    with pytest.raises(TooLarge):
        fetch_all(urls, **options, max_request_bytes=3 * 900)


def test_pictures_of_one_request_have_its_time_together(site: Site) -> None:
    site.serve = lambda connection: None if site.ends.wait(5) else None
    urls = [f"http://{site.place}/{number}" for number in range(4)]
    with pytest.raises(DeadlineExceeded):
        fetch_all(urls, hosts=[site.place], allows=lambda address: address == LOOPBACK, max_wait_s=0.3)


def test_few_are_fetched_at_once_and_more_than_enough_are_refused(site: Site) -> None:
    lock, now, most = threading.Lock(), 0, 0
    go_on = threading.Event()

    def serve(connection: socket.socket) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == 16:
                go_on.set()  # sixteen are here at once
        go_on.wait(20)
        with lock:
            now -= 1
        answering(BODY)(connection)

    site.serve = serve

    async def run() -> None:
        fetcher = Fetcher(
            max_image_bytes=1000,
            max_request_bytes=10**6,
            max_wait_s=30,
            hosts=[site.place],
            allows=lambda address: address == LOOPBACK,
        )
        many = [ImageAddress(f"http://{site.place}/{number}", "") for number in range(40)]
        first = asyncio.create_task(fetcher.fetch_all(many))
        while not site.heads:
            await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await fetcher.fetch_all([many[0]] * 1000)
        assert set(await first) == {BODY}
        await fetcher.close()

    asyncio.run(run())
    assert most == 16
