"""Filters over the metadata of one item, in Python: for the few that came since a filter was last asked."""

from collections.abc import Mapping
from typing import cast

from app.search.collection import Json
from app.search.filters import And, Condition, Filter, Not, Or, Scalar


def matches(node: Filter, metadata: Mapping[str, Json]) -> bool:
    """Whether a filter keeps an item; what it means is written in `app.search.filters`."""
    match node:
        case And(terms):
            return all(matches(term, metadata) for term in terms)
        case Or(terms):
            return any(matches(term, metadata) for term in terms)
        case Not(term):
            return not matches(term, metadata)
        case Condition():
            return _holds(node, _value_at(metadata, node.keys))


def _value_at(metadata: Mapping[str, Json], keys: tuple[str, ...]) -> Json:
    value: object = metadata
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return cast("Json", value)


def _holds(condition: Condition, value: Json) -> bool:
    operand = condition.operand
    match condition.operator:
        case "exists":
            return (value is not None) is operand
        case "in":
            return any(_equal(value, one) for one in cast("tuple[Scalar, ...]", operand))
        case "contains":
            return isinstance(value, list) and any(
                _equal(member, cast("Scalar", operand)) for member in value
            )
        case "eq":
            return _equal(value, cast("Scalar", operand))
        case "ne":
            return value is not None and not _equal(value, cast("Scalar", operand))
        case _:
            return _is_ordered(value, condition)


def _equal(value: Json, operand: Scalar) -> bool:
    return _kind(value) is _kind(operand) and value == operand


def _is_ordered(value: Json, condition: Condition) -> bool:
    operand = cast("Scalar", condition.operand)
    if _kind(value) is not _kind(operand):
        return False
    left, right = cast("float", value), cast("float", operand)  # or both are texts, by code point
    match condition.operator:
        case "gt":
            return left > right
        case "gte":
            return left >= right
        case "lt":
            return left < right
        case _:
            return left <= right


def _kind(value: object) -> type:
    if isinstance(value, bool):
        return bool
    if isinstance(value, int | float):
        return float
    return str if isinstance(value, str) else type(value)
