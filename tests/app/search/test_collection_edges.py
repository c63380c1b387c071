"""What every engine promises of odd but allowed items, names and questions, and of bad ones."""

from typing import Any

import numpy as np
import pytest

from app.errors import CollectionExists, InvalidItem, InvalidQuery, InvalidVector, UnknownCollection
from app.search.collection import GRACE_S, Catalogue, Collection, Item
from tests.app.search.samples import MODEL, D, ids_found, items, vectors

IDS = [
    " ",
    "%",
    "' or 1 == 1 or id == '",
    "..a",
    '"quoted"',
    "a/b/c",
    "a\\b",
    "album/0001",
    "https://host/a?b=c&d=%20#e",
    "x" * 256,
    "ä" * 128,
    "図書館/本",
    "\U0001f431",
]
DEEP: dict[str, Any] = {"level": 1}
for _ in range(8):
    DEEP = {"level": DEEP}
METADATA: list[dict[str, Any]] = [
    {},
    {"": ""},
    {"a.b": {"c": None}, 'quote"s': "back\\slash", "line": "one\ntwo\r\tthree", "emoji": "\U0001f431"},
    {"int": 2**63 - 1, "negative": -(2**63), "float": 0.1, "whole": 1.0, "tiny": 5e-324, "huge": 1.7e308},
    {"list": [1, "a", True, None, [2], {"b": [3]}], "empty": [], "object": {}, "no": False},
    {"text": "x" * 15_000},
]


def test_any_id_that_is_allowed_finds_its_item_again(pictures: Collection) -> None:
    batch = [
        Item(id=item_id, vector=vector, metadata={"n": n})
        for n, (item_id, vector) in enumerate(zip(IDS, vectors(len(IDS)), strict=True))
    ]
    assert pictures.upsert(batch, fingerprint=MODEL) == ["added"] * len(IDS)
    for item in batch:
        assert ids_found(pictures, item.vector, k=1) == [item.id]
        assert ids_found(pictures, item.vector, k=1, exclude_ids=[item.id]) != [item.id]
        (found,) = pictures.get([item.id])
        assert found is not None
        assert (found.id, found.metadata) == (item.id, item.metadata)
    seen: list[str] = []
    cursor = None
    while True:
        page = pictures.scroll(cursor=cursor, limit=1)
        seen += [item.id for item in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == sorted(IDS)
    assert pictures.delete(IDS) == len(IDS)
    assert pictures.undelete(IDS[::-1]) == len(IDS)
    assert pictures.count() == len(IDS)


def test_metadata_come_back_as_they_were_given(pictures: Collection) -> None:
    batch = [
        Item(id=str(i), vector=vector, metadata=metadata)
        for i, (metadata, vector) in enumerate(zip(METADATA, vectors(len(METADATA)), strict=True))
    ]
    pictures.upsert(batch, fingerprint=MODEL)
    for item, found in zip(batch, pictures.get([item.id for item in batch]), strict=True):
        assert found is not None
        assert found.metadata == item.metadata
        # 1 and 1.0 are equal in Python, and two things in JSON.
        assert repr(sorted(found.metadata.items())) == repr(sorted(item.metadata.items()))
    (neighbours,) = pictures.search(batch[3].vector[None], k=1)
    assert neighbours[0].metadata == METADATA[3]


@pytest.mark.parametrize("source", [None, "", "a b.jpg", "https://host/ä.jpg?x='\"\\"])
def test_a_source_is_kept_as_it_was_given(pictures: Collection, source: str | None) -> None:
    (vector,) = vectors(1)
    pictures.upsert([Item(id="a", vector=vector, metadata={}, source=source)], fingerprint=MODEL)
    (found,) = pictures.get(["a"])
    assert found is not None
    assert found.source == source


def test_an_empty_collection_answers_everything(pictures: Collection) -> None:
    assert pictures.upsert([], fingerprint=MODEL) == []
    assert pictures.search(vectors(2), k=3) == [[], []]
    assert pictures.search(vectors(1), k=3, exact=True, filter={"field": "a", "eq": 1}) == [[]]
    assert pictures.get(["a"]) == [None]
    assert pictures.get([]) == []
    assert pictures.scroll(cursor=None, limit=10).items == []
    assert (pictures.count(), pictures.delete(["a"]), pictures.undelete(["a"])) == (0, 0, 0)
    assert pictures.delete_where({"field": "a", "exists": False}) == 0
    assert pictures.stats().items == 0
    assert pictures.explain().items == 0


def test_a_query_may_be_of_any_length_and_type(pictures: Collection) -> None:
    batch = items(20)
    pictures.upsert(batch, fingerprint=MODEL)
    expected = ids_found(pictures, batch[0].vector)
    for query in (batch[0].vector * 1e-30, batch[0].vector.astype(np.float64) * 1e200):
        assert ids_found(pictures, query) == expected


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        pytest.param({"metadata": DEEP}, InvalidItem, id="deep JSON"),
        pytest.param({"metadata": {"a": float("nan")}}, InvalidItem, id="NaN in metadata"),
        pytest.param({"metadata": {"a": 2**63}}, InvalidItem, id="an integer of 65 bits"),
        pytest.param({"metadata": [1]}, InvalidItem, id="metadata that are a list"),
        pytest.param({"id": ""}, InvalidItem, id="no id"),
        pytest.param({"id": "a\nb"}, InvalidItem, id="a control character in an id"),
        pytest.param({"id": "a\ud800"}, InvalidItem, id="half a surrogate pair"),
        pytest.param({"source": "x" * 4_097}, InvalidItem, id="a long source"),
        pytest.param({"sha256": "abc"}, InvalidItem, id="a hash that is none"),
        pytest.param({"thumbnail": b""}, InvalidItem, id="an empty thumbnail"),
        pytest.param({"vector": np.array(["a"] * D)}, InvalidVector, id="a vector of words"),
        pytest.param({"vector": np.float32(1)}, InvalidVector, id="a number"),
    ],
)
def test_what_can_not_be_kept_is_refused(
    pictures: Collection, bad: dict[str, Any], error: type[Exception]
) -> None:
    (vector,) = vectors(1)
    with pytest.raises(error):
        pictures.upsert([Item(**({"id": "bad", "vector": vector, "metadata": {}} | bad))], fingerprint=MODEL)
    assert pictures.count() == 0


