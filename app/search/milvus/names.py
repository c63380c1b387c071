"""What our things are called on a Milvus server, whose names have letters, digits and underscores.

    {space}_c_{token}_{name}                    an empty collection that stands for one of ours
    {space}_n_{name}, {space}_n_{alias}         aliases of it: what users call it
    {space}_d_{token}_{time}_{D}_{fingerprint}  a collection with the items of one generation
    {space}_g_{token}                           alias of the generation that is searched
    {space}_s_{token}                           alias of the generation that is being built

A name leads to what stands for the collection, and its token to the generation. So one move of one alias,
which a server does at once for all its clients, lets the name and all aliases lead to another generation. The
names say all that must be known, and nothing is kept beside them. What has other names is somebody else's.
"""

import re
import secrets
import time
from dataclasses import dataclass

from app.errors import InvalidCollection

MAX_SERVER_NAME = 255
_SPACE = re.compile("[A-Za-z][A-Za-z0-9]{0,19}")
_TOKEN = "[0-9a-f]{20}"
_TIME_DIGITS = 14  # microseconds since 1970 in hex, until the year 4253
_ESCAPED = re.compile("[^A-Za-z0-9]")


@dataclass(frozen=True)
class Stand:
    """What stands for a collection: its own name and its token."""

    token: str
    name: str


@dataclass(frozen=True)
class Generation:
    """The items of a collection by one model; `created_at` is in seconds since 1970."""

    server_name: str
    created_at: float
    dimensions: int
    fingerprint: str


class Names:
    """The names in one space of a server; services in two spaces don't see each other's collections."""

    def __init__(self, space: str) -> None:
        """Takes a space: at most 20 letters and digits, beginning with a letter."""
        if not _SPACE.fullmatch(space):
            raise ValueError(
                f"a space is 1 to 20 letters and digits, beginning with a letter; found {space!r}"
            )
        self._space = space
        self._stand = re.compile(f"{space}_c_({_TOKEN})_([A-Za-z0-9_]+)")
        self._generation = re.compile(f"{space}_d_{_TOKEN}_({_TOKEN})_([0-9]+)_([A-Za-z0-9_]+)")

    def stand(self, stand: Stand) -> str:
        """Of the collection that stands for one of ours."""
        return f"{self._space}_c_{stand.token}_{_escape(stand.name)}"

    def to_stand(self, server_name: str) -> Stand | None:
        """What `stand` made, read again; None for any other name."""
        found = self._stand.fullmatch(server_name)
        return Stand(found[1], _unescape(found[2])) if found else None

    def new_generation(self, token: str, *, dimensions: int, fingerprint: str) -> Generation:
        """A name that no generation had before.

        Raises:
            InvalidCollection: The fingerprint doesn't fit into a name.
        """
        made = new_token()
        name = f"{self._space}_d_{token}_{made}_{dimensions}_{_escape(fingerprint)}"
        if len(name) > MAX_SERVER_NAME:
            raise InvalidCollection(
                f"the fingerprint has {len(fingerprint)} characters, more than a Milvus name can hold"
            )
        return Generation(name, _created_at(made), dimensions, fingerprint)

    def to_generation(self, server_name: str) -> Generation | None:
        """What `new_generation` made, read again; None for any other name."""
        found = self._generation.fullmatch(server_name)
        if found is None:
            return None
        return Generation(server_name, _created_at(found[1]), int(found[2]), _unescape(found[3]))

    def name(self, name: str) -> str:
        """The alias that is a user's name or alias."""
        return f"{self._space}_n_{_escape(name)}"

    def to_name(self, alias: str) -> str:
        """What `name` made, read again."""
        return _unescape(alias.removeprefix(f"{self._space}_n_"))

    def current(self, token: str) -> str:
        """The alias of the generation that is searched."""
        return f"{self._space}_g_{token}"

    def successor(self, token: str) -> str:
        """The alias of the generation that is being built."""
        return f"{self._space}_s_{token}"


def new_token() -> str:
    """20 hex digits, in order of time, that no other process has."""
    return f"{time.time_ns() // 1000:0{_TIME_DIGITS}x}{secrets.token_hex(3)}"


def _created_at(token: str) -> float:
    return int(token[:_TIME_DIGITS], 16) / 1e6


def _escape(text: str) -> str:
    return _ESCAPED.sub(lambda found: "".join(f"_{byte:02x}" for byte in found[0].encode()), text)


def _unescape(name: str) -> str:
    plain = re.sub("_([0-9a-f]{2})|(.)", lambda found: found[1] or f"{ord(found[2]):02x}", name)
    return bytes.fromhex(plain).decode()
