"""The language of filters: a small JSON tree over an item's metadata, checked.

`app.search.embedded.filter_sql` turns it into SQL; another engine turns the same tree into its own language.

    filter    = {"and": [filter, ...]} | {"or": [filter, ...]} | {"not": filter} | condition
    condition = {"field": path, operator: operand, ...}      several operators must all hold

    eq, ne            a string, a number or a boolean        {"field": "class", "eq": "dog"}
    in                a list of those                        {"field": "class", "in": ["dog", "cat"]}
    gt, gte, lt, lte  a number or a string                   {"field": "taken", "gte": "2024-01-01"}
    contains          as eq, against a list's members        {"field": "tags", "contains": "beach"}
    exists            true or false                          {"field": "camera.model", "exists": true}

A path names nested members with dots; as a list of keys (`["a.b", "c"]`) it reaches keys that hold a dot.

What it means, so that every engine can mean the same:

- null is no value: a field that is null and one that is missing are the same, and only `exists: false` (or a
  `not`) finds them. `ne` wants a value, and a different one; `{"not": {"eq"}}` also finds items without one.
- Types don't mix: `true` isn't 1, `"1"` isn't 1, but 1 is 1.0. Another type than asked for is no match and
  no error, as items of one collection may differ.
- Strings are ordered by code point, so dates in ISO 8601 are ordered by time. Numbers are compared exactly,
  integers of 64 bits and doubles alike.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from app.errors import InvalidFilter

Operator: TypeAlias = Literal["eq", "ne", "in", "gt", "gte", "lt", "lte", "contains", "exists"]
Scalar: TypeAlias = str | bool | int | float

OPERATORS: tuple[Operator, ...] = ("eq", "ne", "in", "gt", "gte", "lt", "lte", "contains", "exists")
MAX_DEPTH = 16
MAX_CONDITIONS = 256
MAX_IN = 1_000
MAX_PATH_KEYS = 16
_INT64 = 2**63


@dataclass(frozen=True)
class Condition:
    """One operator on one field; `keys` is its path, from the outside in."""

    keys: tuple[str, ...]
    operator: Operator
    operand: Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class And:
    """All of the terms hold."""

    terms: "tuple[Filter, ...]"


@dataclass(frozen=True)
class Or:
    """At least one of the terms holds."""

    terms: "tuple[Filter, ...]"


@dataclass(frozen=True)
class Not:
    """The term doesn't hold."""

    term: "Filter"


Filter: TypeAlias = Condition | And | Or | Not


def parse_filter(tree: object) -> Filter:
    """Checks a filter as it came.

    Raises:
        InvalidFilter: It is malformed; its `path` is a JSON pointer to the place.
    """
    parsed = _parse(tree, path="", depth=1)
    conditions = _count_conditions(parsed)
    if conditions > MAX_CONDITIONS:
        raise InvalidFilter(
            f"the filter has {conditions} conditions; at most {MAX_CONDITIONS} may be", path=""
        )
    return parsed


def _count_conditions(node: Filter) -> int:
    match node:
        case And(terms) | Or(terms):
            return sum(_count_conditions(term) for term in terms)
        case Not(term):
            return _count_conditions(term)
        case Condition():
            return 1


def _parse(tree: object, *, path: str, depth: int) -> Filter:
    if depth > MAX_DEPTH:
        raise InvalidFilter(f"the filter is nested more than {MAX_DEPTH} deep", path=path)
    if not isinstance(tree, Mapping):
        raise InvalidFilter(f"a filter is a JSON object, not {_kind(tree)}", path=path)
    if "field" in tree:
        return _parse_field(tree, path=path)
    if len(tree) != 1 or next(iter(tree)) not in {"and", "or", "not"}:
        raise InvalidFilter(
            'a filter is {"and": [...]}, {"or": [...]}, {"not": {...}}, or has a "field" and an operator; '
            f"found the members {_names(tree)}",
            path=path,
        )
    ((word, body),) = tree.items()
    if word == "not":
        return Not(_parse(body, path=f"{path}/not", depth=depth + 1))
    if not isinstance(body, list) or not body:
        raise InvalidFilter(f'"{word}" takes a list of at least one filter', path=f"{path}/{word}")
    terms = tuple(_parse(term, path=f"{path}/{word}/{i}", depth=depth + 1) for i, term in enumerate(body))
    return And(terms) if word == "and" else Or(terms)


