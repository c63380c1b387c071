"""Filters as SQL over the index of fields, with every word of a user as a parameter.

Each condition is a range of the index, read by SQLite in one step and without Python's lock; what "and", "or"
and "not" do to the results is done on sorted arrays.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from app.search.embedded.fields import BOOLEAN, CUT, MAX_TEXT, MEMBER, NUMBER, OTHER, TEXT, Fields
from app.search.filters import And, Condition, Filter, Not, Or, Scalar

Rids: TypeAlias = npt.NDArray[np.int64]

_SYMBOLS: Final = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_NO_RIDS: Final[Rids] = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Kept:
    """What a filter keeps: some rids, rising; or, where it's a complement, all others."""

    rids: Rids
    is_complement: bool = False

    def of(self, everything: Rids) -> Rids:
        """The rids it keeps of all that there are, rising."""
        return without(everything, self.rids) if self.is_complement else self.rids


@dataclass(frozen=True)
class SqlRange:
    """A condition on the table `fields`, after `path = ? AND`, and its parameters in order."""

    clause: str
    parameters: tuple[str | int | float, ...]


def kept_by(connection: sqlite3.Connection, cid: int, node: Filter, *, fields: Fields) -> Kept:
    """Asks the index what a filter keeps. Deleted items are among it until they are erased."""
    match node:
        case And(terms):
            spans, others = _spans(terms)
            kept = [Kept(_read_span(connection, cid, span, fields=fields)) for span in spans]
            kept += [kept_by(connection, cid, term, fields=fields) for term in others]
            return reduce(_both, kept)
        case Or(terms):
            return reduce(_either, (kept_by(connection, cid, term, fields=fields) for term in terms))
        case Not(term):
            return _others(kept_by(connection, cid, term, fields=fields))
        case Condition():
            path = fields.path(connection, cid, node.keys)
            return _kept_by_condition(connection, path, node)


def _spans(terms: Sequence[Filter]) -> tuple[list[tuple[Condition, Condition]], list[Filter]]:
    """Lower and upper bounds of one field, which are one range of the index; and the other terms.

    Asked for one by one, either bound of a month would read the items of years.
    """
    spans: list[tuple[Condition, Condition]] = []
    others: list[Filter] = []
    lower: dict[tuple[tuple[str, ...], int], Condition] = {}
    for term in sorted(terms, key=lambda term: _is_bound(term, "gt", "gte"), reverse=True):
        if not (isinstance(term, Condition) and _is_bound(term, "gt", "gte", "lt", "lte")):
            others.append(term)
            continue
        place = (term.keys, _kind(cast("Scalar", term.operand)))
        if term.operator in {"gt", "gte"} and place not in lower:
            lower[place] = term
        elif term.operator in {"lt", "lte"} and place in lower:
            spans.append((lower.pop(place), term))
        else:
            others.append(term)
    return spans, [*others, *lower.values()]


def _is_bound(term: Filter, *operators: str) -> bool:
    """Whether a term bounds a field by what the index has whole."""
    return (
        isinstance(term, Condition)
        and term.operator in operators
        and not (isinstance(term.operand, str) and len(term.operand) > MAX_TEXT)
    )


def _read_span(
    connection: sqlite3.Connection, cid: int, span: tuple[Condition, Condition], *, fields: Fields
) -> Rids:
    lower, upper = span
    # Both have the same kinds in the same order: a number one, a text that isn't long two.
    parts = [
        SqlRange(f"{least.clause} AND {most.clause}", (*least.parameters, *most.parameters))
        for least, most in zip(ranges(lower), ranges(upper), strict=True)
    ]
    return _read(connection, fields.path(connection, cid, lower.keys), parts)


def _kept_by_condition(connection: sqlite3.Connection, path: int | None, condition: Condition) -> Kept:
    has_value = SqlRange(f"kind <= {OTHER}", ())
    match condition.operator:
        case "exists":
            return Kept(_read(connection, path, [has_value]), is_complement=condition.operand is False)
        case "ne":
            having = _read(connection, path, [has_value])
            return Kept(without(having, _read(connection, path, list(ranges(condition)))))
        case _:
            return Kept(_read(connection, path, list(ranges(condition))))


def _read(connection: sqlite3.Connection, path: int | None, parts: Sequence[SqlRange]) -> Rids:
    if path is None:
        return _NO_RIDS
    found = []
    for part in parts:
        # One text instead of a row for each: SQLite makes it without Python's lock, and NumPy reads it fast.
        (text,) = connection.execute(
            f"SELECT group_concat(rid) FROM fields WHERE path = ? AND {part.clause}",
            (path, *part.parameters),
        ).fetchone()
        if text is not None:
            found.append(np.fromstring(text, dtype=np.int64, sep=","))
    return np.sort(np.concatenate(found)) if found else _NO_RIDS  # no rid is in two: a field has one value


