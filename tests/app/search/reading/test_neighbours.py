import numpy as np

from app.search.reading.neighbours import Vectors, nearest_neighbours
from tests.app.search.planted import at_cosine, clusters, directions, ignore


def test_up_to_a_size_the_graph_is_the_matrix_product() -> None:
    vectors = directions(500, 24)
    graph = nearest_neighbours(Vectors(vectors), k=7, report=ignore)
    cosines = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1)[:, :7]
    np.testing.assert_array_equal(graph.rows, order)
    np.testing.assert_allclose(graph.scores, np.take_along_axis(cosines, order, axis=1), atol=1e-5)


def test_where_there_are_fewer_than_k_the_rest_is_empty() -> None:
    graph = nearest_neighbours(Vectors(directions(3, 8)), k=5, report=ignore)
    assert (graph.rows >= 0).sum(axis=1).tolist() == [2, 2, 2]
    assert np.isneginf(graph.scores[:, 2:]).all()
    alone = nearest_neighbours(Vectors(directions(1, 8)), k=5, report=ignore)
    assert (alone.rows == -1).all()
    assert nearest_neighbours(Vectors(directions(0, 8)), k=5, report=ignore).rows.shape == (0, 5)


def test_some_rows_of_an_array_are_a_graph_of_their_own() -> None:
    vectors = directions(100, 8)
    rows = np.arange(0, 100, 3)
    some = nearest_neighbours(Vectors(vectors, rows), k=4, report=ignore)
    copied = nearest_neighbours(Vectors(vectors[rows].copy()), k=4, report=ignore)
    np.testing.assert_array_equal(some.rows, copied.rows)


def test_above_that_size_near_ones_are_found_all_the_same() -> None:
    vectors, _ = clusters(40, each=100, dimensions=48, spread=0.6)
    # A tenth has a copy at 0.97, as resizing and compressing make them.
    copies = np.stack([at_cosine(vector, 0.97, seed=i) for i, vector in enumerate(vectors[::10])])
    vectors = np.concatenate([vectors, copies])
    exact = nearest_neighbours(Vectors(vectors), k=10, report=ignore)
    cells = nearest_neighbours(Vectors(vectors), k=10, report=ignore, exact_items=1_000)
    pairs = np.arange(4_000, 4_400)
    assert (cells.rows[pairs, 0] == np.arange(0, 4_000, 10)).mean() == 1.0
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact.rows, cells.rows, strict=True)])
    assert recall > 0.9
    # What is found has its true score.
    np.testing.assert_allclose(
        cells.scores[:, 0],
        (vectors * vectors[cells.rows[:, 0]]).sum(axis=1),
        atol=1e-5,
    )


def test_the_graph_is_the_same_every_time() -> None:
    vectors = directions(1_500, 16)
    first = nearest_neighbours(Vectors(vectors), k=5, report=ignore, exact_items=100)
    second = nearest_neighbours(Vectors(vectors), k=5, report=ignore, exact_items=100)
    np.testing.assert_array_equal(first.rows, second.rows)
    np.testing.assert_array_equal(first.scores, second.scores)
