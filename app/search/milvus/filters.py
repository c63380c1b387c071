"""Filters as Milvus expressions, over a copy of an item's metadata in which every value is an ordered text.

Servers of different versions don't agree on how JSON's types compare, what a missing member is, and which
members a path can name. So the copy asks little of them: of ASCII its members' names have letters, digits and
`_xx` alone, and what is compared is always text, whose order is the values' own and whose first letter is
their type:

    null            is left out
    true, false     "b1", "b0"
    "dog"           "sdog"
    a number        "n", its sign, its decimal exponent, its digits: see `number_text`
    an object       "o", and beside it, as another member, the copy of its members
    a list          "l", and beside it, as another member, the texts of its texts, numbers and booleans

    {"kind": "dog", "size": {"px": 64}, "tags": ["sea", null]}
    {"vkind": "sdog", "vsize": "o", "osize": {"vpx": "n2b664"}, "vtags": "l", "ltags": ["ssea"]}
"""

import re
from decimal import Decimal
from typing import cast

from app.search.collection import Json
from app.search.filters import And, Condition, Filter, Not, Or, Scalar

TERMS = "terms"  # the field that keeps the copy

_BASE_36 = "0123456789abcdefghijklmnopqrstuvwxyz"
_EXPONENT_ZERO = 400  # a float's decimal exponent is -323 to 309
_EXPONENT_LIMIT = 36 * 36 - 1
_NINES_COMPLEMENT = str.maketrans("0123456789", "9876543210")
_EXACT_BELOW = 2.0**64  # whole floats below are written out in full, so that they compare with integers
_SYMBOLS = {"eq": "==", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_NOTHING = '(id == "")'  # no id is empty
_NAME_ESCAPE = re.compile("[\x00-/:-@\\[-`{-\x7f]")
_QUOTE_ESCAPES = str.maketrans({'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r"})


def terms_of(metadata: dict[str, Json]) -> dict[str, Json]:
    """The copy of an item's metadata that filters are evaluated on."""
    terms: dict[str, Json] = {}
    for key, value in metadata.items():
        name = member_name(key)
        match value:
            case None:
                pass
            case dict():
                terms["v" + name], terms["o" + name] = "o", terms_of(value)
            case list():
                # Only scalars can be asked for; of equal ones, one is enough.
                texts = dict.fromkeys(
                    scalar_text(member) for member in value if isinstance(member, bool | int | float | str)
                )
                terms["v" + name], terms["l" + name] = "l", list(texts)
            case _:
                terms["v" + name] = scalar_text(value)
    return terms


def scalar_text(value: Scalar) -> str:
    """A value as text: equal values are equal texts, and texts of one first letter are in order of values."""
    match value:
        case bool():
            return "b1" if value else "b0"
        case str():
            return f"s{value}"
        case _:
            return f"n{number_text(value)}"


def number_text(number: int | float) -> str:
    """A number as text of letters, digits and `~`, so that texts are in the order of the numbers.

        above 0     "2", the decimal exponent as two digits of base 36, the decimal digits
        0           "1"
        below 0     "0", and as above, but each digit subtracted from the largest, and "~"

    An integer and a float are equal texts where they are equal numbers.
    """
    if number == 0:
        return "1"
    if isinstance(number, float) and number.is_integer() and abs(number) < _EXACT_BELOW:
        number = int(number)
    # repr is the shortest text that names one float alone, so these texts are in the order of the floats.
    _, digits, shift = Decimal(repr(number)).as_tuple()
    exponent = len(digits) + cast(int, shift) + _EXPONENT_ZERO
    text = "".join(map(str, digits)).rstrip("0")
    if number > 0:
        return f"2{_base_36(exponent)}{text}"
    return f"0{_base_36(_EXPONENT_LIMIT - exponent)}{text.translate(_NINES_COMPLEMENT)}~"


def _base_36(number: int) -> str:
    return _BASE_36[number // 36] + _BASE_36[number % 36]


def member_name(key: str) -> str:
    """A key of the metadata as a name that every server's paths can hold; another key has another name."""
    return _NAME_ESCAPE.sub(lambda found: f"_{ord(found.group()):02x}", key)


def to_expression(node: Filter) -> str:
    """Turns a filter into an expression on the field `terms`. What a user wrote is escaped or quoted."""
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
            return _condition(node, negated=negated)


def _condition(condition: Condition, *, negated: bool) -> str:
    operand = condition.operand
    value = _path(condition.keys, "v")
    match condition.operator:
        case "exists":
            return f"(exists {value})" if operand else f"(not (exists {value}))"
        case "ne":
            return f"((exists {value}) and (not ({value} == {_literal(cast(Scalar, operand))})))"
        case "in":
            members = ", ".join(_literal(member) for member in cast("tuple[Scalar, ...]", operand))
            return _guarded(value, f"({value} in [{members}])", negated=negated) if members else _NOTHING
        case "contains":
            members = _path(condition.keys, "l")
            found = f"(json_contains({members}, {_literal(cast(Scalar, operand))}))"
            return _guarded(members, found, negated=negated)
        case "eq":
            return _guarded(value, f"({value} == {_literal(cast(Scalar, operand))})", negated=negated)
        case _:
            compared = _range(value, condition.operator, cast(Scalar, operand))
            return _guarded(value, compared, negated=negated)


def _path(keys: tuple[str, ...], kind: str) -> str:
    """Where the copy has a value's text ("v"), its members ("o") or its list ("l")."""
    outer = "".join(f'["o{member_name(key)}"]' for key in keys[:-1])
    return f'{TERMS}{outer}["{kind}{member_name(keys[-1])}"]'


def _guarded(path: str, compared: str, *, negated: bool) -> str:
    """Servers may call a comparison with what is missing neither true nor false, and so its negation."""
    return f"((exists {path}) and {compared})" if negated else compared


def _range(path: str, operator: str, operand: Scalar) -> str:
    """The operand's own bound, and on the other side the bound of its type."""
    text = scalar_text(operand)
    first, behind = quoted(text[0]), quoted(chr(ord(text[0]) + 1))
    other = f"{path} < {behind}" if operator in {"gt", "gte"} else f"{path} >= {first}"
    return f"({path} {_SYMBOLS[operator]} {quoted(text)} and {other})"


def _literal(value: Scalar) -> str:
    return quoted(scalar_text(value))


def quoted(text: str) -> str:
    """A string of Milvus's expressions: nothing in it can end it."""
    return f'"{text.translate(_QUOTE_ESCAPES)}"'
