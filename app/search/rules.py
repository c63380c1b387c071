"""What every engine refuses, names and pages in the same way, with the same words."""

import base64
import itertools
import re
from collections.abc import Collection as Names

from app.errors import FingerprintMismatch, InvalidCollection, InvalidQuery

MAX_DIMENSIONS = 65_536
MAX_NAME = 64
MAX_PAGE_ITEMS = 1_000
_NAME = re.compile(f"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")


def check_name(name: str) -> None:
    """Refuses what neither a collection nor an alias can be called.

    Raises:
        InvalidCollection: It is too long, empty, or has other characters.
    """
    if not _NAME.fullmatch(name):
        raise InvalidCollection(
            "a collection's name has 1 to 64 of the characters a-z, A-Z, 0-9, '.', '_' and '-', "
            "and begins with a letter or a digit"
        )


def check_model(*, fingerprint: str, dimensions: int, max_dimensions: int = MAX_DIMENSIONS) -> None:
    """Refuses models whose vectors no collection can hold.

    Raises:
        InvalidCollection: The fingerprint is empty, or the dimensions are out of bounds.
    """
    if not fingerprint:
        raise InvalidCollection("a collection needs the fingerprint of the model whose vectors it shall hold")
    if not 1 <= dimensions <= max_dimensions:
        raise InvalidCollection(f"dimensions is {dimensions}; it must be 1 to {max_dimensions}")


def refuse_other_model(name: str, *, expected: str, found: str) -> None:
    """Refuses vectors of another model than the collection's.

    Raises:
        FingerprintMismatch: The fingerprints differ.
    """
    if found != expected:
        raise FingerprintMismatch(
            f"the collection {name!r} holds vectors of the model {expected}; these are of "
            f"{found}. Use that model, or another collection",
            expected=expected,
            found=found,
        )


def check_limit(limit: int) -> None:
    """Refuses pages of nothing and of too much.

    Raises:
        InvalidQuery: The limit is out of bounds.
    """
    if not 1 <= limit <= MAX_PAGE_ITEMS:
        raise InvalidQuery(f"limit is {limit}; it must be 1 to {MAX_PAGE_ITEMS}")


def cursor_of_id(item_id: str) -> str:
    """What a page gives to go on behind an item."""
    return base64.urlsafe_b64encode(item_id.encode()).decode("ascii")


def id_of_cursor(cursor: str) -> str:
    """The item behind which a page begins.

    Raises:
        InvalidQuery: It is not a cursor of ours.
    """
    try:
        return base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True).decode()
    except ValueError:  # binascii.Error and the Unicode errors are ValueErrors
        raise InvalidQuery("the cursor is not one that a page gave; begin again without one") from None


def retired_name(name: str, fingerprint: str, *, taken: Names[str]) -> str:
    """A free name that says whose vectors these were: `default-3f2a9c1b`, or `default-3f2a9c1b-2`."""
    digits = re.sub("[^A-Za-z0-9]", "", fingerprint.rpartition(":")[2])[:8] or "before"
    for number in itertools.count(1):
        ending = f"-{digits}" if number == 1 else f"-{digits}-{number}"
        retired = name[: MAX_NAME - len(ending)] + ending
        if retired not in taken:
            return retired
    raise AssertionError("there are more numbers than names")
