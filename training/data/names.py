"""Millions of names in as many bytes as they have letters, and eight more each.

A tuple of a million Python strings takes some hundred megabytes in every process of a run.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

_CODEC, _ERRORS = "utf-8", "surrogateescape"  # as the system's own names of files may be no text


class PackedNames(Sequence[str]):
    """Names, one after the other in one block of memory; each is made when it is asked for."""

    def __init__(self, names: Iterable[str]) -> None:
        block, ends = bytearray(), array("q", [0])
        for name in names:
            block += name.encode(_CODEC, _ERRORS)
            ends.append(len(block))
        self._block, self._ends = bytes(block), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._name(place) for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._name(index % len(self))

    def __iter__(self) -> Iterator[str]:
        return (self._name(place) for place in range(len(self)))

    def _name(self, place: int) -> str:
        return self._block[self._ends[place] : self._ends[place + 1]].decode(_CODEC, _ERRORS)
