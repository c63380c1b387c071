"""Filters: what is refused and where; the index of fields, and what came since, against plain Python."""

import json
import sqlite3
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import InvalidFilter
from app.search import matching as one_by_one
from app.search.embedded import schema
from app.search.embedded.fields import MAX_TEXT, Fields, rows_of
from app.search.embedded.filter_sql import kept_by, ranges
from app.search.filters import OPERATORS, Condition, parse_filter

KEYS = ["a", "b", "ü b", "x-1", "$", "[0]"]


def matches(tree: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """What a filter means, read off the documentation, on parsed JSON."""
    if "and" in tree:
        return all(matches(term, metadata) for term in tree["and"])
    if "or" in tree:
        return any(matches(term, metadata) for term in tree["or"])
    if "not" in tree:
        return not matches(tree["not"], metadata)
    value = value_at(metadata, tree["field"])
    return all(OPERATIONS[name](value, operand) for name, operand in tree.items() if name != "field")


def value_at(metadata: object, field: str | list[str]) -> object:
    for key in field.split(".") if isinstance(field, str) else field:
        metadata = metadata.get(key) if isinstance(metadata, dict) else None
    return metadata


def kind(value: object) -> type:
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def equal(value: object, operand: object) -> bool:
    return kind(value) is kind(operand) and bool(value == operand)


OPERATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": equal,
    "ne": lambda value, operand: value is not None and not equal(value, operand),
    "in": lambda value, operand: any(equal(value, one) for one in operand),
    "exists": lambda value, operand: (value is not None) is operand,
    "contains": lambda value, operand: (
        isinstance(value, list) and any(equal(member, operand) for member in value)
    ),
    "gt": lambda value, operand: kind(value) is kind(operand) and value > operand,
    "gte": lambda value, operand: kind(value) is kind(operand) and value >= operand,
    "lt": lambda value, operand: kind(value) is kind(operand) and value < operand,
    "lte": lambda value, operand: kind(value) is kind(operand) and value <= operand,
}


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3
) | st.sampled_from(["dog", "Dog", "1", "true", "2024-05-01", "'; DROP TABLE items; --", "%", '"', "\\"])
integers = st.integers(-3, 3) | st.sampled_from([2**53 + 1, 2**63 - 1, -(2**63)])
numbers = integers | st.sampled_from([0.5, -0.5, 1.0, 2.0, 0.1, 1e10, 1e-7, 9007199254740992.0])
near_integers = st.sampled_from(
    [n + d for n in (2**53, 2**62, -(2**53), 2**63 - 10) for d in (-1, 0, 1)]
    + [float(2**53), float(2**62), float(2**63), 0.1 + 0.2, 0.3, 0.0, -0.0, 1e308, 5e-324, 0]
)
scalars = texts | numbers | st.booleans()
values = st.recursive(
    st.none() | scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
metadata_objects = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)
fields = st.sampled_from(["a", "b", "a.b", "a.b.a", "missing"]) | st.lists(
    st.sampled_from(KEYS), min_size=1, max_size=3
)
operations = st.one_of(
    st.tuples(st.sampled_from(["eq", "ne", "contains"]), scalars),
    st.tuples(st.sampled_from(["gt", "gte", "lt", "lte"]), texts | numbers),
    st.tuples(st.just("in"), st.lists(scalars, max_size=4)),
    st.tuples(st.just("exists"), st.booleans()),
)
conditions = st.builds(
    lambda field, pairs: {"field": field, **dict(pairs)}, fields, st.lists(operations, min_size=1, max_size=2)
)
filters = st.recursive(
    conditions,
    lambda inner: (
        st.builds(lambda terms: {"and": terms}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda terms: {"or": terms}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda term: {"not": term}, inner)
    ),
    max_leaves=5,
)


