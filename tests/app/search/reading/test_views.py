import numpy as np
import numpy.typing as npt

from app.search.reading.file import Array, Ids, Kept
from app.search.reading.jobs import Result
from app.search.reading.views import WHOLE_MAP, cluster_list, map_points


def result(**arrays: Array) -> Result:
    """Of items whose ids are "0", "1", … in one digit each."""
    count = max(len(array) for array in arrays.values())
    text = np.frombuffer("".join(str(i % 10) for i in range(count)).encode(), np.uint8)
    return Result(Kept({}, arrays), Ids(text, np.arange(1, count + 1)), 1, count, 0.0)


def mapped(xy: npt.NDArray[np.float64]) -> Result:
    marks = np.random.default_rng(0).integers(0, 2**63, len(xy)).astype(np.uint64)
    return result(xy=xy.astype(np.float32), marks=marks)


def test_a_box_has_the_items_in_it_bounds_included() -> None:
    xy = np.array([[-1, -1], [1, 1], [0, 0], [0.5, -0.25]])
    assert map_points(mapped(xy), box=WHOLE_MAP, limit=10).ids == ["0", "1", "2", "3"]
    some = map_points(mapped(xy), box=(0, -0.25, 1, 0), limit=10)
    assert (some.ids, some.rows.tolist(), some.in_box) == (["2", "3"], [2, 3], 2)
    np.testing.assert_array_equal(some.xy_N2, [[0, 0], [0.5, -0.25]])
    assert map_points(mapped(xy), box=(0.6, 0.6, 0.7, 0.7), limit=10).ids == []


def test_above_the_limit_the_same_are_drawn_and_going_nearer_loses_none() -> None:
    xy = np.random.default_rng(1).uniform(-1, 1, (1_000, 2))
    everything = mapped(xy)
    far = map_points(everything, box=WHOLE_MAP, limit=200)
    assert len(far.rows) == 200
    assert far.in_box == 1_000
    assert far.rows.tolist() == sorted(set(far.rows.tolist()))
    np.testing.assert_array_equal(map_points(everything, box=WHOLE_MAP, limit=200).rows, far.rows)
    assert set(far.rows.tolist()) > set(map_points(everything, box=WHOLE_MAP, limit=50).rows.tolist())
    near = map_points(everything, box=(0, 0, 1, 1), limit=200)
    in_both = {row for row in far.rows.tolist() if (xy[row] >= 0).all()}
    assert in_both <= set(near.rows.tolist())
    # All over the box, and not in one corner of it.
    assert abs(far.xy_N2.mean(axis=0)).max() < 0.15


def test_clusters_name_their_items() -> None:
    (first, second) = cluster_list(
        result(
            labels=np.array([0, 0, 0, 1], np.int32),
            sizes=np.array([3, 1], np.int32),
            cohesion=np.array([0.5, 1], np.float32),
            representatives=np.array([[2, 0, -1], [3, -1, -1]], np.int32),
            outliers=np.array([[1], [-1]], np.int32),
        )
    )
    assert (first.size, first.cohesion, first.representatives, first.outliers) == (3, 0.5, ["2", "0"], ["1"])
    assert (second.size, second.representatives, second.outliers) == (1, ["3"], [])
