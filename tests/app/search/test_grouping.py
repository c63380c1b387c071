"""Groups over a real collection, against a walk down its whole ranking."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import InvalidFilter, InvalidQuery
from app.search.collection import Collection, Item, Json, Neighbour
from app.search.embedded.library import Collections
from app.search.grouping import Group, Grouping, grouped
from app.search.ranking import Examples, Finder, Narrowing, Window, best_of, nearest_to
from tests.references import ranking_loops

D = 8
N = 3_000
EVERYTHING = Narrowing()


def album_of(number: int) -> Json:
    """One album has two items of three; the others are small, some are odd, and some items have none."""
    if number % 3:
        return "large"
    others: list[Json] = [number, None, True, 1, 1.0, "1", ["a"], {"b": 1}, "", f"album {number % 50}"]
    return others[number % 10]


@pytest.fixture(scope="module")
def items() -> dict[str, tuple[list[float], Json]]:
    rng = np.random.default_rng(3)
    # The large album lies around the first axis, so that a search there sees nothing else for long.
    rows = rng.normal(size=(N, D))
    rows[:, 0] += np.where(np.arange(N) % 3 > 0, 4, 0)
    return {
        f"p{number:04}": (row.astype(np.float32).tolist(), album_of(number))
        for number, row in enumerate(rows)
    }


@pytest.fixture(scope="module")
def pictures(
    items: dict[str, tuple[list[float], Json]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Collection]:
    with Collections.open(tmp_path_factory.mktemp("groups")) as collections:
        collection = collections.create("default", fingerprint="f", dimensions=D)
        collection.upsert(
            [
                Item(
                    id=item_id,
                    vector=np.array(vector, np.float32),
                    metadata={"photo": {"album": album}, "number": int(item_id[1:])},
                )
                for item_id, (vector, album) in items.items()
            ],
            fingerprint="f",
        )
        yield collection


ALONG_THE_AXIS = np.eye(D, dtype=np.float32)[0] + 0.01
ASKEW = np.linspace(-1, 1, D).astype(np.float32)


def members(groups: list[Group]) -> list[tuple[Any, list[str]]]:
    return [(group.value, [neighbour.id for neighbour in group.neighbours]) for group in groups]


class Counting:
    """A finder that counts how often it is asked."""

    def __init__(self, find: Finder) -> None:
        self.find = find
        self.calls = 0

    def __call__(self, window: Window, narrowing: Narrowing, *, with_vectors: bool) -> list[Neighbour]:
        self.calls += 1
        return self.find(window, narrowing, with_vectors=with_vectors)


@pytest.mark.parametrize("query", [ALONG_THE_AXIS, ASKEW], ids=["where one value is everywhere", "elsewhere"])
@pytest.mark.parametrize(
    ("k", "offset", "group_size"), [(1, 0, 1), (5, 0, 3), (4, 3, 2), (40, 0, 20), (1000, 0, 1), (1, 0, 1000)]
)
def test_groups_are_those_of_a_walk_down_the_whole_ranking(
    pictures: Collection,
    items: dict[str, tuple[list[float], Json]],
    query: np.ndarray[Any, np.dtype[np.float32]],
    k: int,
    offset: int,
    group_size: int,
) -> None:
    vectors = {item_id: vector for item_id, (vector, _) in items.items()}
    ranking = ranking_loops.ranking(vectors, lambda vector: ranking_loops.cosine(vector, query.tolist()))
    expected = ranking_loops.groups(
        ranking,
        {item_id: album for item_id, (_, album) in items.items()},
        k=k,
        offset=offset,
        group_size=group_size,
    )
    find = Counting(nearest_to(pictures, query))
    found = grouped(
        find,
        Grouping(field="photo.album", group_size=group_size),
        Window(k=k, offset=offset),
        EVERYTHING,
    )
    assert members(found) == expected
    assert [type(group.value) is bool for group in found] == [type(value) is bool for value, _ in expected]
    assert find.calls <= 12, "rounds must not walk through the large album"


def test_groups_of_one_in_a_field_of_unique_values_are_the_plain_search(pictures: Collection) -> None:
    (plain,) = pictures.search(ASKEW[None], k=30, offset=5)
    found = grouped(nearest_to(pictures, ASKEW), Grouping(field="number"), Window(k=30, offset=5), EVERYTHING)
    assert [group.neighbours for group in found] == [[neighbour] for neighbour in plain]
    assert [group.value for group in found] == [neighbour.metadata["number"] for neighbour in plain]


def test_groups_are_narrowed_before_they_are_made(
    pictures: Collection, items: dict[str, tuple[list[float], Json]]
) -> None:
    narrowing = Narrowing(
        threshold=0.0,
        max_score=0.6,
        filter={"field": "number", "lt": 2_000},
        exclude_ids=tuple(f"p{number:04}" for number in range(0, 3_000, 7)),
    )
    ranking = [
        (item_id, score)
        for item_id, score in ranking_loops.ranking(
            {item_id: vector for item_id, (vector, _) in items.items()},
            lambda vector: ranking_loops.cosine(vector, ASKEW.tolist()),
        )
        if 0 <= score <= 0.6 and int(item_id[1:]) < 2_000 and int(item_id[1:]) % 7
    ]
    expected = ranking_loops.groups(
        ranking, {item_id: album for item_id, (_, album) in items.items()}, k=20, offset=0, group_size=4
    )
    found = grouped(
        nearest_to(pictures, ASKEW), Grouping(field="photo.album", group_size=4), Window(k=20), narrowing
    )
    assert members(found) == expected


def test_likes_can_be_grouped(pictures: Collection) -> None:
    likes = Examples(vectors_ND=np.stack([ALONG_THE_AXIS, ASKEW]))
    dislikes = Examples(vectors_ND=-ASKEW[None])
    found = grouped(
        best_of(pictures, likes, dislikes),
        Grouping(field="photo.album", group_size=2),
        Window(k=4),
        EVERYTHING,
    )
    assert found[0].value == "large"
    assert [len(group.neighbours) for group in found] == [2] * 4
    best = [group.neighbours[0].score for group in found]
    assert best == sorted(best, reverse=True)


def test_a_path_may_be_keys_and_vectors_come_when_asked_for(pictures: Collection) -> None:
    grouping = Grouping(field=["photo", "album"])
    (group,) = grouped(
        nearest_to(pictures, ALONG_THE_AXIS), grouping, Window(k=1), EVERYTHING, with_vectors=True
    )
    assert group.value == "large"
    assert group.neighbours[0].vector is not None


@pytest.mark.parametrize("field", ["nobody.has.this", "photo", "number.album"])
def test_items_without_the_field_are_left_out(pictures: Collection, field: str) -> None:
    assert grouped(nearest_to(pictures, ASKEW), Grouping(field=field), Window(), EVERYTHING) == []


@pytest.mark.parametrize("field", ["", "a..b", [], [""], ['"'], ["a"] * 17])
def test_a_field_that_is_no_path_is_refused(field: str | list[str]) -> None:
    with pytest.raises(InvalidQuery, match="group_by"):
        Grouping(field=field)


@pytest.mark.parametrize("group_size", [0, -1, 1_001])
def test_a_size_that_no_group_has_is_refused(group_size: int) -> None:
    with pytest.raises(InvalidQuery, match="group_size"):
        Grouping(field="album", group_size=group_size)


def test_more_items_than_a_search_finds_are_refused(pictures: Collection) -> None:
    with pytest.raises(InvalidQuery, match="at most 1,000"):
        grouped(
            nearest_to(pictures, ASKEW), Grouping(field="number", group_size=11), Window(k=91), EVERYTHING
        )


def test_a_malformed_filter_is_refused_in_its_own_words_and_one_too_deep_for_ours_too(
    pictures: Collection,
) -> None:
    find, grouping = nearest_to(pictures, ASKEW), Grouping(field="photo.album")
    with pytest.raises(InvalidFilter) as refusal:
        grouped(find, grouping, Window(), Narrowing(filter={"and": [{"field": "a", "like": 1}]}))
    assert refusal.value.path == "/and/0/like"
    deep: dict[str, Json] = {"field": "number", "gte": 0}
    for _ in range(15):
        deep = {"and": [deep]}
    with pytest.raises(InvalidFilter, match="with group_by"):
        grouped(find, grouping, Window(k=100), Narrowing(filter=deep))


def test_numbers_that_an_engine_takes_for_one_end_the_search(tmp_path: Path) -> None:
    """Two numbers that differ in the 17th digit: filters may not tell them apart."""
    near, far = 0.1, 0.1 + 2**-56
    with Collections.open(tmp_path) as collections:
        collection = collections.create("c", fingerprint="f", dimensions=2)
        batch = [
            Item(
                id=f"{i:03}",
                vector=np.array([1, i / 1e3], np.float32),
                metadata={"a": near if i < 70 else far},
            )
            for i in range(140)
        ]
        collection.upsert(batch, fingerprint="f")
        query = np.array([1, 0], np.float32)
        for group_size in (1, 90):
            found = grouped(
                nearest_to(collection, query),
                Grouping(field="a", group_size=group_size),
                Window(k=2),
                EVERYTHING,
            )
            assert found[0].value == near
