"""The best few items of each value of a field: an album's, a class's, a camera's.

Chosen from candidates, so it is the same above every engine; see `app.search.ranking`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from app.errors import InvalidFilter, InvalidQuery
from app.search.bounds import MAX_RESULTS
from app.search.collection import Json, Neighbour
from app.search.filters import MAX_CONDITIONS, MAX_DEPTH, Condition, Operator, Scalar, parse_filter
from app.search.ranking import Finder, Narrowing, Window

_LEAST_CANDIDATES = 64
_CANDIDATES_EACH = 4  # for each neighbour asked for; most values come up more often than they are wanted
_LEAST_NUMBER = -1.7976931348623157e308  # of float64

_Key = tuple[bool, Scalar]  # whether it is a boolean, as Python has True == 1; and the value


@dataclass(frozen=True, kw_only=True)
class Group:
    """Items with the same value of a field, best first.

    Attributes:
        value: A string, a number or a boolean.
    """

    value: Scalar
    neighbours: list[Neighbour]


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How to group.

    Attributes:
        field: A path as filters have it: "camera.model", or a list of keys.
        group_size: How many items of each value.

    Raises:
        InvalidQuery: The path is none, or the size is out of bounds.
    """

    field: str | Sequence[str]
    group_size: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.group_size <= MAX_RESULTS:
            raise InvalidQuery(f"group_size is {self.group_size}; it must be 1 to {MAX_RESULTS:,}")
        try:
            parse_filter(self._condition("exists", True))
        except InvalidFilter as error:
            raise InvalidQuery(f"group_by can't be: {error.title}") from None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The path, from the outside in."""
        return cast(Condition, parse_filter(self._condition("exists", True))).keys

    def value_of(self, metadata: Mapping[str, Json]) -> Scalar | None:
        """What an item has in the field; None where that is no string, number or boolean."""
        value: object = metadata
        for key in self.keys:
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value if isinstance(value, str | bool | int | float) else None

    def with_any_value(self) -> Json:
        """The filter for items that have a string, a number or a boolean there."""
        return {
            "or": [
                self._condition("gte", ""),
                self._condition("gte", _LEAST_NUMBER),
                self._condition("in", [False, True]),
            ]
        }

    def with_value_in(self, values: Sequence[Scalar]) -> Json:
        """The filter for items that have one of some values there."""
        return self._condition("in", [*values])

    def _condition(self, operator: Operator, operand: Json) -> dict[str, Json]:
        return {"field": self.field if isinstance(self.field, str) else [*self.field], operator: operand}


def grouped(
    find: Finder, grouping: Grouping, window: Window, narrowing: Narrowing, *, with_vectors: bool = False
) -> list[Group]:
    """The best items of each value of a field, in order of each group's best item.

        for item in all that the narrowing lets through, best first:
            if the item has a string, a number or a boolean in the field:
                append it to the group of this value, if the group has fewer than `group_size`
        groups in the order in which they began, `k` of them after passing over `offset`

    Items without the field, or with null, a list or an object there, are left out. 1 and 1.0 are one value,
    as in filters, and true and 1 are two.

    The candidates are asked for in rounds: first whoever is near; then, until there are enough groups,
    whoever has another value than those that came up; then more of the groups that aren't full. So no value
    is missed, however many items of another one are nearer.

    Args:
        find: What finds items; see `app.search.ranking`.
        grouping: The field, and how many items of each value.
        window: Counts groups.
        narrowing: Which items may be found.
        with_vectors: Whether neighbours carry their vectors.

    Raises:
        InvalidQuery: There would be more than 1,000 items in all.
        InvalidFilter: The narrowing's filter is malformed, or leaves no room for the field's own conditions.
    """
    if window.end * grouping.group_size > MAX_RESULTS:
        raise InvalidQuery(
            f"offset + k is {window.end} groups of {grouping.group_size} items; together they may have at "
            f"most {MAX_RESULTS:,}. Ask for fewer groups, or smaller ones"
        )
    if narrowing.filter is not None:
        parse_filter(narrowing.filter)  # said in its own words, before it is part of a larger one
    rounds = _Rounds(find, grouping, narrowing, with_vectors=with_vectors)
    rounds.find_groups(window.end)
    rounds.fill_groups(window)
    return rounds.groups(window)


class _Rounds:
    """The rounds of one query, and what they brought so far."""

    def __init__(self, find: Finder, grouping: Grouping, narrowing: Narrowing, *, with_vectors: bool) -> None:
        self._find = find
        self._grouping = grouping
        self._narrowing = narrowing
        self._with_vectors = with_vectors
        self._groups: dict[_Key, list[Neighbour]] = {}
        self._complete = False  # whether no group can get another item

    def find_groups(self, count: int) -> None:
        """Goes on until there are `count` groups, or no other values."""
        wanted = self._wanted(count)
        self._complete = len(self._round(wanted, self._narrowing)) < wanted
        no_others = self._complete
        while len(self._groups) < count and not no_others:
            known = len(self._groups)
            wanted = self._wanted(count - known)
            others = self._narrowed(
                self._grouping.with_any_value(), {"not": self._grouping.with_value_in(self._values())}
            )
            page = self._round(wanted, others)
            # Numbers that differ in their last digits may be one to an engine: then nothing new comes.
            no_others = len(page) < wanted or len(self._groups) == known

    def fill_groups(self, window: Window) -> None:
        """Goes on until each group of the window is full, or has all there is."""
        size = self._grouping.group_size
        while not self._complete:
            open_keys = [key for key in self._keys(window) if len(self._groups[key]) < size]
            if not open_keys:
                return
            there = [neighbour.id for key in open_keys for neighbour in self._groups[key]]
            narrowing = self._narrowed(self._grouping.with_value_in([value for _, value in open_keys]))
            # So many items of so few values: one group is full after it, or there are no more.
            wanted = len(open_keys) * size
            self._complete = len(self._round(wanted, narrowing.without(there))) < wanted
            if len(there) == sum(len(self._groups[key]) for key in open_keys):
                return  # nothing came, for the reason above

    def groups(self, window: Window) -> list[Group]:
        """Those that were asked for."""
        return [Group(value=key[1], neighbours=self._groups[key]) for key in self._keys(window)]

    def _keys(self, window: Window) -> list[_Key]:
        return list(self._groups)[window.offset : window.end]

    def _values(self) -> list[Scalar]:
        return [value for _, value in self._groups]

    def _wanted(self, groups: int) -> int:
        return min(max(_LEAST_CANDIDATES, _CANDIDATES_EACH * groups * self._grouping.group_size), MAX_RESULTS)

    def _round(self, wanted: int, narrowing: Narrowing) -> list[Neighbour]:
        page = self._find(Window(k=wanted), narrowing, with_vectors=self._with_vectors)
        for neighbour in page:
            value = self._grouping.value_of(neighbour.metadata)
            if value is None:
                continue
            group = self._groups.setdefault((isinstance(value, bool), value), [])
            if len(group) < self._grouping.group_size:
                group.append(neighbour)
        return page

    def _narrowed(self, *conditions: Json) -> Narrowing:
        own = [] if self._narrowing.filter is None else [dict(self._narrowing.filter)]
        tree: dict[str, Json] = {"and": [*own, *conditions]}
        try:
            parse_filter(tree)
        except InvalidFilter:
            raise InvalidFilter(
                f"with group_by, a filter may be nested {MAX_DEPTH - 1} deep and have {MAX_CONDITIONS - 4} "
                "conditions: the field's own take the rest",
                path="",
            ) from None
        return replace(self._narrowing, filter=tree)
