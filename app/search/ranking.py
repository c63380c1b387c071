"""What is computed from candidates, and so is the same above every engine: likes and dislikes, and diversity.

The functions ask a collection for more than they answer with, and choose among it. Every score stays a
cosine. Groups, which are chosen in the same way, are in `app.search.grouping`.

How it goes together: `threshold`, `max_score`, `filter` and what is excluded say which items may be found at
all, before anything is chosen among them; `offset` then passes over the first of what was chosen, and `k`
says how many follow.

Dimension key: Q queries · P likes (positive) · M dislikes (minus) · N candidates · D embedding
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from app.errors import InvalidQuery, InvalidVector
from app.search.bounds import MAX_RESULTS, check_window
from app.search.collection import Collection, Json, Neighbour, Vector
from app.search.rows import unit_vectors

MAX_EXAMPLES = 64  # likes and dislikes of one query; 64 lists of 1,000 vectors of 384 are 98 MB
DIVERSE_CANDIDATES = 200
_QUERIES_WITH_VECTORS = 16  # at once: 16 lists of 1,000 vectors of 384 are 25 MB
_SPARE_CANDIDATES = 16  # beyond those asked for, as dislikes take some away
_DEEPER = 4  # times as deep, where that wasn't enough


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """Which items a search may find; each as `Collection.search` says."""

    threshold: float | None = None
    max_score: float | None = None
    filter: Mapping[str, Json] | None = None
    exclude_ids: tuple[str, ...] = ()
    exact: bool = False

    def without(self, ids: Sequence[str]) -> "Narrowing":
        """The same, but for some items more."""
        return replace(self, exclude_ids=(*self.exclude_ids, *ids)) if ids else self


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which part of the answer is wanted: `k` after passing over `offset`.

    Raises:
        InvalidQuery: It reaches beyond what a search finds.
    """

    k: int = 10
    offset: int = 0

    def __post_init__(self) -> None:
        check_window(k=self.k, offset=self.offset)

    @property
    def end(self) -> int:
        """How many are passed over or answered."""
        return self.offset + self.k


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Vectors that a query likes, or dislikes.

    Attributes:
        vectors_ND: Any float dtype, any length above 0; at least one like, dislikes may be none.
        weights_N: Above 0, of which only the ratios count; None for equal ones.
    """

    vectors_ND: npt.NDArray[np.floating]
    weights_N: npt.NDArray[np.floating] | None = None


class Finder(Protocol):
    """Finds the neighbours of one query."""

    def __call__(self, window: Window, narrowing: Narrowing, *, with_vectors: bool) -> list[Neighbour]:
        """Those of the window, best first, among the items that the narrowing lets through."""
        ...


def average_of(likes: Examples, dislikes: Examples, *, dimensions: int) -> Vector:
    """One query for many examples: as far beyond the likes as these are from the dislikes.

        mean(E) = sum of weight * vector / |vector|, over the sum of weights
        query   = mean(likes) + (mean(likes) - mean(dislikes)), or mean(likes) where there are no dislikes

    Its neighbours' scores are cosines to this query. A like of weight 2 counts as one given twice.

    Args:
        likes: At least one.
        dislikes: Any number.
        dimensions: D that all must have.

    Returns:
        float32 [D] of length 1.

    Raises:
        InvalidQuery: There is no like, there are too many examples, or a weight is not above 0.
        InvalidVector: An example is not [D], not finite, or zero; or all of them cancel out.

    Reference: Qdrant's strategy `average_vector`, https://qdrant.tech/documentation/concepts/explore/
    """
    _check_examples(likes, dislikes)
    mean_D = _weighted_mean(likes, dimensions=dimensions, what="like")
    if len(dislikes.vectors_ND):
        mean_D = 2 * mean_D - _weighted_mean(dislikes, dimensions=dimensions, what="dislike")
    # What is left of vectors that cancel out is rounding, of the size of float32's.
    length = float(np.linalg.norm(mean_D))
    if length < 1e-6:
        raise InvalidVector("the likes and dislikes cancel out: there is no direction left to search in")
    query_D: Vector = (mean_D / length).astype(np.float32)
    return query_D


def nearest_to(collection: Collection, query_D: npt.NDArray[np.floating]) -> Finder:
    """What finds the neighbours of one vector: the collection's own search."""

    def find(window: Window, narrowing: Narrowing, *, with_vectors: bool) -> list[Neighbour]:
        return _search(collection, query_D[None], window, narrowing, with_vectors=with_vectors)[0]

    return find


