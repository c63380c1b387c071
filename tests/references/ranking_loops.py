"""What likes, diversity and groups mean, item by item: slow, and as the papers and documentations say it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Numbers = Sequence[float]


def cosine(a: Numbers, b: Numbers) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def ranking(items: Mapping[str, Numbers], score: Callable[[Numbers], float]) -> list[tuple[str, float]]:
    """All items, best first; equal ones in order of id."""
    scored = [(item_id, score(vector)) for item_id, vector in items.items()]
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))


def average_query(
    likes: Sequence[tuple[Numbers, float]], dislikes: Sequence[tuple[Numbers, float]]
) -> list[float]:
    """Qdrant's average_vector: avg(positive) + avg(positive) - avg(negative)."""

    def average(examples: Sequence[tuple[Numbers, float]]) -> list[float]:
        dimensions = len(examples[0][0])
        total, weights = [0.0] * dimensions, 0.0
        for vector, weight in examples:
            length = math.sqrt(sum(x * x for x in vector))
            for axis in range(dimensions):
                total[axis] += weight * vector[axis] / length
            weights += weight
        return [x / weights for x in total]

    liked = average(likes)
    if not dislikes:
        return liked
    disliked = average(dislikes)
    return [p + (p - n) for p, n in zip(liked, disliked, strict=True)]


def best_score(
    items: Mapping[str, Numbers], likes: Sequence[Numbers], dislikes: Sequence[Numbers]
) -> list[tuple[str, float]]:
    """Items nearer to a like than to every dislike, by the nearest like."""
    kept = {}
    for item_id, vector in items.items():
        nearest_like = max(cosine(vector, like) for like in likes)
        nearest_dislike = max((cosine(vector, dislike) for dislike in dislikes), default=-math.inf)
        if nearest_like > nearest_dislike:
            kept[item_id] = vector
    return ranking(kept, lambda vector: max(cosine(vector, like) for like in likes))


def maximal_marginal_relevance(
    items: Mapping[str, Numbers], query: Numbers, *, count: int, diversity: float
) -> list[str]:
    """Carbonell & Goldstein 1998: Arg max over what is left of lambda Sim1 - (1 - lambda) max Sim2."""
    left = [item_id for item_id, _ in ranking(items, lambda vector: cosine(vector, query))]
    chosen = [left.pop(0)]
    while left and len(chosen) < count:
        best, best_worth = "", -math.inf
        for item_id in left:
            relevance = cosine(items[item_id], query)
            redundancy = max(cosine(items[item_id], items[other]) for other in chosen)
            worth = (1 - diversity) * relevance - diversity * redundancy
            if worth > best_worth:
                best, best_worth = item_id, worth
        chosen.append(best)
        left.remove(best)
    return chosen


def groups(
    ranked: Sequence[tuple[str, float]], values: Mapping[str, Any], *, k: int, offset: int, group_size: int
) -> list[tuple[Any, list[str]]]:
    """Walks down the whole ranking. 1 and 1.0 are one value, true and 1 are two."""
    found: list[tuple[Any, list[str]]] = []
    for item_id, _ in ranked:
        value = values.get(item_id)
        if not isinstance(value, str | bool | int | float):
            continue
        for other, members in found:
            if other == value and isinstance(other, bool) == isinstance(value, bool):
                if len(members) < group_size:
                    members.append(item_id)
                break
        else:
            found.append((value, [item_id]))
    return found[offset : offset + k]