def _parse_field(tree: Mapping[str, object], *, path: str) -> Filter:
    keys = _parse_keys(tree["field"], path=f"{path}/field")
    operators = [name for name in tree if name != "field"]
    if not operators:
        raise InvalidFilter(f"the field needs an operator: {', '.join(OPERATORS)}", path=path)
    conditions = tuple(
        _parse_condition(keys, name, tree[name], path=f"{path}/{_pointer(name)}") for name in operators
    )
    return conditions[0] if len(conditions) == 1 else And(conditions)


def _parse_keys(field: object, *, path: str) -> tuple[str, ...]:
    keys = field.split(".") if isinstance(field, str) else field
    if not isinstance(keys, list) or not 1 <= len(keys) <= MAX_PATH_KEYS:
        raise InvalidFilter(
            f'a field is a path such as "camera.model", or a list of 1 to {MAX_PATH_KEYS} keys', path=path
        )
    for key in keys:
        if not isinstance(key, str) or not key or not _is_plain(key):
            # SQLite's JSON paths have no escapes: such a key can be kept, but not asked for.
            raise InvalidFilter(
                "a field's keys are strings, not empty, without quotes, backslashes and control characters",
                path=path,
            )
    return tuple(keys)


def _is_plain(key: str) -> bool:
    return is_storable_text(key) and not any(character in '"\\' or character < " " for character in key)


def is_storable_text(text: str) -> bool:
    """Whether a string is Unicode that SQLite keeps whole: no half surrogate pairs, no NUL."""
    if text.isascii():
        return "\0" not in text
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _parse_condition(keys: tuple[str, ...], name: str, operand: object, *, path: str) -> Condition:
    match name:
        case "eq" | "ne" | "contains":
            return Condition(keys, name, _scalar(operand, path=path))
        case "gt" | "gte" | "lt" | "lte":
            if isinstance(operand, bool):
                raise InvalidFilter(f'"{name}" compares numbers or strings, not booleans', path=path)
            return Condition(keys, name, _scalar(operand, path=path))
        case "in":
            if not isinstance(operand, list) or len(operand) > MAX_IN:
                raise InvalidFilter(f'"in" takes a list of at most {MAX_IN} values', path=path)
            return Condition(keys, name, tuple(_scalar(x, path=f"{path}/{i}") for i, x in enumerate(operand)))
        case "exists":
            if not isinstance(operand, bool):
                raise InvalidFilter(f'"exists" takes true or false, not {_kind(operand)}', path=path)
            return Condition(keys, name, operand)
        case _:
            raise InvalidFilter(f"there is no such operator; there are {', '.join(OPERATORS)}", path=path)


def _scalar(operand: object, *, path: str) -> Scalar:
    match operand:
        case bool():
            return operand
        case str() if is_storable_text(operand):
            return operand
        case int() if -_INT64 <= operand < _INT64:
            return operand
        case float() if abs(operand) != float("inf") and operand == operand:  # noqa: PLR0124 - NaN differs from itself
            return operand
        case None:
            raise InvalidFilter('null is no value to compare with; use {"exists": false}', path=path)
        case str() | int() | float():
            raise InvalidFilter(
                "a value is Unicode text without NUL, an integer of 64 bits, or a finite number", path=path
            )
        case _:
            raise InvalidFilter(
                f"a value is a string, a number or a boolean, not {_kind(operand)}", path=path
            )


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case _:
            return "an object"


def _names(tree: Mapping[str, object]) -> str:
    # At most four, cut: what a caller sent is quoted only as far as it helps.
    return ", ".join(json.dumps(str(name)[:32]) for name in list(tree)[:4]) or "none"


def _pointer(name: object) -> str:
    return str(name)[:64].replace("~", "~0").replace("/", "~1")