def best_of(collection: Collection, likes: Examples, dislikes: Examples) -> Finder:
    """What finds items near to any like, and nearer to it than to every dislike.

        for item in collection:
            nearest_like    = max over likes of cosine(item, like)
            nearest_dislike = max over dislikes of cosine(item, dislike), or -infinity without dislikes
            if nearest_like > nearest_dislike:
                answer item, score nearest_like

    So likes of two kinds find both kinds, where their average would find what lies between. The candidates
    are the nearest of each like, asked for again and deeper until nothing better can be missing; at most the
    1,000 nearest of each like are looked at, and fewer items than asked for may be left of them.

    Args:
        collection: Where to search.
        likes: At least one; weights have no meaning here.
        dislikes: Any number.

    Raises:
        InvalidQuery: There is no like, there are too many examples, or they have weights.
        InvalidVector: An example is not [D], not finite, or zero.

    Reference: Qdrant's strategy `best_score`, which orders these items in the same way, and has those nearer
        to a dislike after them: https://qdrant.tech/documentation/concepts/explore/
    """
    _check_examples(likes, dislikes)
    if likes.weights_N is not None or dislikes.weights_N is not None:
        raise InvalidQuery(
            "weights go with the strategy average: with best_score the nearest example alone decides"
        )
    dimensions = collection.dimensions
    likes_PD = unit_vectors(np.asarray(likes.vectors_ND), dimensions=dimensions, what="like")
    dislikes_MD = (
        unit_vectors(np.asarray(dislikes.vectors_ND), dimensions=dimensions, what="dislike")
        if len(dislikes.vectors_ND)
        else np.empty((0, dimensions), dtype=np.float32)
    )

    def find(window: Window, narrowing: Narrowing, *, with_vectors: bool) -> list[Neighbour]:
        needs_vectors = with_vectors or len(dislikes_MD) > 0 or narrowing.max_score is not None
        depth = min(window.end + _SPARE_CANDIDATES, MAX_RESULTS)
        while True:
            lists = _search(collection, likes_PD, Window(k=depth), narrowing, with_vectors=needs_vectors)
            # Whoever is in no list is at most this near to any like.
            unseen_score = max((found[-1].score for found in lists if len(found) == depth), default=-np.inf)
            kept = _nearer_to_likes(lists, likes_PD, dislikes_MD, max_score=narrowing.max_score)
            enough = sum(found.score > unseen_score for found in kept) >= window.end
            if enough or depth == MAX_RESULTS or unseen_score == -np.inf:
                known = [found for found in kept if found.score >= unseen_score]
                return known[window.offset : window.end]
            depth = min(_DEEPER * depth, MAX_RESULTS)

    return find


def ranked(
    find: Finder, window: Window, narrowing: Narrowing, *, diversity: float, with_vectors: bool = False
) -> list[Neighbour]:
    """The neighbours of one query, diversified where that is asked for; see `diversified`.

    Raises:
        InvalidQuery: `diversity` is not in [0, 1]; and what the finder raises.
    """
    check_diversity(diversity)
    if diversity == 0:
        return find(window, narrowing, with_vectors=with_vectors)
    candidates = find(_diverse_window(window), narrowing, with_vectors=True)
    return diversified(candidates, count=window.end, diversity=diversity)[window.offset :]


