"""The nearest rows of a generation: scores that are exact, ties in order of id, and never too few.

A server answers with rough scores, in no order among equals, with as many rows as it was asked for or as its
index happens to reach. So more are asked for until nothing behind the last can belong to the answer; those
that may belong to it are scored again here, from their vectors; and where the index finds fewer than there
are, all are compared.

Vectors are read after the search: servers that shall send them with it read them afterwards, too, and fail
where somebody has written meanwhile. The rows' stamps tell whether both have seen one state. Where others
write faster than that, an answer is the search's own state with the search's own scores, to six digits.

Dimension key: Q queries · N rows · D embedding
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from app.search.bounds import Bounds
from app.search.collection import Vector
from app.search.milvus.rows import vector_of, vectors_of
from app.search.milvus.table import REQUEST_BYTES, WINDOW, Row, Table

ROUGH_ERROR = 2e-6  # of a server's scores; 1.8e-7 was measured, at 8 to 1,024 dimensions
_TRIES = 3
_ROUGH_DIGITS = 6
_ROW_BYTES = 4_096  # of an answer, without vectors

Scores: TypeAlias = npt.NDArray[np.float32]
RoughRow: TypeAlias = tuple[float, Row]


class _Changed(Exception):
    """Somebody wrote to the rows between the search and the reading of their vectors."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What belongs to an answer.

    Attributes:
        count: How many rows at most, at least 1.
        where: Which rows, as an expression.
        bounds: Of their scores.
    """

    count: int
    where: str
    bounds: Bounds

    def keeps(self, scores_N: Scores) -> npt.NDArray[np.bool_]:
        """Which scores are within the bounds."""
        return self.bounds.holding(scores_N)

    def least_rough(self, rough: Sequence[float]) -> float:
        """The least rough score, of these in falling order, that may belong to the answer."""
        least = -math.inf if self.bounds.least is None else self.bounds.least
        greatest = math.inf if self.bounds.greatest is None else self.bounds.greatest
        surely = [score for score in rough if least + ROUGH_ERROR <= score <= greatest - ROUGH_ERROR]
        if len(surely) >= self.count:
            return surely[self.count - 1] - 2 * ROUGH_ERROR
        return least - ROUGH_ERROR


@dataclass(frozen=True)
class Hit:
    """A row found, with its metadata; its vector where it was read."""

    score: float
    row: Row
    vector: Vector | None


def nearest(table: Table, queries_QD: Vector, wanted: Wanted) -> list[list[Hit]]:
    """For each query the nearest rows by the server's index, best first, equal scores in order of id."""
    for _ in range(_TRIES):
        try:
            return _nearest(table, queries_QD, wanted, by_vectors=True)
        except _Changed:
            continue
    return _nearest(table, queries_QD, wanted, by_vectors=False)


def _nearest(table: Table, queries_QD: Vector, wanted: Wanted, *, by_vectors: bool) -> list[list[Hit]]:
    candidates: dict[int, list[RoughRow]] = {}
    pending = list(range(len(queries_QD)))
    limit = wanted.count + 1  # one more shows that no tie is cut
    while pending and limit <= WINDOW:
        found = _search(table, queries_QD[pending], wanted.where, limit=limit)
        # What the index didn't reach is found by comparing all, not by asking for more.
        is_short = any(len(rows) < limit for rows in found)
        matched = _count(table, wanted.where, found=min(map(len, found))) if is_short else limit + 1
        for i, rows in zip(pending, found, strict=True):
            cut = wanted.least_rough([score for score, _ in rows])
            if len(rows) >= matched or (len(rows) == limit and rows[-1][0] < cut):
                candidates[i] = [row for row in rows if row[0] >= cut]
        pending = [i for i in pending if i not in candidates]
        limit = WINDOW + 1 if is_short else 4 * limit
    vectors = _vectors(table, candidates, wanted.where) if by_vectors else {}
    answers = {i: _hits(queries_QD[i], rows, wanted, vectors=vectors) for i, rows in candidates.items()}
    if pending:
        answers |= zip(pending, compare_all(table, queries_QD[pending], wanted), strict=True)
    return [answers[i] for i in range(len(queries_QD))]


