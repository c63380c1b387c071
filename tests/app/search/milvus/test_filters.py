"""The texts that stand for values on a Milvus server, and the expressions over them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.search.filters import OPERATORS, parse_filter
from app.search.milvus.filters import member_name, number_text, quoted, terms_of, to_expression
from tests.app.search.test_filters import filters, metadata_objects

integers = st.integers(-(2**63), 2**63 - 1)
numbers = (
    integers
    | st.floats(allow_nan=False, allow_infinity=False)
    | integers.map(float)
    | st.integers(-20, 20)
    | st.sampled_from([2**53 + 1, float(2**53), 2.0**64, -(2.0**64), 5e-324, -5e-324, 1.7976931348623157e308])
)


@given(left=numbers, right=numbers)
def test_texts_of_numbers_are_in_the_order_of_the_numbers(left: float, right: float) -> None:
    assert (number_text(left) < number_text(right)) == (left < right)
    assert (number_text(left) == number_text(right)) == (left == right)


@given(number=numbers)
def test_texts_of_numbers_are_short_and_plain(number: float) -> None:
    text = number_text(number)
    assert len(text) <= 24
    assert text.isascii()
    assert text.strip("~").isalnum()


def test_the_copy_is_as_the_documentation_says() -> None:
    assert terms_of(
        {"kind": "dog", "size": {"px": 64}, "tags": ["sea", None, [1], {"a": 1}], "none": None}
    ) == {
        "vkind": "sdog",
        "vsize": "o",
        "osize": {"vpx": "n2b664"},
        "vtags": "l",
        "ltags": ["ssea"],
    }
    assert terms_of({"yes": True, "no": False, "zero": 0, "below": -64}) == {
        "vyes": "b1",
        "vno": "b0",
        "vzero": "n1",
        "vbelow": "n0ot35~",
    }


@given(keys=st.lists(st.text(max_size=6), min_size=2, max_size=2, unique=True))
def test_two_keys_have_two_names_that_any_path_can_hold(keys: list[str]) -> None:
    first, second = map(member_name, keys)
    assert first != second
    assert all(character.isalnum() or character == "_" or not character.isascii() for character in first)


@given(metadata=metadata_objects)
def test_the_copy_is_json_of_texts(metadata: dict[str, Any]) -> None:
    def check(terms: dict[str, Any]) -> None:
        for name, value in terms.items():
            match name[0]:
                case "v":
                    assert isinstance(value, str)
                    assert value[0] in "bsnol"
                case "l":
                    assert all(isinstance(member, str) for member in value)
                case _:
                    check(value)

    check(terms_of(metadata))
    json.dumps(terms_of(metadata))


@given(text=st.text())
def test_nothing_ends_a_string_but_its_end(text: str) -> None:
    inside = quoted(text)[1:-1]
    assert not inside.replace("\\\\", "").replace('\\"', "").count('"')
    assert "\n" not in inside
    assert "\r" not in inside


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_a_user_wrote_stays_in_its_quotes(operator: str) -> None:
    written = '"] == "" or id != "'
    operand: Any = {"in": [written], "exists": True}.get(operator, written)
    expression = to_expression(parse_filter({"field": "a b", operator: operand}))
    assert '["va_20b"]' in expression or '["la_20b"]' in expression
    assert written not in expression


@given(tree=filters)
def test_parentheses_balance(tree: dict[str, Any]) -> None:
    expression = to_expression(parse_filter(tree))
    assert expression.startswith("(")
    assert expression.endswith(")")