def test_names_differ_by_every_character(catalogue: Catalogue) -> None:
    names = ["a.b", "a-b", "a_b", "A.b", "a_2eb", "a__b", "0", "n" * 64]
    for number, name in enumerate(names):
        made = catalogue.create(name, fingerprint=f"model {number}/ä", dimensions=D + number)
        assert made.name == name
    assert [(c.name, c.fingerprint, c.dimensions) for c in catalogue.list()] == [
        (name, f"model {names.index(name)}/ä", D + names.index(name)) for name in sorted(names)
    ]
    catalogue.drop("a.b")
    assert catalogue.get("a-b").dimensions == D + 1
    with pytest.raises(UnknownCollection):
        catalogue.get("a.b")


@pytest.mark.parametrize("name", ["", "nowhere", "a/b", "ä", "x" * 10_000, "a\0", "\ud800"])
def test_a_name_that_leads_nowhere_is_unknown(catalogue: Catalogue, name: str) -> None:
    for call in (
        lambda: catalogue.get(name),
        lambda: catalogue.drop(name),
        lambda: catalogue.drop_alias(name),
        lambda: catalogue.begin_successor(name, fingerprint=MODEL, dimensions=D),
        lambda: catalogue.finish_successor(name),
        lambda: catalogue.cancel_successor(name),
    ):
        with pytest.raises(UnknownCollection):
            call()


def test_a_dropped_name_can_be_taken_by_another_model(catalogue: Catalogue, pictures: Collection) -> None:
    pictures.upsert(items(3), fingerprint=MODEL)
    catalogue.set_alias("current", "pictures")
    catalogue.drop("pictures")
    again = catalogue.create("pictures", fingerprint="another", dimensions=D + 2)
    assert (again.count(), again.dimensions) == (0, D + 2)
    assert catalogue.list()[0].aliases == ()
    catalogue.create("current", fingerprint=MODEL, dimensions=D)
    with pytest.raises(CollectionExists):
        catalogue.set_alias("current", "pictures")


def test_a_batch_of_questions_is_answered_in_order_with_filters_and_bounds(pictures: Collection) -> None:
    batch = items(60)
    pictures.upsert(batch, fingerprint=MODEL)
    queries = np.stack([item.vector for item in batch[:10]])
    even: dict[str, Any] = {"field": "even", "eq": True}
    together = pictures.search(queries, k=5, offset=1, filter=even, threshold=-0.5, with_vectors=True)
    for query, answer in zip(queries, together, strict=True):
        (alone,) = pictures.search(query[None], k=5, offset=1, filter=even, threshold=-0.5)
        assert [(n.id, n.score, n.metadata) for n in alone] == [(n.id, n.score, n.metadata) for n in answer]
        for neighbour in answer:
            assert neighbour.vector is not None
            assert float(np.linalg.norm(neighbour.vector)) == pytest.approx(1.0, abs=1e-6)


def test_many_ids_are_passed_over_at_once(pictures: Collection) -> None:
    batch = items(900)
    pictures.upsert(batch, fingerprint=MODEL)
    excluded = [item.id for item in batch[:890]]
    found = ids_found(pictures, batch[0].vector, k=20, exclude_ids=excluded)
    assert sorted(found) == [item.id for item in batch[890:]]


@pytest.mark.parametrize("limit", [-1, 10**9])
def test_a_limit_out_of_bounds_is_refused_with_a_filter_too(pictures: Collection, limit: int) -> None:
    with pytest.raises(InvalidQuery):
        pictures.scroll(cursor=None, limit=limit, filter={"field": "a", "eq": 1})


def test_the_grace_is_long_enough_to_notice_a_mistake() -> None:
    assert GRACE_S >= 24 * 3_600