def _search(table: Table, queries_QD: Vector, where: str, *, limit: int) -> list[list[RoughRow]]:
    """What the server finds, best first; some queries at a time, so that no answer is too large."""
    at_once = max(1, REQUEST_BYTES // (limit * _ROW_BYTES))
    found: list[list[RoughRow]] = []
    for start in range(0, len(queries_QD), at_once):
        some_QD = queries_QD[start : start + at_once]
        found += table.nearest(some_QD, where, ["metadata", "stamp"], limit=limit)
    return [sorted(rows, key=lambda row: -row[0]) for rows in found]


def _count(table: Table, where: str, *, found: int) -> int:
    """How many rows there are; asked again where more than were found."""
    # Before 2.5 a count beside a write may be too high, as it takes in replaced rows (milvus issue 38961).
    matched = table.count(where)
    return min(matched, table.count(where)) if matched > found else matched


def _vectors(table: Table, candidates: Mapping[int, Sequence[RoughRow]], where: str) -> dict[str, Vector]:
    """The vectors of candidates, by id.

    Raises:
        _Changed: They are not as the search saw them.
    """
    stamps = {row["id"]: row["stamp"] for rows in candidates.values() for _, row in rows}
    now = table.by_id(stamps, ["vector", "stamp"], where=where, waits=False)
    if any(item_id not in now or now[item_id]["stamp"] != stamp for item_id, stamp in stamps.items()):
        raise _Changed
    return {item_id: vector_of(row) for item_id, row in now.items()}


def _hits(
    query_D: Vector, rows: Sequence[RoughRow], wanted: Wanted, *, vectors: Mapping[str, Vector]
) -> list[Hit]:
    """The answer among candidates; by their rough scores where there are no vectors."""
    if vectors and rows:
        scores_N = cosines(query_D, np.stack([vectors[row["id"]] for _, row in rows]))
    else:
        rough = [round(score, _ROUGH_DIGITS) for score, _ in rows]
        scores_N = np.clip(rough, -1.0, 1.0).astype(np.float32)
    kept = np.flatnonzero(wanted.keeps(scores_N)).tolist()
    hits = [Hit(float(scores_N[i]), rows[i][1], vectors.get(rows[i][1]["id"])) for i in kept]
    return sorted(hits, key=lambda hit: (-hit.score, hit.row["id"]))[: wanted.count]


def compare_all(table: Table, queries_QD: Vector, wanted: Wanted) -> list[list[Hit]]:
    """For each query the nearest rows, found by reading all of them: exact, and as slow as that."""
    best = [_Best(query_D, wanted) for query_D in queries_QD]
    for ids, vectors_ND in _all_vectors(table, wanted.where):
        for one in best:
            one.add(ids, vectors_ND)
    # Read with their metadata, and scored again: somebody may have written meanwhile.
    winners = [one.winners() for one in best]
    rows = table.by_id(
        (item_id for ids in winners for item_id in ids), ["metadata", "vector"], where=wanted.where
    )
    vectors = {item_id: vector_of(row) for item_id, row in rows.items()}
    return [
        _hits(query_D, [(0.0, rows[item_id]) for item_id in ids if item_id in rows], wanted, vectors=vectors)
        for query_D, ids in zip(queries_QD, winners, strict=True)
    ]


def _all_vectors(table: Table, where: str) -> Iterator[tuple[list[str], Vector]]:
    at_once = table.rows_at_once(["vector"], most=WINDOW)
    for page in table.pages(where, ["vector"], rows_at_once=at_once):
        yield [row["id"] for row in page], vectors_of(page, dimensions=table.generation.dimensions)


class _Best:
    """The best rows of a query so far, with those that tie with the last."""

    def __init__(self, query_D: Vector, wanted: Wanted) -> None:
        self._query_D = query_D
        self._wanted = wanted
        self._ids: list[str] = []
        self._scores_N: Scores = np.empty(0, dtype=np.float32)

    def add(self, ids: Sequence[str], vectors_ND: Vector) -> None:
        scores_N = cosines(self._query_D, vectors_ND)
        kept = np.flatnonzero(self._wanted.keeps(scores_N))
        all_ids = [*self._ids, *(ids[i] for i in kept.tolist())]
        all_scores_N = np.concatenate([self._scores_N, scores_N[kept]])
        count = self._wanted.count
        if len(all_ids) > count:
            least = np.partition(all_scores_N, len(all_ids) - count)[len(all_ids) - count]
            best = np.flatnonzero(all_scores_N >= least)
            all_ids, all_scores_N = [all_ids[i] for i in best.tolist()], all_scores_N[best]
        self._ids, self._scores_N = all_ids, all_scores_N

    def winners(self) -> list[str]:
        pairs = zip(self._scores_N.tolist(), self._ids, strict=True)
        ordered = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
        return [item_id for _, item_id in ordered[: self._wanted.count]]


def cosines(query_D: Vector, vectors_ND: Vector) -> Scores:
    """Row by row in float64: one vector has one score, wherever it is, and itself has 1."""
    query = query_D.astype(np.float64)
    vectors = vectors_ND.astype(np.float64)
    products = (vectors * query).sum(axis=1)
    products /= np.linalg.norm(query) * np.sqrt((vectors * vectors).sum(axis=1))
    scores_N: Scores = np.clip(products, -1.0, 1.0).astype(np.float32)
    return scores_N
