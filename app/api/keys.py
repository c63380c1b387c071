"""API keys and what each may do: read from a file, looked at again when the file has changed.

# one key a line: the key, or its SHA-256, then what it may do
3f9c0d5e8a7b4c21d6e0f1a2 embed search
sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 embed search write admin
a-key-without-scopes-may-embed-search-and-write
"""

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from app.settings import SettingsInvalid

KeyScope = Literal["embed", "search", "write", "admin"]

ALL_SCOPES: Final = frozenset(get_args(KeyScope))
# Without scopes, a key may do what keys could do before there were any: nothing that reaches the process.
USUAL_SCOPES: Final[frozenset[KeyScope]] = frozenset(("embed", "search", "write"))
_KEY_MIN_CHARACTERS: Final = 16
_HASHED: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")
_LOOK_S: Final = 1.0  # how old what we know of the file may be

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ApiKey:
    """A key and what it may do.

    Attributes:
        sha256: Of the key.
        scopes: What it may do.
        text: The key itself; None where the file has only its hash.
    """

    sha256: bytes
    scopes: frozenset[KeyScope]
    text: str | None = field(repr=False)


def hash_of(key: str) -> bytes:
    """The SHA-256 of a key."""
    return hashlib.sha256(key.encode()).digest()


def read_api_keys(path: Path) -> tuple[ApiKey, ...]:
    """Reads API keys: one a line with its scopes; empty lines and lines that begin with # are passed over.

    Raises:
        SettingsInvalid: The file can't be read, has no key, one that can be guessed, one twice, or a scope
            that there isn't.
    """
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsInvalid(f"API key file {path} can't be read: {reason}") from None
    if mode & stat.S_IROTH:
        logger.warning("API key file %s can be read by every user of this machine: chmod 600 it", path)
    keys = tuple(
        _key(number, line, path)
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.strip().startswith("#")
    )
    if not keys:
        raise SettingsInvalid(f"API key file {path} has no key: put at least one in it, one a line")
    if len({key.sha256 for key in keys}) < len(keys):
        raise SettingsInvalid(f"API key file {path} has a key twice: give it all its scopes on one line")
    return keys


def first_key(path: Path) -> str:
    """The first key of a file, for commands that ask a service.

    Raises:
        SettingsInvalid: As `read_api_keys`; or the file has hashes only.
    """
    for key in read_api_keys(path):
        if key.text is not None:
            return key.text
    raise SettingsInvalid(f"API key file {path} has only hashes: a command needs a key itself to send it")


class KeyRing:
    """The keys of a service, which follow their file.

    Args:
        path: Of the file; None: no key is needed, and nobody has one.

    Raises:
        SettingsInvalid: The file can't be used. If it can't later, the keys stay as they were.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._looked_s = time.monotonic()
        self._version = _version(path)
        self._keys: Sequence[ApiKey] = read_api_keys(path) if path else ()

    @property
    def needs_key(self) -> bool:
        """Whether requests need a key."""
        return self._path is not None

    def scopes_of(self, key: str) -> frozenset[KeyScope] | None:
        """What a key may do; None for one that isn't there."""
        self._follow()
        given = hash_of(key)
        # All keys are compared, whichever fits: the time taken tells nothing.
        fits = [known for known in self._keys if hmac.compare_digest(given, known.sha256)]
        return fits[0].scopes if fits else None

    def reload(self) -> None:
        """Reads the file again; one that can't be used is logged, and the keys stay as they were."""
        if self._path is None:
            return
        self._version = _version(self._path)
        try:
            self._keys = read_api_keys(self._path)
        except SettingsInvalid as error:
            logger.error("%s; the keys stay as they were", error)
        else:
            logger.info("%d API keys were read", len(self._keys))

    def _follow(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        if _version(self._path) != self._version:
            self.reload()


def _version(path: Path | None) -> tuple[int, int, int] | None:
    """Changes when the file does."""
    try:
        found = os.stat(path) if path else None
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def _key(number: int, line: str, path: Path) -> ApiKey:
    text, *names = line.replace(",", " ").split()
    scopes: list[KeyScope] = [scope for scope in get_args(KeyScope) if scope in names]
    if unknown := sorted(set(names) - ALL_SCOPES):
        raise SettingsInvalid(
            f"API key file {path} has the scope {unknown[0][:20]!r} in line {number}: after a key there may "
            f"be {', '.join(get_args(KeyScope))}, apart by spaces"
        )
    hashed = _HASHED.fullmatch(text)
    if hashed is None and len(text) < _KEY_MIN_CHARACTERS:
        raise SettingsInvalid(
            f"API key file {path} has a key of fewer than {_KEY_MIN_CHARACTERS} characters in line {number}: "
            "make longer ones, say with `openssl rand -hex 24`"
        )
    return ApiKey(
        sha256=bytes.fromhex(hashed[1]) if hashed else hash_of(text),
        scopes=frozenset(scopes) or USUAL_SCOPES,
        text=None if hashed else text,
    )
