"""Likes, dislikes and diversity over a real collection, against plain loops over all its items."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from app.errors import InvalidFilter, InvalidQuery, InvalidVector
from app.search.collection import Collection, Item, Neighbour
from app.search.embedded.library import Collections
from app.search.ranking import (
    Examples,
    Narrowing,
    Window,
    average_of,
    best_of,
    diversified,
    nearest_to,
    ranked,
    ranked_each,
)
from tests.references import ranking_loops

D = 12
N = 600
Rows = npt.NDArray[np.float32]


def clustered(count: int, *, seed: int) -> Rows:
    """Points around a few centres, so that neighbours are alike and diversity has something to do."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(8, D))
    points = centres[rng.integers(0, 8, count)] + 0.4 * rng.normal(size=(count, D))
    return points.astype(np.float32)


@pytest.fixture(scope="module")
def items() -> dict[str, list[float]]:
    return {f"p{number:03}": row.tolist() for number, row in enumerate(clustered(N, seed=0))}


@pytest.fixture(scope="module")
def pictures(items: dict[str, list[float]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    with Collections.open(tmp_path_factory.mktemp("ranking")) as collections:
        collection = collections.create("default", fingerprint="f", dimensions=D)
        collection.upsert(
            [
                Item(id=item_id, vector=np.array(vector, np.float32), metadata={"half": int(item_id[1:]) % 2})
                for item_id, vector in items.items()
            ],
            fingerprint="f",
        )
        yield collection


QUERIES = clustered(8, seed=1)
EVERYTHING = Narrowing()
NOBODY = Examples(vectors_ND=np.empty((0, D), np.float32))


def examples(*rows: Rows, weights: list[float] | None = None) -> Examples:
    return Examples(
        vectors_ND=np.stack(rows), weights_N=None if weights is None else np.array(weights, np.float64)
    )


def ids(neighbours: list[Neighbour]) -> list[str]:
    return [neighbour.id for neighbour in neighbours]


def scores(neighbours: list[Neighbour]) -> list[float]:
    return [neighbour.score for neighbour in neighbours]


def found_by_average(
    collection: Collection, likes: Examples, dislikes: Examples = NOBODY, *, k: int = 10
) -> list[Neighbour]:
    find = nearest_to(collection, average_of(likes, dislikes, dimensions=D))
    return ranked(find, Window(k=k), EVERYTHING, diversity=0)


def test_the_average_finds_what_qdrants_formula_finds_item_by_item(
    pictures: Collection, items: dict[str, list[float]]
) -> None:
    likes, dislikes = [(QUERIES[0], 1.0), (QUERIES[1], 2.5)], [(QUERIES[2], 0.5), (QUERIES[3], 1.0)]
    query = ranking_loops.average_query(
        [(row.tolist(), weight) for row, weight in likes],
        [(row.tolist(), weight) for row, weight in dislikes],
    )
    expected = ranking_loops.ranking(items, lambda vector: ranking_loops.cosine(vector, query))[:20]
    found = found_by_average(
        pictures,
        examples(*(row for row, _ in likes), weights=[1.0, 2.5]),
        examples(*(row for row, _ in dislikes), weights=[0.5, 1.0]),
        k=20,
    )
    assert ids(found) == [item_id for item_id, _ in expected]
    # Vectors are kept in float32.
    np.testing.assert_allclose(scores(found), [score for _, score in expected], atol=2e-6)


def test_one_like_is_a_plain_search_with_either_strategy(pictures: Collection) -> None:
    (plain,) = pictures.search(QUERIES[:1], k=10)
    assert ids(found_by_average(pictures, examples(QUERIES[0]))) == ids(plain)
    best = best_of(pictures, examples(QUERIES[0]), NOBODY)
    assert best(Window(k=10), EVERYTHING, with_vectors=False) == plain
    assert best(Window(k=4, offset=3), EVERYTHING, with_vectors=False) == plain[3:7]


@pytest.mark.parametrize(
    ("likes", "dislikes"),
    [
        pytest.param([1, 0, 2], [4, 3], id="another order"),
        pytest.param([0, 0, 1, 1, 2, 2], [3, 4], id="each like twice"),
    ],
)
def test_order_and_number_of_the_same_examples_make_no_difference(
    pictures: Collection, likes: list[int], dislikes: list[int]
) -> None:
    reference = examples(*QUERIES[[0, 1, 2]]), examples(*QUERIES[[3, 4]])
    other = examples(*QUERIES[likes]), examples(*QUERIES[dislikes])
    assert ids(found_by_average(pictures, *reference)) == ids(found_by_average(pictures, *other))
    first, second = (
        best_of(pictures, *pair)(Window(), EVERYTHING, with_vectors=False) for pair in (reference, other)
    )
    assert (ids(first), scores(first)) == (ids(second), scores(second))


@pytest.mark.parametrize("factor", [1e-300, 0.1, 7.0, 1e300])
def test_of_weights_only_the_ratios_count_and_of_vectors_only_the_directions(factor: float) -> None:
    weights = [1.0, 2.0, 4.0]
    reference = average_of(examples(*QUERIES[:3], weights=weights), examples(QUERIES[3]), dimensions=D)
    scaled = average_of(
        examples(*QUERIES[:3], weights=[factor * weight for weight in weights]),
        examples(QUERIES[3] * np.float32(min(max(factor, 1e-10), 1e10))),
        dimensions=D,
    )
    np.testing.assert_allclose(scaled, reference, atol=1e-7)


def test_a_like_of_weight_two_counts_as_one_given_twice() -> None:
    twice = average_of(examples(QUERIES[0], QUERIES[0], QUERIES[1]), NOBODY, dimensions=D)
    weighted = average_of(examples(QUERIES[0], QUERIES[1], weights=[2, 1]), NOBODY, dimensions=D)
    np.testing.assert_allclose(weighted, twice, atol=1e-7)


def test_two_likes_at_right_angles_are_searched_at_their_bisector_and_a_dislike_reflects_it() -> None:
    east, north = np.eye(2, dtype=np.float32)
    half = math.sqrt(0.5)
    nobody = Examples(vectors_ND=np.empty((0, 2)))
    np.testing.assert_allclose(
        average_of(examples(east, north), nobody, dimensions=2), [half, half], atol=1e-7
    )
    # 2 * east - north
    away = average_of(examples(east), examples(north), dimensions=2)
    np.testing.assert_allclose(away, np.array([2, -1]) / math.sqrt(5), atol=1e-7)


@pytest.mark.parametrize("dislikes", [[], [4], [3, 4, 5]])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_best_score_answers_what_a_walk_over_all_items_answers(
    pictures: Collection, items: dict[str, list[float]], dislikes: list[int], k: int
) -> None:
    expected = ranking_loops.best_score(items, QUERIES[:3].tolist(), QUERIES[dislikes].tolist())[:k]
    disliked = Examples(vectors_ND=QUERIES[dislikes])
    found = best_of(pictures, examples(*QUERIES[:3]), disliked)(Window(k=k), EVERYTHING, with_vectors=False)
    assert ids(found) == [item_id for item_id, _ in expected]
    np.testing.assert_allclose(scores(found), [score for _, score in expected], atol=2e-6)


def test_best_score_goes_deeper_until_dislikes_leave_enough(tmp_path: Path) -> None:
    """300 items lie between like and dislike, on the dislike's side; those of the like's side are farther."""

    def at(degrees: float, tilt: float = 0.0) -> Rows:
        angle = math.radians(degrees)
        return np.array([math.cos(angle), math.sin(angle), tilt], np.float32)

    with Collections.open(tmp_path) as collections:
        collection = collections.create("c", fingerprint="f", dimensions=3)
        near = [Item(id=f"near{i:03}", vector=at(11 + i / 300), metadata={}) for i in range(300)]
        far = [Item(id=f"far{i}", vector=at(-20 - i), metadata={}) for i in range(5)]
        collection.upsert([*near, *far], fingerprint="f")
        find = best_of(collection, examples(at(0)), examples(at(20)))
        assert ids(find(Window(k=5), EVERYTHING, with_vectors=False)) == [f"far{i}" for i in range(5)]


def test_likes_of_two_kinds_find_both_where_their_average_finds_what_lies_between(tmp_path: Path) -> None:
    east, north, between = (
        np.eye(3, dtype=np.float32)[0],
        np.eye(3, dtype=np.float32)[1],
        np.array([1, 1, 0.1]),
    )
    with Collections.open(tmp_path) as collections:
        collection = collections.create("c", fingerprint="f", dimensions=3)
        rows = {"east": east + [0, 0, 0.1], "north": north + [0, 0, 0.1], "between": between}
        collection.upsert(
            [Item(id=name, vector=np.asarray(row, np.float32), metadata={}) for name, row in rows.items()],
            fingerprint="f",
        )
        likes = examples(east, north)
        find = best_of(collection, likes, Examples(vectors_ND=np.empty((0, 3))))
        assert ids(find(Window(k=2), EVERYTHING, with_vectors=False)) == ["east", "north"]
        middle = nearest_to(
            collection, average_of(likes, Examples(vectors_ND=np.empty((0, 3))), dimensions=3)
        )
        assert ids(middle(Window(k=1), EVERYTHING, with_vectors=False)) == ["between"]


@pytest.mark.parametrize(
    "narrowing",
    [
        pytest.param(Narrowing(threshold=0.6), id="threshold"),
        pytest.param(Narrowing(max_score=0.7), id="max_score"),
        pytest.param(Narrowing(threshold=0.2, max_score=0.6), id="range"),
        pytest.param(Narrowing(filter={"field": "half", "eq": 1}), id="filter"),
        pytest.param(Narrowing(exclude_ids=tuple(f"p{n:03}" for n in range(0, 600, 3))), id="excluded"),
        pytest.param(Narrowing(exact=True), id="exact"),
    ],
)
def test_best_score_is_narrowed_before_anything_is_chosen(
    pictures: Collection, items: dict[str, list[float]], narrowing: Narrowing
) -> None:
    def lets_through(item_id: str, score: float) -> bool:
        return (
            (narrowing.threshold is None or score >= narrowing.threshold)
            and (narrowing.max_score is None or score <= narrowing.max_score)
            and (narrowing.filter is None or int(item_id[1:]) % 2 == 1)
            and item_id not in narrowing.exclude_ids
        )

    every = ranking_loops.best_score(items, QUERIES[:3].tolist(), QUERIES[4:6].tolist())
    expected = [item_id for item_id, score in every if lets_through(item_id, score)]
    find = best_of(pictures, examples(*QUERIES[:3]), examples(*QUERIES[4:6]))
    assert expected
    assert ids(find(Window(k=15, offset=2), narrowing, with_vectors=False)) == expected[2:17]


@pytest.mark.parametrize("diversity", [0.1, 0.5, 0.9, 1.0])
def test_diversity_chooses_what_the_papers_loop_chooses(
    pictures: Collection, items: dict[str, list[float]], diversity: float
) -> None:
    query = QUERIES[0].tolist()
    nearest = ranking_loops.ranking(items, lambda vector: ranking_loops.cosine(vector, query))[:200]
    expected = ranking_loops.maximal_marginal_relevance(
        {item_id: items[item_id] for item_id, _ in nearest}, query, count=12, diversity=diversity
    )
    find = nearest_to(pictures, QUERIES[0])
    assert ids(ranked(find, Window(k=12), EVERYTHING, diversity=diversity)) == expected
    assert ids(ranked(find, Window(k=7, offset=5), EVERYTHING, diversity=diversity)) == expected[5:]


def test_no_diversity_is_the_plain_search(pictures: Collection) -> None:
    (plain,) = pictures.search(QUERIES[:1], k=300)
    assert ranked(nearest_to(pictures, QUERIES[0]), Window(k=300), EVERYTHING, diversity=0) == plain
    with_vectors = pictures.search(QUERIES[:1], k=300, with_vectors=True)[0]
    assert diversified(with_vectors, count=300, diversity=0.0) == with_vectors


def test_more_than_two_hundred_can_be_diversified(pictures: Collection) -> None:
    found = ranked(nearest_to(pictures, QUERIES[0]), Window(k=450), EVERYTHING, diversity=0.3)
    assert len(set(ids(found))) == 450


def test_of_copies_diversity_shows_one_first(tmp_path: Path) -> None:
    east, north = np.eye(2, dtype=np.float32)
    with Collections.open(tmp_path) as collections:
        collection = collections.create("c", fingerprint="f", dimensions=2)
        copies = [Item(id=f"copy{i}", vector=east, metadata={}) for i in range(5)]
        other = Item(id="other", vector=east + north, metadata={})
        collection.upsert([*copies, other], fingerprint="f")
        found = ranked(nearest_to(collection, east), Window(k=3), EVERYTHING, diversity=0.6)
        assert ids(found) == ["copy0", "other", "copy1"]


def test_a_threshold_leaves_out_before_diversity_chooses(pictures: Collection) -> None:
    narrowing = Narrowing(threshold=0.7)
    found = ranked(nearest_to(pictures, QUERIES[0]), Window(k=20), narrowing, diversity=1.0)
    assert min(scores(found)) >= 0.7


@pytest.mark.parametrize("diversity", [0.0, 0.4])
@pytest.mark.parametrize("window", [Window(k=5), Window(k=5, offset=3), Window(k=1000)])
def test_a_batch_of_items_answers_as_each_alone(
    pictures: Collection, diversity: float, window: Window
) -> None:
    own_ids = [f"p{number:03}" for number in (5, 6, 5, 77)]
    rows = np.stack([item.vector for item in pictures.get(own_ids) if item is not None])
    batch = ranked_each(pictures, rows, window, EVERYTHING, own_ids=own_ids, diversity=diversity)
    alone = [
        ranked(nearest_to(pictures, row), window, EVERYTHING.without([own]), diversity=diversity)
        for row, own in zip(rows, own_ids, strict=True)
    ]
    assert [ids(one) for one in batch] == [ids(one) for one in alone]
    assert all(own not in ids(one) for own, one in zip(own_ids, batch, strict=True))
    if window.k == 1000:
        assert "p006" in ids(batch[0])  # a neighbour's query is still a neighbour


def test_a_batch_of_vectors_may_be_longer_than_a_block(pictures: Collection) -> None:
    rows = clustered(40, seed=5)
    found = ranked_each(pictures, rows, Window(k=3), EVERYTHING, with_vectors=True)
    assert [ids(one) for one in found] == [ids(one) for one in pictures.search(rows, k=3)]
    assert all(one[0].vector is not None for one in found)
    assert ranked_each(pictures, np.empty((0, D)), Window(k=3), EVERYTHING) == []


@pytest.mark.parametrize(
    ("likes", "dislikes", "error"),
    [
        pytest.param(NOBODY, examples(QUERIES[0]), InvalidQuery, id="only dislikes"),
        pytest.param(
            examples(*QUERIES, *QUERIES, *clustered(49, seed=2)), NOBODY, InvalidQuery, id="too many"
        ),
        pytest.param(examples(QUERIES[0]), examples(2 * QUERIES[0]), None, id="a dislike of the like"),
        pytest.param(examples(QUERIES[0], -QUERIES[0]), NOBODY, InvalidVector, id="likes that cancel out"),
        pytest.param(examples(QUERIES[0], weights=[0.0]), NOBODY, InvalidQuery, id="a weight of 0"),
        pytest.param(examples(QUERIES[0], weights=[-1.0]), NOBODY, InvalidQuery, id="a weight below 0"),
        pytest.param(examples(QUERIES[0], weights=[math.nan]), NOBODY, InvalidQuery, id="a weight of NaN"),
        pytest.param(examples(QUERIES[0], weights=[1.0, 2.0]), NOBODY, InvalidQuery, id="two weights of one"),
        pytest.param(examples(QUERIES[0] * 0), NOBODY, InvalidVector, id="a like of no direction"),
        pytest.param(examples(QUERIES[0] * np.nan), NOBODY, InvalidVector, id="a like of NaN"),
        pytest.param(examples(QUERIES[0][:5]), NOBODY, InvalidVector, id="a like of other dimensions"),
        pytest.param(examples(QUERIES[0]), examples(QUERIES[0] * 0), InvalidVector, id="a zero dislike"),
    ],
)
def test_examples_that_mean_nothing_are_refused(
    likes: Examples, dislikes: Examples, error: type[Exception] | None
) -> None:
    if error is None:  # the like, moved away from itself, stays where it is
        np.testing.assert_allclose(
            average_of(likes, dislikes, dimensions=D), QUERIES[0] / np.linalg.norm(QUERIES[0]), atol=1e-6
        )
        return
    with pytest.raises(error):
        average_of(likes, dislikes, dimensions=D)


def test_best_score_refuses_weights_and_what_no_query_can_be(pictures: Collection) -> None:
    with pytest.raises(InvalidQuery, match="strategy average"):
        best_of(pictures, examples(QUERIES[0], weights=[2.0]), NOBODY)
    with pytest.raises(InvalidQuery, match="at least one like"):
        best_of(pictures, NOBODY, examples(QUERIES[0]))
    with pytest.raises(InvalidVector, match="like 0"):
        best_of(pictures, examples(QUERIES[0] * 0), NOBODY)
    with pytest.raises(InvalidVector, match="dislike 0"):
        best_of(pictures, examples(QUERIES[0]), examples(QUERIES[0] * 0))


@pytest.mark.parametrize(
    "window", [{"k": 0}, {"k": -1}, {"k": 1, "offset": -1}, {"k": 1_000_000}, {"k": 500, "offset": 501}]
)
def test_a_window_beyond_what_a_search_finds_is_refused(window: dict[str, int]) -> None:
    with pytest.raises(InvalidQuery, match="at most 1,000"):
        Window(**window)


@pytest.mark.parametrize("diversity", [-0.1, 1.1, math.nan, math.inf])
def test_a_diversity_that_is_no_share_is_refused(pictures: Collection, diversity: float) -> None:
    with pytest.raises(InvalidQuery, match="0 .* to 1"):
        ranked(nearest_to(pictures, QUERIES[0]), Window(), EVERYTHING, diversity=diversity)
    with pytest.raises(InvalidQuery, match="0 .* to 1"):
        ranked_each(pictures, QUERIES, Window(), EVERYTHING, diversity=diversity)


@pytest.mark.parametrize(
    ("narrowing", "error"),
    [
        pytest.param({"filter": {"field": "half"}}, InvalidFilter, id="filter"),
        pytest.param({"threshold": 0.5, "max_score": 0.4}, InvalidQuery, id="an empty range"),
        pytest.param({"threshold": 2.0}, InvalidQuery, id="no cosine"),
    ],
)
def test_what_the_engine_refuses_is_refused_here_too(
    pictures: Collection, narrowing: dict[str, Any], error: type[Exception]
) -> None:
    finders = [
        nearest_to(pictures, QUERIES[0]),
        best_of(pictures, examples(QUERIES[0]), examples(QUERIES[1])),
    ]
    for find in finders:
        for diversity in (0.0, 0.5):
            with pytest.raises(error):
                ranked(find, Window(), Narrowing(**narrowing), diversity=diversity)


def test_nothing_is_found_in_nothing(tmp_path: Path) -> None:
    with Collections.open(tmp_path) as collections:
        empty = collections.create("c", fingerprint="f", dimensions=D)
        for diversity in (0.0, 0.5):
            assert ranked(nearest_to(empty, QUERIES[0]), Window(), EVERYTHING, diversity=diversity) == []
            find = best_of(empty, examples(*QUERIES[:2]), examples(*QUERIES[2:4]))
            assert ranked(find, Window(), EVERYTHING, diversity=diversity) == []