def ranked_each(
    collection: Collection,
    vectors_QD: npt.NDArray[np.floating],
    window: Window,
    narrowing: Narrowing,
    *,
    own_ids: Sequence[str] = (),
    diversity: float = 0.0,
    with_vectors: bool = False,
) -> list[list[Neighbour]]:
    """The neighbours of several queries, each as if it were asked alone.

    Args:
        collection: Where to search.
        vectors_QD: Any float dtype, any length above 0.
        window: The same for all.
        narrowing: The same for all.
        own_ids: The item that each query is, which shall not be its own neighbour, but may be another's; or
            none at all.
        diversity: As in `diversified`.
        with_vectors: Whether neighbours carry their vectors.

    Raises:
        InvalidQuery: `diversity` is not in [0, 1]; and what `Collection.search` raises.
    """
    check_diversity(diversity)
    at_once = _QUERIES_WITH_VECTORS if diversity or with_vectors else max(len(vectors_QD), 1)
    wanted = _diverse_window(window) if diversity else window
    if own_ids and wanted.end == MAX_RESULTS:
        at_once = 1  # there is no room for the item itself beside its neighbours
    answers: list[list[Neighbour]] = []
    for start in range(0, len(vectors_QD), at_once):
        found = _search_block(
            collection,
            vectors_QD[start : start + at_once],
            wanted,
            narrowing,
            own_ids=own_ids[start : start + at_once],
            with_vectors=with_vectors or diversity > 0,
        )
        if diversity:
            found = [
                diversified(one, count=window.end, diversity=diversity)[window.offset :] for one in found
            ]
        answers += found
    return answers


def diversified(candidates: Sequence[Neighbour], *, count: int, diversity: float) -> list[Neighbour]:
    """Maximal marginal relevance: near to the query, and unlike what was chosen before.

        chosen = [the best candidate]
        while len(chosen) < count and candidates are left:
            choose the candidate c with the greatest
                (1 - diversity) * score(c) - diversity * (max over s in chosen of cosine(c, s))

    Of equal ones the better candidate is chosen. With a diversity of 0 the order stays as it is; of 1, only
    the first has to do with the query. What threshold, range or filter leave out is no candidate, so it isn't
    chosen for its difference either.

    Args:
        candidates: Best first, with vectors.
        count: How many to choose.
        diversity: 0 to 1.

    Returns:
        The chosen ones in the order of choice; their scores are what they were.

    Reference: Carbonell & Goldstein 1998, "The use of MMR, diversity-based reranking for reordering documents
        and producing summaries"; lambda is 1 - diversity.
    """
    if not candidates:
        return []
    scores_N = np.array([candidate.score for candidate in candidates])
    vectors_ND = np.stack([_vector_of(candidate) for candidate in candidates])
    nearest_chosen_N = np.full(len(candidates), -np.inf)
    left_N = np.ones(len(candidates), dtype=np.bool_)
    chosen = [0]
    while len(chosen) < min(count, len(candidates)):
        newest = chosen[-1]
        left_N[newest] = False
        np.maximum(nearest_chosen_N, vectors_ND @ vectors_ND[newest], out=nearest_chosen_N)
        worth_N = (1 - diversity) * scores_N - diversity * nearest_chosen_N
        chosen.append(int(np.argmax(np.where(left_N, worth_N, -np.inf))))
    return [candidates[i] for i in chosen]


def check_diversity(diversity: float) -> None:
    """Refuses what is no share.

    Raises:
        InvalidQuery: It is not in [0, 1].
    """
    if not 0 <= diversity <= 1:
        raise InvalidQuery(
            f"diversity is {diversity}; it must be 0 (the nearest) to 1 (the most different), say 0.3"
        )


def _diverse_window(window: Window) -> Window:
    return Window(k=max(DIVERSE_CANDIDATES, window.end))


def _search(
    collection: Collection,
    vectors_QD: npt.NDArray[np.floating],
    window: Window,
    narrowing: Narrowing,
    *,
    with_vectors: bool,
) -> list[list[Neighbour]]:
    return collection.search(
        vectors_QD,
        k=window.k,
        offset=window.offset,
        threshold=narrowing.threshold,
        max_score=narrowing.max_score,
        filter=narrowing.filter,
        exclude_ids=narrowing.exclude_ids,
        exact=narrowing.exact,
        with_vectors=with_vectors,
    )


