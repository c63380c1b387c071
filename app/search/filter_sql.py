"""Filters as SQL over the JSON text of SQLite, with every word of a user as a parameter."""

import json
from dataclasses import dataclass
from typing import cast

from app.search.filters import And, Condition, Filter, Not, Or, Scalar

_SYMBOLS = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


@dataclass(frozen=True)
class SqlFilter:
    """A condition for SQL's WHERE, never NULL, and its parameters in order of their question marks."""

    clause: str
    parameters: tuple[str, ...]


def to_sql(node: Filter, *, column: str = "metadata") -> SqlFilter:
    """Turns a filter into SQL. Nothing that a user wrote is in the clause: all of it are parameters.

    Args:
        node: From `parse_filter`.
        column: The column that holds the JSON text; ours, never a user's.

    Returns:
        A clause whose value is 0 or 1, for every item.
    """
    match node:
        case And(terms):
            return _join(terms, " AND ", column=column)
        case Or(terms):
            return _join(terms, " OR ", column=column)
        case Not(term):
            inner = to_sql(term, column=column)
            return SqlFilter(f"(NOT {inner.clause})", inner.parameters)
        case Condition():
            return _condition_to_sql(node, column=column)


def _join(terms: tuple[Filter, ...], word: str, *, column: str) -> SqlFilter:
    parts = [to_sql(term, column=column) for term in terms]
    return SqlFilter(
        f"({word.join(part.clause for part in parts)})",
        tuple(parameter for part in parts for parameter in part.parameters),
    )


def _condition_to_sql(condition: Condition, *, column: str) -> SqlFilter:
    # IS TRUE throughout, so that a missing field gives 0 and not NULL, and NOT turns it into 1.
    path = "$" + "".join(f'."{key}"' for key in condition.keys)
    field = _Value(f"json_type({column}, ?)", f"json_extract({column}, ?)", (path,))
    operand = condition.operand
    match condition.operator:
        case "exists":
            has_value = SqlFilter(f"(({field.kind} <> 'null') IS TRUE)", (path,))
            return has_value if operand else SqlFilter(f"(NOT {has_value.clause})", (path,))
        case "ne":
            same = _compare(field, "=", cast(Scalar, operand))
            clause = f"(({field.kind} <> 'null') IS TRUE AND NOT {same.clause})"
            return SqlFilter(clause, (path, *same.parameters))
        case "in":
            return _is_one_of(field, cast("tuple[Scalar, ...]", operand))
        case "contains":
            member = _compare(_Value("member.type", "member.value", ()), "=", cast(Scalar, operand))
            clause = (
                f"({field.kind} = 'array' AND EXISTS "
                f"(SELECT 1 FROM json_each({column}, ?) AS member WHERE {member.clause})) IS TRUE"
            )
            return SqlFilter(f"({clause})", (path, path, *member.parameters))
        case _:
            return _compare(field, _SYMBOLS[condition.operator], cast(Scalar, operand))


@dataclass(frozen=True)
class _Value:
    """SQL for a JSON value's type and for itself; each of the two takes the parameters once."""

    kind: str
    value: str
    parameters: tuple[str, ...]


def _compare(left: _Value, symbol: str, operand: Scalar) -> SqlFilter:
    match operand:
        case bool():
            return SqlFilter(
                f"(({left.kind} = ?) IS TRUE)", (*left.parameters, "true" if operand else "false")
            )
        case str():
            clause = f"(({left.kind} = 'text' AND {left.value} {symbol} ?) IS TRUE)"
            return SqlFilter(clause, (*left.parameters, *left.parameters, operand))
        case _:
            # Both sides are read by SQLite's own parser, whose last digit isn't always Python's.
            is_number = f"{left.kind} IN ('integer', 'real')"
            clause = f"(({is_number} AND {left.value} {symbol} json_extract(?, '$')) IS TRUE)"
            return SqlFilter(clause, (*left.parameters, *left.parameters, json.dumps(operand)))


def _is_one_of(left: _Value, operands: tuple[Scalar, ...]) -> SqlFilter:
    booleans = ["true" if x else "false" for x in operands if isinstance(x, bool)]
    texts = [x for x in operands if isinstance(x, str)]
    numbers = [x for x in operands if not isinstance(x, bool | str)]
    chosen = "(SELECT value FROM json_each(?))"
    clause = (
        f"(({left.kind} IN {chosen}) IS TRUE"
        f" OR ({left.kind} = 'text' AND {left.value} IN {chosen}) IS TRUE"
        f" OR ({left.kind} IN ('integer', 'real') AND {left.value} IN {chosen}) IS TRUE)"
    )
    path = left.parameters
    parameters = (
        *path,
        _json_text(booleans),
        *path,
        *path,
        _json_text(texts),
        *path,
        *path,
        _json_text(numbers),
    )
    return SqlFilter(clause, parameters)


def _json_text(values: list[str] | list[int | float]) -> str:
    return json.dumps(values, ensure_ascii=False)
