from pathlib import Path

import numpy as np
import pytest

from app.search.collection import Vector
from app.search.reading import duplicates, neighbours
from app.search.reading.duplicates import LINKS_PER_ITEM, duplicate_links
from tests.app.search.planted import at_cosine, directions, ignore, spool_of


def links(
    tmp_path: Path, vectors: Vector, *, hashes: list[str] | None = None
) -> dict[tuple[int, int], float]:
    found = duplicate_links(spool_of(tmp_path, vectors, hashes=hashes), report=ignore)
    scores = found["link_scores"].tolist()
    assert scores == sorted(scores, reverse=True)
    pairs = [(min(a, b), max(a, b)) for a, b in found["link_rows"].tolist()]
    assert len(set(pairs)) == len(pairs)
    return dict(zip(pairs, scores, strict=True))


def test_planted_pairs_are_linked_and_strangers_are_not(tmp_path: Path) -> None:
    vectors = directions(200, 64)
    for i in range(0, 100, 2):
        vectors[i + 1] = at_cosine(vectors[i], 0.995, seed=i)
    found = links(tmp_path, vectors)
    assert {pair for pair, score in found.items() if score >= 0.99} == {(i, i + 1) for i in range(0, 100, 2)}
    assert all(abs(found[i, i + 1] - 0.995) < 1e-5 for i in range(0, 100, 2))


def test_equal_vectors_and_equal_bytes_have_a_score_of_one_and_no_others(tmp_path: Path) -> None:
    vectors = directions(7, 16)
    vectors[1] = vectors[0]  # an equal vector
    vectors[3] = at_cosine(vectors[2], 1 - 1e-9)  # as near as float32 gets, or the same
    hashes = ["", "", "aa" * 32, "bb" * 32, "cc" * 32, "cc" * 32, ""]  # 4 and 5: equal bytes, other vectors
    found = links(tmp_path, vectors, hashes=hashes)
    assert found[0, 1] == 1.0
    assert found[4, 5] == 1.0
    # They may have come out equal in float32; then they are equal.
    assert (found[2, 3] == 1.0) is bool((vectors[2] == vectors[3]).all())


def test_bytes_and_vectors_together_join_what_either_joins(tmp_path: Path) -> None:
    vectors = directions(4, 16)
    vectors[2] = vectors[1]
    hashes = ["aa" * 32, "aa" * 32, "bb" * 32, "bb" * 32]
    assert set(links(tmp_path, vectors, hashes=hashes)) == {(0, 1), (0, 2), (0, 3)}


def test_more_copies_than_links_of_an_item_are_one_group(tmp_path: Path) -> None:
    copies = 5 * LINKS_PER_ITEM
    vectors = np.concatenate([np.repeat(directions(1, 16), copies, axis=0), directions(20, 16, seed=1)])
    vectors[copies] = at_cosine(vectors[0], 0.99)
    found = links(tmp_path, vectors)
    assert sum(score == 1.0 for score in found.values()) == copies - 1
    # The copies take no room among the neighbours of the one that is only like them.
    assert found[0, copies] == pytest.approx(0.99, abs=1e-5)


def test_a_forest_joins_what_the_graph_joins_at_every_threshold(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    vectors = directions(30, 12)[rng.integers(0, 30, 400)] + 0.2 * directions(400, 12, seed=4)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    found = links(tmp_path, vectors)
    assert len(found) < 400
    graph = neighbours.nearest_neighbours(neighbours.Vectors(vectors), k=LINKS_PER_ITEM, report=ignore)
    edges = {
        (min(i, j), max(i, j)): float(score)
        for i in range(400)
        for j, score in zip(graph.rows[i].tolist(), graph.scores[i].tolist(), strict=True)
    }
    for threshold in (0.5, 0.8, 0.9, 0.95, 0.97, 0.99):
        assert components(found, threshold) == components(edges, threshold)


def components(edges: dict[tuple[int, int], float], threshold: float) -> set[frozenset[int]]:
    """The slow way: every item looks at every link until nothing changes."""
    groups = {i: {i} for pair in edges for i in pair}
    for (a, b), score in edges.items():
        if score >= threshold and groups[a] is not groups[b]:
            groups[a] |= groups[b]
            for member in groups[b]:
                groups[member] = groups[a]
    return {frozenset(group) for group in groups.values() if len(group) > 1}


@pytest.mark.parametrize("count", [0, 1, 2])
def test_hardly_anything_has_hardly_any_links(tmp_path: Path, count: int) -> None:
    assert links(tmp_path, directions(count, 512)) == {}


def test_all_items_identical_are_one_chain_of_copies(tmp_path: Path) -> None:
    found = links(tmp_path, np.repeat(directions(1, 8), 50, axis=0))
    assert set(found) == {(0, i) for i in range(1, 50)}
    assert set(found.values()) == {1.0}


def test_a_collection_above_the_exact_size_has_the_same_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = directions(3_000, 32)
    for i in range(0, 600, 3):
        vectors[i + 1] = at_cosine(vectors[i], 0.98, seed=i)
        vectors[i + 2] = at_cosine(vectors[i], 0.98, seed=i + 5_000)
    exact = {pair for pair, score in links(tmp_path, vectors).items() if score > 0.95}

    def by_cells(*arguments: object, **named: object) -> neighbours.Graph:
        return neighbours.nearest_neighbours(*arguments, **named, exact_items=500)  # type: ignore[arg-type]

    monkeypatch.setattr(duplicates, "nearest_neighbours", by_cells)
    assert {pair for pair, score in links(tmp_path, vectors).items() if score > 0.95} == exact
    assert len(exact) == 400