class Asked:
    """A database with one item, and others that must never be found."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None)
        self.connection.executescript(schema.CREATE)
        self.fields = Fields()
        for rid, cid, text in (
            (7, 1, json.dumps(metadata, ensure_ascii=False)),
            (8, 2, '{"a": 1, "b": "x"}'),
        ):
            self.connection.execute(
                "INSERT INTO items (rid, cid, id, seq, metadata, sha256) VALUES (?, ?, 'x', 1, ?, '')",
                (rid, cid, text),
            )
            self.fields.add(self.connection, rows_of([(rid, cid, text)]))

    def keeps(self, tree: dict[str, Any]) -> bool:
        kept = kept_by(self.connection, 1, parse_filter(tree), fields=self.fields)
        rids = kept.of(np.array([7], dtype=np.int64)).tolist()
        assert rids in ([], [7])
        return bool(rids)

    def close(self) -> None:
        """Erasing the items must leave nothing in the index."""
        for rid, cid, text in self.connection.execute("SELECT rid, cid, metadata FROM items").fetchall():
            self.fields.erase(self.connection, rows_of([(rid, cid, text)]))
        assert self.connection.execute("SELECT count(*) FROM fields").fetchone() == (0,)
        self.connection.close()


def sql_matches(tree: dict[str, Any], metadata: dict[str, Any]) -> bool:
    asked = Asked(metadata)
    try:
        kept = asked.keeps(tree)
    finally:
        asked.close()
    assert one_by_one.matches(parse_filter(tree), json.loads(json.dumps(metadata))) == kept
    return kept


@settings(max_examples=400, deadline=None)
@given(tree=filters, metadata=metadata_objects)
def test_sql_means_what_the_reference_means(tree: dict[str, Any], metadata: dict[str, Any]) -> None:
    assert sql_matches(tree, metadata) == matches(tree, metadata)


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(KEYS), value=values.filter(lambda value: value is not None), operation=operations)
def test_sql_means_what_the_reference_means_on_fields_that_are_there(
    key: str, value: object, operation: tuple[str, object]
) -> None:
    tree = {"field": [key], operation[0]: operation[1]}
    assert sql_matches(tree, {key: value}) == matches(tree, {key: value})


long_texts = st.builds(lambda length, end: "t" * length + end, st.integers(MAX_TEXT - 2, MAX_TEXT + 2), texts)
bounds = st.tuples(st.sampled_from(["gt", "gte", "lt", "lte"]), st.integers(-2, 2) | texts | long_texts)


@settings(max_examples=300, deadline=None)
@given(pairs=st.lists(bounds, min_size=2, max_size=5), value=st.integers(-2, 2) | texts | long_texts)
def test_several_bounds_of_one_field_mean_what_each_means(
    pairs: list[tuple[str, object]], value: object
) -> None:
    tree = {"and": [{"field": "a", operator: operand} for operator, operand in pairs]}
    assert sql_matches(tree, {"a": value, "b": 0}) == matches(tree, {"a": value, "b": 0})


@pytest.mark.parametrize(
    ("tree", "metadata", "expected"),
    [
        pytest.param({"field": "a", "eq": 1}, {"a": True}, False, id="true is not 1"),
        pytest.param({"field": "a", "eq": True}, {"a": 1}, False, id="1 is not true"),
        pytest.param({"field": "a", "eq": 1}, {"a": 1.0}, True, id="1 is 1.0"),
        pytest.param({"field": "a", "eq": "1"}, {"a": 1}, False, id="text is not a number"),
        pytest.param({"field": "a", "ne": "x"}, {}, False, id="ne wants a value"),
        pytest.param({"not": {"field": "a", "eq": "x"}}, {}, True, id="not finds items without the field"),
        pytest.param({"field": "a", "exists": False}, {"a": None}, True, id="null is no value"),
        pytest.param({"field": "a", "ne": 1}, {"a": None}, False, id="null doesn't differ"),
        pytest.param({"field": "a", "gte": 2, "lt": 3}, {"a": 2}, True, id="a range, in"),
        pytest.param({"field": "a", "gte": 2, "lt": 3}, {"a": 3}, False, id="a range, out"),
        pytest.param({"field": "t", "gte": "2024-01-01"}, {"t": "2024-05-01"}, True, id="dates are texts"),
        pytest.param({"field": "a", "gt": "0"}, {"a": 1}, False, id="a number is not above a text"),
        pytest.param({"field": "a.b", "eq": 1}, {"a.b": 1}, False, id="dots go inside"),
        pytest.param({"field": ["a.b"], "eq": 1}, {"a.b": 1}, True, id="a list of keys may hold dots"),
        pytest.param({"field": "a", "in": []}, {"a": 1}, False, id="nothing is in nothing"),
        pytest.param({"field": "a", "contains": 1}, {"a": 1}, False, id="a scalar contains nothing"),
        pytest.param({"field": "a", "contains": 1}, {"a": [True]}, False, id="members have types, too"),
        pytest.param({"field": "a", "eq": 0.1}, {"a": 0.1}, True, id="a tenth is a tenth"),
    ],
)
def test_examples_of_the_documentation(
    tree: dict[str, Any], metadata: dict[str, Any], expected: bool
) -> None:
    assert sql_matches(tree, metadata) is expected
    assert matches(tree, metadata) is expected


@settings(max_examples=100, deadline=None)
@given(number=st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_equals_itself(number: float) -> None:
    assert sql_matches({"field": "a", "eq": number}, {"a": number})
    assert sql_matches({"field": "a", "in": [number]}, {"a": number})
    assert not sql_matches({"field": "a", "lt": number}, {"a": number})


def nested(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"field": "a", "eq": 1}
    for _ in range(depth):
        tree = {"not": tree}
    return tree


@pytest.mark.parametrize(
    ("tree", "path", "says"),
    [
        pytest.param([], "", "a list", id="a list"),
        pytest.param("a = 1", "", "a string", id="SQL"),
        pytest.param({}, "", "none", id="empty"),
        pytest.param({"and": [], "or": []}, "", '"and", "or"', id="two words"),
        pytest.param({"xor": []}, "", '"xor"', id="unknown word"),
        pytest.param({"and": []}, "/and", "at least one", id="and of nothing"),
        pytest.param({"or": {"field": "a", "eq": 1}}, "/or", "list", id="or of no list"),
        pytest.param({"and": [{"field": "a", "eq": 1}, 7]}, "/and/1", "a number", id="a term that is none"),
        pytest.param({"field": "a"}, "", "eq, ne", id="no operator"),
        pytest.param({"field": "a", "like": "b"}, "/like", "eq, ne", id="unknown operator"),
        pytest.param({"field": "a", "and": []}, "/and", "eq, ne", id="a word in a condition"),
        pytest.param({"field": 3, "eq": 1}, "/field", "path", id="a field that is a number"),
        pytest.param({"field": "", "eq": 1}, "/field", "not empty", id="an empty field"),
        pytest.param({"field": "a..b", "eq": 1}, "/field", "not empty", id="an empty key"),
        pytest.param({"field": [], "eq": 1}, "/field", "path", id="no keys"),
        pytest.param({"field": ["a", 1], "eq": 1}, "/field", "strings", id="a key that is a number"),
        pytest.param({"field": 'a"b', "eq": 1}, "/field", "quotes", id="a quote in a key"),
        pytest.param({"field": "a", "eq": None}, "/eq", "exists", id="null"),
        pytest.param({"field": "a", "eq": [1]}, "/eq", "a list", id="a list as a value"),
        pytest.param({"field": "a", "eq": {}}, "/eq", "an object", id="an object as a value"),
        pytest.param({"field": "a", "eq": 2**63}, "/eq", "64 bits", id="too large an integer"),
        pytest.param({"field": "a", "eq": float("nan")}, "/eq", "finite", id="NaN"),
        pytest.param({"field": "a", "eq": "\ud800"}, "/eq", "Unicode", id="half a surrogate pair"),
        pytest.param({"field": "a", "gt": True}, "/gt", "booleans", id="above true"),
        pytest.param({"field": "a", "in": "abc"}, "/in", "list", id="in a string"),
        pytest.param({"field": "a", "in": [1, None]}, "/in/1", "null", id="in with null"),
        pytest.param({"field": "a", "in": [1] * 1_001}, "/in", "1000", id="in too many"),
        pytest.param({"field": "a", "exists": 1}, "/exists", "true or false", id="exists 1"),
        pytest.param({"not": {"or": [{"field": "a", "x/y": 1}]}}, "/not/or/0/x~1y", "eq", id="deep, escaped"),
        pytest.param(nested(16), "/not" * 16, "deep", id="too deep"),
        pytest.param(
            {"or": [{"field": "a", "eq": i} for i in range(257)]}, "", "257", id="too many conditions"
        ),
    ],
)
def test_a_malformed_filter_is_refused_with_its_path(tree: object, path: str, says: str) -> None:
    with pytest.raises(InvalidFilter, match=says) as refused:
        parse_filter(tree)
    assert refused.value.path == path


def test_the_largest_filters_still_run() -> None:
    assert sql_matches(nested(15), {"a": 2})
    assert sql_matches({"or": [{"field": "a", "eq": i} for i in range(256)]}, {"a": 255})
    assert sql_matches({"field": "a", "in": [str(i) for i in range(1_000)]}, {"a": "999"})


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "exists"])
@pytest.mark.parametrize("length", [1, 10])
def test_nothing_that_a_user_wrote_is_in_the_sql(operator: str, length: int) -> None:
    written = "zebra'); DROP TABLE items; --" * length
    operand: Any = {"in": [written]}.get(operator, written)
    condition = parse_filter({"field": written, operator: operand})
    assert isinstance(condition, Condition)
    for part in ranges(condition):
        assert "zebra" not in part.clause
        assert part.clause.count("?") == len(part.parameters)


long_texts = st.builds(
    lambda letter, length, end: letter * length + end,
    st.sampled_from(["a", "ü", "\U0001f600"]),
    st.sampled_from([MAX_TEXT - 1, MAX_TEXT, MAX_TEXT + 1, 3 * MAX_TEXT]),
    st.sampled_from(["", "a", "b", "\n", '"\\']),
)


@settings(max_examples=300, deadline=None)
@given(
    value=long_texts,
    operand=long_texts,
    operator=st.sampled_from(["eq", "ne", "in", "gt", "gte", "lt", "lte", "contains"]),
)
def test_texts_longer_than_the_index_keeps_are_compared_whole(
    value: str, operand: str, operator: str
) -> None:
    tree = {"field": "a", operator: [operand, "x"] if operator == "in" else operand}
    metadata = {"a": [value, value, 1]} if operator == "contains" else {"a": value}
    assert sql_matches(tree, metadata) == matches(tree, metadata)


@settings(max_examples=300, deadline=None)
@given(
    value=near_integers,
    operand=near_integers,
    operator=st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]),
)
def test_numbers_are_compared_exactly_however_near(value: float, operand: float, operator: str) -> None:
    """2^53 + 1 is no double, and 0.1 + 0.2 isn't 0.3."""
    tree = {"field": "a", operator: operand}
    assert sql_matches(tree, {"a": value}) == matches(tree, {"a": value})
