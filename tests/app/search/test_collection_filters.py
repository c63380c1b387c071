"""Filters mean the same on every engine: in searches, listings, counts and deletions."""

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.search.collection import Collection, Item
from tests.app.search.samples import MODEL, D, ids_found, vectors
from tests.app.search.test_filters import filters, matches, metadata_objects

WORDS = ["dog", "Dog", "", "dö", 'qu"ote', "back\\slash", "line\nbreak", "%", "a' or 'a' == 'a", "\U0001f431"]
NUMBERS: list[int | float] = [
    0, 1, -1, 1.5, -1.5, 0.1, 10, 9, 100, 1e-7, -1e-7, 1e300, -1e300, 5e-324,
    2**53, 2**53 + 1, float(2**53), 2**63 - 1, -(2**63),
]  # fmt: skip


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    objects=st.lists(metadata_objects, min_size=1, max_size=12),
    trees=st.lists(filters, min_size=1, max_size=6),
)
def test_every_filter_keeps_what_the_reference_keeps(
    pictures: Collection, objects: list[dict[str, Any]], trees: list[dict[str, Any]]
) -> None:
    pictures.delete([str(i) for i in range(12)])
    pictures.upsert(
        [
            Item(id=str(i), vector=vector, metadata=metadata)
            for i, (metadata, vector) in enumerate(zip(objects, vectors(len(objects)), strict=True))
        ],
        fingerprint=MODEL,
    )
    for tree in trees:
        kept = sorted(str(i) for i, metadata in enumerate(objects) if matches(tree, metadata))
        assert [item.id for item in pictures.scroll(cursor=None, limit=20, filter=tree).items] == kept
        assert pictures.count(tree) == len(kept)


def by_value(pictures: Collection, values: list[Any]) -> None:
    pictures.upsert(
        [
            Item(id=f"{i:02}", vector=np.ones(D, dtype=np.float32), metadata={"a": v})
            for i, v in enumerate(values)
        ],
        fingerprint=MODEL,
    )


def test_words_and_numbers_are_in_one_order_on_every_engine(pictures: Collection) -> None:
    values: list[Any] = [*WORDS, *NUMBERS, True, False, None, [], {}]
    by_value(pictures, values)
    for operand in [*WORDS, *NUMBERS]:
        for operator in ("eq", "ne", "gt", "gte", "lt", "lte"):
            tree: dict[str, Any] = {"field": "a", operator: operand}
            kept = [f"{i:02}" for i, value in enumerate(values) if matches(tree, {"a": value})]
            found = [item.id for item in pictures.scroll(cursor=None, limit=100, filter=tree).items]
            assert found == kept, tree


def test_the_largest_filters_are_answered(pictures: Collection) -> None:
    by_value(pictures, [*range(40), "999"])
    nested: dict[str, Any] = {"field": "a", "eq": 1}
    for _ in range(15):
        nested = {"not": nested}
    assert pictures.count(nested) == 40
    assert pictures.count({"or": [{"field": "a", "eq": i} for i in range(256)]}) == 40
    assert pictures.count({"field": "a", "in": [str(i) for i in range(1_000)]}) == 1
    assert pictures.count({"field": ["a"] * 16, "exists": True}) == 0


def test_what_a_search_finds_is_what_the_filter_keeps(pictures: Collection) -> None:
    batch = [
        Item(
            id=f"{i:03}",
            vector=vector,
            metadata={"kind": ["cat", "dog"][i % 2], "tags": [f"t{i % 7}"], "n": i},
        )
        for i, vector in enumerate(vectors(300))
    ]
    pictures.upsert(batch, fingerprint=MODEL)
    trees: list[dict[str, Any]] = [
        {"field": "kind", "eq": "dog"},
        {"field": "tags", "contains": "t3"},
        {"and": [{"field": "n", "gte": 10, "lt": 20}, {"not": {"field": "kind", "eq": "cat"}}]},
        {"field": "n", "eq": 7},
        {"not": {"field": "missing", "exists": True}},
    ]
    query = batch[0].vector
    (everything,) = pictures.search(query[None], k=300)
    for tree in trees:
        expected = [n.id for n in everything if matches(tree, n.metadata)]
        assert ids_found(pictures, query, k=300, filter=tree) == expected
        assert ids_found(pictures, query, k=300, filter=tree, exact=True) == expected
        assert ids_found(pictures, query, k=5, offset=2, filter=tree) == expected[2:7]
