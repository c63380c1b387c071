"""Filters as Milvus expressions, over a copy of an item's metadata in which every value is an ordered text.

Servers of different versions don't agree on how JSON's types compare, what a missing member is, and which
members a path can name. So the copy asks little of them: its members are named by letters, digits and `_xx`,
and its values are texts whose order is the values' own and whose first letter is their type:

    null            is left out
    true, false     "b1", "b0"
    "dog"           "sdog"
    a number        "n", its sign, its decimal exponent, its digits: see `number_text`
    an object       an object again, with one member more, so that it is never empty
    a list          the list of its texts, numbers and booleans, with one member more

    {"kind": "dog", "size": {"px": 64}, "tags": ["sea", null]}
    {"vkind": "sdog", "vsize": {"o": 1, "vpx": "n2c264"}, "vtags": ["l", "ssea"]}

The copy is at most a little more than three times as large as the metadata's own text.
"""

import re
from decimal import Decimal
from typing import cast

from app.search.collection import Json
from app.search.filters import And, Condition, Filter, Not, Or, Scalar

TERMS = "terms"  # the field that keeps the copy

_BASE_36 = "0123456789abcdefghijklmnopqrstuvwxyz"
_EXPONENT_MIDDLE = 400  # a float's decimal exponent is -323 to 309
_EXPONENT_LIMIT = 36 * 36 - 1
_EXACT_BELOW = 2.0**64  # whole floats below are written out in full, so that they compare with integers
_SYMBOLS = {"eq": "==", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
NOTHING = '(id == "")'  # no id is empty
_NAME_ESCAPE = re.compile("[\x00-/:-@\\[-`{-\x7f]")


def terms_of(metadata: dict[str, Json]) -> dict[str, Json]:
    """The copy of an item's metadata that filters are evaluated on."""
    return {member_name(key): _term(value) for key, value in metadata.items() if value is not None}


def _term(value: Json) -> Json:
    match value:
        case dict():
            return {"o": 1, **terms_of(value)}
        case list():
            # Only scalars can be asked for; of equal ones, one is enough.
            texts = dict.fromkeys(
                scalar_text(member) for member in value if isinstance(member, bool | int | float | str)
            )
            return ["l", *texts]
        case _:
            return scalar_text(cast(Scalar, value))


def scalar_text(value: Scalar) -> str:
    """A value as text: equal values are equal texts, and texts of one first letter are in the values' order."""
    match value:
        case bool():
            return "b1" if value else "b0"
        case str():
            return f"s{value}"
        case _:
            return f"n{number_text(value)}"


def number_text(number: int | float) -> str:
    """A number as text of letters, digits and `~`, so that texts are in the order of the numbers.

        0   < 0     above it "2", the decimal exponent in two digits of base 36, the decimal digits
        "1"         zero; below it "0" and the same, each digit subtracted from the largest, and "~"

    An integer and a float are equal texts where they are equal numbers.
    """
    if number == 0:
        return "1"
    if isinstance(number, float) and number.is_integer() and abs(number) < _EXACT_BELOW:
        number = int(number)
    # repr is the shortest text that names one float alone, so the texts are in the order of the floats.
    _, digits, shift = Decimal(repr(number)).as_tuple()
    exponent = len(digits) + cast(int, shift) + _EXPONENT_MIDDLE
    text = "".join(map(str, digits)).rstrip("0")
    if number > 0:
        return f"2{_base_36(exponent)}{text}"
    return f"0{_base_36(_EXPONENT_LIMIT - exponent)}{text.translate(_NINES_COMPLEMENT)}~"


_NINES_COMPLEMENT = str.maketrans("0123456789", "9876543210")


def _base_36(number: int) -> str:
    return _BASE_36[number // 36] + _BASE_36[number % 36]


def member_name(key: str) -> str:
    """A key of the metadata as a name that every server's paths can hold; another key has another name."""
    return "v" + _NAME_ESCAPE.sub(lambda found: f"_{ord(found.group()):02x}", key)


def to_expression(node: Filter) -> str:
    """Turns a filter into an expression on the field `terms`. What a user wrote is quoted and escaped."""
    return _expression(node, negated=False)


def _expression(node: Filter, *, negated: bool) -> str:
    match node:
        case And(terms):
            return f"({' and '.join(_expression(term, negated=negated) for term in terms)})"
        case Or(terms):
            return f"({' or '.join(_expression(term, negated=negated) for term in terms)})"
        case Not(term):
            return f"(not {_expression(term, negated=True)})"
        case Condition():
            path = TERMS + "".join(f'["{member_name(key)}"]' for key in node.keys)
            # Some servers call a comparison with a missing member neither true nor false, and so its negation.
            guard = f"(exists {path}) and " if negated and node.operator != "exists" else ""
            return f"({guard}{_condition(node, path)})"


def _condition(condition: Condition, path: str) -> str:
    operand = condition.operand
    match condition.operator:
        case "exists":
            return f"exists {path}" if operand else f"not (exists {path})"
        case "eq":
            return f"{path} == {_literal(cast(Scalar, operand))}"
        case "ne":
            return f"(exists {path}) and not ({path} == {_literal(cast(Scalar, operand))})"
        case "in":
            members = ", ".join(_literal(member) for member in cast("tuple[Scalar, ...]", operand))
            return f"({path} in [{members}])" if members else NOTHING
        case "contains":
            return f"(json_contains({path}, {_literal(cast(Scalar, operand))}))"
        case _:
            return _range(path, condition.operator, cast(Scalar, operand))


def _range(path: str, operator: str, operand: Scalar) -> str:
    """The operand's own bound, and on the other side the bound of its type."""
    text = scalar_text(operand)
    first, behind = quoted(text[0]), quoted(chr(ord(text[0]) + 1))
    bound = f"{path} {_SYMBOLS[operator]} {quoted(text)}"
    other = f"{path} < {behind}" if operator in {"gt", "gte"} else f"{path} >= {first}"
    return f"{bound} and {other}"


def _literal(value: Scalar) -> str:
    return quoted(scalar_text(value))


def quoted(text: str) -> str:
    """A string of Milvus's expressions: nothing in it can end it."""
    return '"' + text.translate(_ESCAPES) + '"'


_ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r"})
