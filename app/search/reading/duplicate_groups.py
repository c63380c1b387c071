"""Groups of duplicates at a threshold, page by page, from the links that `duplicates` found.

What a page says of its groups is computed from the items as they are now: members that were deleted since are
left out, scores are of today's vectors, and a group with less than two members left is not told of.

Dimension key: M members · D embedding
"""

import base64
import bisect
import functools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from app.errors import InvalidQuery
from app.search.collection import Collection, Item, Json
from app.search.reading.jobs import Result

# Measured with models/default, whose embeddings are centred. Of 30 photographs, a JPEG of quality 30 stays at
# a cosine of 0.958 and more, a mirrored one at 0.93 (median 0.970), a crop of 10 % at 0.90 (0.959), a JPEG of
# quality 15 at 0.90 (0.944). Of 3,925 photographs without copies, 0.2 % have a neighbour at 0.95, 3 % at 0.9
# and 25 % at 0.8. A model whose embeddings lie closer together wants more: 0.99, say.
DEFAULT_THRESHOLD: Final = 0.95

MIN_THRESHOLD: Final = 0.5  # links below are not kept: half a cosine is a likeness, and no copy
MAX_LISTED: Final = 1_000  # of one group; `size` says how many there are
_MAX_LISTED_OF_PAGE: Final = 2_000
_ROUNDING: Final = 1e-5


@dataclass(frozen=True)
class DuplicateGroup:
    """Items that are the same picture, or nearly.

    Attributes:
        size: Members, also those above `MAX_LISTED` that aren't listed.
        ids: The most central first: by mean cosine to the others.
        scores: Of each, its cosine to the most central.
        mean_score: Of all pairs that are listed.
        min_score: Of all pairs that are listed; far below the threshold, it is a chain of likenesses.
        keep: The member to keep, if one: with the most pixels, where the metadata of all say `width` and
            `height`; otherwise, and of several, the most central.
        same_bytes: Ids of members whose images have equal bytes, in groups of two and more.
        is_exact: Whether all members have the same bytes.
    """

    size: int
    ids: list[str]
    scores: list[float]
    mean_score: float
    min_score: float
    keep: str
    same_bytes: list[list[str]]
    is_exact: bool


@dataclass(frozen=True)
class DuplicatePage:
    """Some groups, the surest first: a group is as sure as the weakest link that holds it together.

    Attributes:
        groups: In order.
        total_groups: On all pages.
        total_items: Members of all groups.
        next_cursor: Of the next page; None after the last.
    """

    groups: list[DuplicateGroup]
    total_groups: int
    total_items: int
    next_cursor: str | None


@dataclass(frozen=True)
class _Groups:
    """Rows of members, rising in each group, and each group's weakest link."""

    rows: list[list[int]]
    weakest: list[float]


def duplicate_page(
    collection: Collection, result: Result, *, threshold: float, limit: int, cursor: str | None
) -> DuplicatePage:
    """One page of groups.

    Args:
        collection: That the result is of.
        result: Of "duplicates".
        threshold: The least cosine of a link, from `MIN_THRESHOLD` to 1.
        limit: The most groups; a page of large ones has fewer.
        cursor: From the page before; it holds when the result was replaced since.

    Raises:
        InvalidQuery: The cursor is not one of ours.
    """
    groups = _groups(result, threshold)
    count = len(groups.rows)

    def place(index: int) -> tuple[float, int, bytes]:
        first_id = result.ids.take(groups.rows[index][:1])[0]
        return -groups.weakest[index], -len(groups.rows[index]), first_id.encode()

    start = 0 if cursor is None else bisect.bisect_right(range(count), _place_of_cursor(cursor), key=place)
    stop, listed = start, 0
    while stop < count and stop - start < limit and listed < _MAX_LISTED_OF_PAGE:
        listed += min(MAX_LISTED, len(groups.rows[stop]))
        stop += 1
    found = _described(collection, result, groups.rows[start:stop], threshold=threshold)
    return DuplicatePage(
        groups=found,
        total_groups=count,
        total_items=sum(map(len, groups.rows)),
        next_cursor=_cursor_of_place(place(stop - 1)) if start < stop < count else None,
    )