def _search_block(
    collection: Collection,
    vectors_QD: npt.NDArray[np.floating],
    window: Window,
    narrowing: Narrowing,
    *,
    own_ids: Sequence[str],
    with_vectors: bool,
) -> list[list[Neighbour]]:
    """Some queries in one search. One alone leaves its item out there; several find theirs, and drop it."""
    if len(own_ids) <= 1:
        narrowing = narrowing.without(own_ids)
        return _search(collection, vectors_QD, window, narrowing, with_vectors=with_vectors)
    wider = Window(k=window.end + 1)
    lists = _search(collection, vectors_QD, wider, narrowing, with_vectors=with_vectors)
    return [
        [neighbour for neighbour in found if neighbour.id != own][window.offset : window.end]
        for found, own in zip(lists, own_ids, strict=True)
    ]


def _nearer_to_likes(
    lists: Sequence[Sequence[Neighbour]], likes_PD: Vector, dislikes_MD: Vector, *, max_score: float | None
) -> list[Neighbour]:
    """Everybody in the lists once, by the nearest like, best first, without those nearer to a dislike."""
    best: dict[str, Neighbour] = {}
    for found in lists:
        for neighbour in found:
            if neighbour.id not in best or neighbour.score > best[neighbour.id].score:
                best[neighbour.id] = neighbour
    kept = sorted(best.values(), key=lambda neighbour: (-neighbour.score, neighbour.id))
    if kept and max_score is not None:
        # Too near to one like, an item is missing in this like's list, and may still be in another's.
        nearest_N = _nearest_cosines(kept, likes_PD)
        kept = [one for one, nearest in zip(kept, nearest_N, strict=True) if nearest <= np.float32(max_score)]
    if kept and len(dislikes_MD):
        nearest_N = _nearest_cosines(kept, dislikes_MD)
        kept = [one for one, nearest in zip(kept, nearest_N, strict=True) if one.score > nearest]
    return kept


def _nearest_cosines(neighbours: Sequence[Neighbour], examples_ED: Vector) -> npt.NDArray[np.float32]:
    # In float64 and rounded once, as engines do: the same pair has the same cosine wherever it is computed.
    vectors_ND = np.stack([_vector_of(neighbour) for neighbour in neighbours]).astype(np.float64)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    examples = examples_ED.astype(np.float64)
    examples /= np.linalg.norm(examples, axis=1, keepdims=True)
    nearest_N: npt.NDArray[np.float32] = (vectors_ND @ examples.T).max(axis=1).astype(np.float32)
    return nearest_N


def _vector_of(neighbour: Neighbour) -> Vector:
    assert neighbour.vector is not None, "the search was asked for vectors and gave none: this is a bug"
    return neighbour.vector


def _weighted_mean(examples: Examples, *, dimensions: int, what: str) -> npt.NDArray[np.float64]:
    units_ND = unit_vectors(np.asarray(examples.vectors_ND), dimensions=dimensions, what=what)
    weights_N = (
        np.ones(len(units_ND)) if examples.weights_N is None else np.asarray(examples.weights_N, np.float64)
    )
    if len(weights_N) != len(units_ND) or not (np.isfinite(weights_N) & (weights_N > 0)).all():
        raise InvalidQuery(f"each {what} has a weight above 0; to like less, give it a smaller one")
    # By the largest first, so that no sum is infinite.
    weights_N = weights_N / weights_N.max()
    mean_D: npt.NDArray[np.float64] = (weights_N @ units_ND.astype(np.float64)) / weights_N.sum()
    return mean_D


def _check_examples(likes: Examples, dislikes: Examples) -> None:
    if not len(likes.vectors_ND):
        raise InvalidQuery("dislikes alone say nothing of what is wanted: give at least one like, `positive`")
    examples = len(likes.vectors_ND) + len(dislikes.vectors_ND)
    if examples > MAX_EXAMPLES:
        raise InvalidQuery(f"there are {examples} likes and dislikes; at most {MAX_EXAMPLES} may be")
