"""The map and the clusters of a collection, as they are asked for: from arrays to ids.

Dimension key: N items, in order of id · C clusters · R representatives · O outliers
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from app.search.reading.jobs import Result

Box: TypeAlias = tuple[float, float, float, float]

WHOLE_MAP: Box = (-1.0, -1.0, 1.0, 1.0)


@dataclass(frozen=True)
class MapPoints:
    """A part of a map.

    Attributes:
        ids: Of items, in order.
        xy_N2: float32, their places.
        rows: int64 [N], which of the collection's items they are.
        in_box: How many there are, those that the limit left out included.
    """

    ids: list[str]
    xy_N2: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    in_box: int


@dataclass(frozen=True)
class Cluster:
    """A part of a collection.

    Attributes:
        size: Items in it.
        cohesion: Their mean cosine to the cluster's centroid.
        representatives: Ids near the centroid that are not alike; the first is the nearest.
        outliers: Ids of those farthest from the centroid, the farthest first.
    """

    size: int
    cohesion: float
    representatives: list[str]
    outliers: list[str]


def map_points(result: Result, *, box: Box, limit: int) -> MapPoints:
    """The items in a box.

    Above the limit some are drawn, the same in every call: who is drawn for a box is drawn for every smaller
    box that it is in, so a viewer that goes nearer sees more and loses none.

    Args:
        result: Of "map".
        box: Left, lower, right and upper bound, all included.
        limit: The most items.
    """
    xy_N2, marks = result.kept.arrays["xy"], result.kept.arrays["marks"]
    left, lower, right, upper = np.asarray(box, np.float32)
    x_N, y_N = xy_N2[:, 0], xy_N2[:, 1]
    rows = np.flatnonzero((x_N >= left) & (x_N <= right) & (y_N >= lower) & (y_N <= upper))
    in_box = len(rows)
    if in_box > limit:
        # A mark is a hash of the vector, so its order is as good as drawn by lot, and never changes.
        rows = np.sort(rows[np.argpartition(marks[rows], limit)[:limit]])
    return MapPoints(result.ids.take(rows), xy_N2[rows], rows, in_box)


def cluster_list(result: Result) -> list[Cluster]:
    """All clusters, the largest first.

    Args:
        result: Of "clusters".
    """
    arrays = result.kept.arrays
    return [
        Cluster(
            size=int(size),
            cohesion=float(cohesion),
            representatives=result.ids.take(representatives_R[representatives_R >= 0]),
            outliers=result.ids.take(outliers_O[outliers_O >= 0]),
        )
        for size, cohesion, representatives_R, outliers_O in zip(
            arrays["sizes"], arrays["cohesion"], arrays["representatives"], arrays["outliers"], strict=True
        )
    ]