@functools.lru_cache(maxsize=2)
def _groups(result: Result, threshold: float) -> _Groups:
    """What hangs together by links of at least the threshold."""
    scores = result.kept.arrays["link_scores"]
    count = int(np.searchsorted(-scores, -np.float32(threshold), side="right"))
    parents: dict[int, int] = {}

    def root(row: int) -> int:
        while (above := parents.setdefault(row, row)) != row:
            parents[row] = row = parents[above]
        return row

    weakest: dict[int, float] = {}
    links = result.kept.arrays["link_rows"][:count].tolist()
    for (one, other), score in zip(links, scores[:count].tolist(), strict=True):
        low, high = sorted((root(one), root(other)))
        parents[high] = low
        weakest[low] = score  # links fall, so a group's last is its weakest
    members: defaultdict[int, list[int]] = defaultdict(list)
    for row in sorted(parents):
        members[root(row)].append(row)
    ordered = sorted(members, key=lambda first: (-weakest[first], -len(members[first]), first))
    return _Groups([members[first] for first in ordered], [weakest[first] for first in ordered])


def _described(
    collection: Collection, result: Result, groups: Sequence[list[int]], *, threshold: float
) -> list[DuplicateGroup]:
    ids = [result.ids.take(rows[:MAX_LISTED]) for rows in groups]
    items = _items(collection, [item_id for of_group in ids for item_id in of_group])
    described = []
    for rows, of_group in zip(groups, ids, strict=True):
        there = [item for item in (next(items) for _ in of_group) if item is not None]
        is_whole = len(rows) <= MAX_LISTED
        if is_whole:
            there = _still_linked(there, threshold=threshold)
        if len(there) >= 2:
            described.append(_group(there, size=len(there) if is_whole else len(rows)))
    return described


def _items(collection: Collection, ids: Sequence[str]) -> Iterator[Item | None]:
    for start in range(0, len(ids), MAX_LISTED):
        yield from collection.get(ids[start : start + MAX_LISTED])


def _still_linked(items: list[Item], *, threshold: float) -> list[Item]:
    """Without those that were replaced by another picture since."""
    if len(items) < 2:
        return []
    cosines_MM = _cosines(items)
    np.fill_diagonal(cosines_MM, -np.inf)
    nearest_M = cosines_MM.max(axis=1)
    hashes = [item.sha256 for item in items]
    return [
        item
        for item, nearest in zip(items, nearest_M.tolist(), strict=True)
        if nearest >= threshold - _ROUNDING or (item.sha256 and hashes.count(item.sha256) > 1)
    ]


def _group(items: list[Item], *, size: int) -> DuplicateGroup:
    cosines_MM = _cosines(items)
    count = len(items)
    centrality = (cosines_MM.sum(axis=1) - cosines_MM.diagonal()) / (count - 1)
    order = sorted(range(count), key=lambda i: (-round(float(centrality[i]), 6), items[i].id))
    above = cosines_MM[np.triu_indices(count, k=1)]
    by_bytes: defaultdict[str, list[str]] = defaultdict(list)
    for i in order:
        by_bytes[items[i].sha256].append(items[i].id)
    without_bytes = by_bytes.pop("", [])
    return DuplicateGroup(
        size=size,
        ids=[items[i].id for i in order],
        scores=[float(cosines_MM[order[0], i]) for i in order],
        mean_score=float(above.mean()),
        min_score=float(above.min()),
        keep=_to_keep([items[i] for i in order]),
        same_bytes=[ids for ids in by_bytes.values() if len(ids) > 1],
        is_exact=not without_bytes and len(by_bytes) == 1 and size == count,
    )


def _cosines(items: Sequence[Item]) -> npt.NDArray[np.float64]:
    vectors_MD = np.stack([item.vector for item in items]).astype(np.float64)
    vectors_MD /= np.linalg.norm(vectors_MD, axis=1, keepdims=True)
    return np.clip(vectors_MD @ vectors_MD.T, -1.0, 1.0)


def _to_keep(by_centrality: Sequence[Item]) -> str:
    pixels = [_pixels(item.metadata) for item in by_centrality]
    if None in pixels:
        return by_centrality[0].id
    most = max(pixel for pixel in pixels if pixel is not None)
    return by_centrality[pixels.index(most)].id


def _pixels(metadata: dict[str, Json]) -> float | None:
    width, height = metadata.get("width"), metadata.get("height")
    if isinstance(width, int | float) and isinstance(height, int | float):
        return float(width) * float(height)
    return None


def _cursor_of_place(place: tuple[float, int, bytes]) -> str:
    score, size, first_id = place
    return base64.urlsafe_b64encode(json.dumps([score, size, first_id.decode()]).encode()).decode("ascii")


def _place_of_cursor(cursor: str) -> tuple[float, int, bytes]:
    try:
        text = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
        score, size, first_id = json.loads(text)
        return float(score), int(size), str(first_id).encode()
    except (ValueError, TypeError, OverflowError):  # binascii.Error and the Unicode errors are ValueErrors
        raise InvalidQuery("the cursor is not one that a page gave; begin again without one") from None
