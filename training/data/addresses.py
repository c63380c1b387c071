"""What a user writes for data: a path on this machine, or an address of another place, such as s3://bucket/x.tar."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import BeforeValidator

from training.errors import DataError

_MOST_EXPANDED = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PATTERN_SIGNS = "*?["


def where(written: object) -> Path | str:
    """A path, or text where a protocol is named: `Path` would make one slash of two."""
    return written if isinstance(written, str) and "://" in written else Path(str(written))


Where = Annotated[Path | str, BeforeValidator(where)]
"""A path on this machine; or an address, which is text."""


def name_of(data: Where) -> str:
    """The name of data, for people: its last part, or the one before where that is a pattern or `train`."""
    path = data.resolve() if isinstance(data, Path) else PurePosixPath(data.partition("://")[2].strip("/"))
    name = path.stem if path.suffix else path.name
    is_part = name == "train" or any(sign in name for sign in f"{_PATTERN_SIGNS}{{")
    return (path.parent.name if is_part else name).replace(":", "-") or "data"


def is_pattern(data: Where) -> bool:
    """Whether its last part stands for several files; a `?` of the web begins a query."""
    name = data.name if isinstance(data, Path) else data.rpartition("/")[2]
    signs = "*[" if isinstance(data, str) and data.startswith("http") else _PATTERN_SIGNS
    return any(sign in name for sign in signs)


def expanded(data: Where) -> list[Where]:
    """Every path or address that braces stand for, in their order; one without braces is itself.

    `train-{000..002}.tar` are three files, numbered with as many digits; `{train,val}.tar` are two.

    Raises:
        DataError: A range goes down, or there are more than a million.
    """
    found: list[str] = []
    for each in _expanded(str(data)):
        found.append(each)
        if len(found) > _MOST_EXPANDED:
            raise DataError(f"{data} stands for more than {_MOST_EXPANDED:,} files: give a smaller range")
    return [Path(each) if isinstance(data, Path) else each for each in found]


def _expanded(text: str) -> Iterator[str]:
    braces = _BRACES.search(text)
    if braces is None:
        yield text
        return
    for choice in _choices(braces[1], text):
        yield from _expanded(text[: braces.start()] + choice + text[braces.end() :])


def _choices(inside: str, text: str) -> Iterator[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        yield from inside.split(",")
        return
    first, last = numbers[1], numbers[2]
    if int(first) > int(last):
        raise DataError(f"the range {{{inside}}} of {text} goes down: write {{{last}..{first}}}")
    digits = len(first) if first.startswith("0") else 0
    for number in range(int(first), int(last) + 1):
        yield f"{number:0{digits}}"