def ranges(condition: Condition) -> Iterator[SqlRange]:
    """The ranges of the index whose rids a condition keeps; of "ne", those that it leaves out.

    Nothing that a user wrote is in a clause.
    """
    operand = condition.operand
    match condition.operator:
        case "in":
            yield from _is_one_of(condition, cast("tuple[Scalar, ...]", operand))
        case "eq" | "ne":
            yield from _is_one_of(condition, (cast("Scalar", operand),))
        case "contains":
            yield from _is_one_of(condition, (cast("Scalar", operand),), member=MEMBER)
        case _:
            yield from _is_ordered(condition, cast("str | int | float", operand))


def _is_one_of(condition: Condition, operands: tuple[Scalar, ...], *, member: int = 0) -> Iterator[SqlRange]:
    values: dict[int, list[str | int | float]] = {NUMBER: [], TEXT: [], BOOLEAN: []}
    for operand in operands:
        if isinstance(operand, str) and len(operand) > MAX_TEXT:
            yield _cut_and(condition, "=", operand, member=member)
        else:
            values[_kind(operand)].append(int(operand) if isinstance(operand, bool) else operand)
    for kind, chosen in values.items():
        if chosen:
            marks = ", ".join("?" * len(chosen))
            yield SqlRange(f"kind = {kind + member} AND value IN ({marks})", tuple(chosen))


def _is_ordered(condition: Condition, operand: str | int | float) -> Iterator[SqlRange]:
    symbol = _SYMBOLS[condition.operator]
    yield SqlRange(f"kind = {_kind(operand)} AND value {symbol} ?", (operand,))
    if not isinstance(operand, str):
        return
    if len(operand) <= MAX_TEXT:
        # A text that is longer and begins the same comes after.
        yield SqlRange(f"kind = {CUT} AND value {'>=' if symbol in {'>', '>='} else '<'} ?", (operand,))
    else:
        yield SqlRange(f"kind = {CUT} AND value {symbol[0]} ?", (operand[:MAX_TEXT],))
        yield _cut_and(condition, symbol, operand)


def _cut_and(condition: Condition, symbol: str, operand: str, *, member: int = 0) -> SqlRange:
    """Long texts that begin as the operand does, compared whole."""
    path = "$" + "".join(f'."{key}"' for key in condition.keys)
    if member:
        whole = (
            "(SELECT 1 FROM items, json_each(items.metadata, ?) AS member"
            " WHERE items.rid = fields.rid AND member.type = 'text' AND member.value = ?)"
        )
    else:
        whole = (
            "(SELECT 1 FROM items"
            f" WHERE items.rid = fields.rid AND json_extract(items.metadata, ?) {symbol} ?)"
        )
    return SqlRange(
        f"kind = {CUT + member} AND value = ? AND EXISTS {whole}", (operand[:MAX_TEXT], path, operand)
    )


def _kind(operand: Scalar) -> int:
    match operand:
        case bool():
            return BOOLEAN
        case str():
            return TEXT
        case _:
            return NUMBER


# Sets, as sorted arrays


def _others(kept: Kept) -> Kept:
    return Kept(kept.rids, is_complement=not kept.is_complement)


def _both(left: Kept, right: Kept) -> Kept:
    if left.is_complement and right.is_complement:
        more = without(right.rids, left.rids)
        return Kept(np.sort(np.concatenate([left.rids, more])), is_complement=True)
    if left.is_complement:
        return Kept(without(right.rids, left.rids))
    if right.is_complement:
        return Kept(without(left.rids, right.rids))
    few, many = sorted((left.rids, right.rids), key=len)
    return Kept(few[is_in(few, many)])


def _either(left: Kept, right: Kept) -> Kept:
    return _others(_both(_others(left), _others(right)))


def without(rids: Rids, others: Rids) -> Rids:
    """The rids that aren't among others, both rising."""
    if len(others) < len(rids) // 8:
        return np.delete(rids, np.searchsorted(rids, others[is_in(others, rids)]))
    return rids[~is_in(rids, others)]


def is_in(rids: Rids, others: Rids) -> npt.NDArray[np.bool_]:
    """Which rids are among others, both rising: bool [len(rids)]."""
    if len(others) == 0:
        return np.zeros(len(rids), dtype=np.bool_)
    places = np.searchsorted(others, rids)
    places[places == len(others)] = 0
    return np.asarray(others[places] == rids)
