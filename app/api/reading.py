"""`/collections/{name}/map`, `/duplicates` and `/clusters`: a collection as a whole.

They answer at once: 200 with the newest result, which may be stale, or 202 while the first is computed.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app.api import answers
from app.api.openapi import answer_of
from app.api.reading_schemas import (
    ClustersAnswer,
    ClustersParameters,
    ComputingAnswer,
    DuplicatesAnswer,
    DuplicatesParameters,
    MapAnswer,
    MapParameters,
)
from app.api.schemas import base64_of
from app.api.state import State, StateDep, in_worker
from app.search.reading.duplicate_groups import duplicate_page
from app.search.reading.jobs import Look, Result, Wanted
from app.search.reading.views import cluster_list, map_points

router = APIRouter(prefix="/collections/{name}", tags=["reading"])

_DIGITS = 6


@router.get(
    "/map",
    summary="See all items on a map",
    responses={
        200: answer_of(MapAnswer, answers.JSON, answers.MSGPACK),
        202: answer_of(ComputingAnswer, answers.JSON, answers.MSGPACK),
    },
)
async def read_map(
    request: Request, name: str, state: StateDep, parameters: Annotated[MapParameters, Query()]
) -> Response:
    """Places for the items in a square, so that those that look alike are near each other.

    The axes mean nothing, only what is near what. Items that are added later are placed among the others,
    which stay where they are, until the collection has grown by half: then the map is made anew.
    """

    def content(result: Result) -> dict[str, Any]:
        points = map_points(result, box=parameters.bounds, limit=parameters.limit)
        x, y = points.xy_N2[:, 0].copy(), points.xy_N2[:, 1].copy()
        as_text = parameters.encoding == "base64"
        return {
            "total": points.in_box,
            "ids": points.ids,
            "rows": points.rows.astype(np.int32),
            "x": base64_of(x) if as_text else x,
            "y": base64_of(y) if as_text else y,
        }

    return await _answer(request, state, name, Wanted(kind="map"), content)


@router.get(
    "/duplicates",
    summary="Find duplicates",
    responses={
        200: answer_of(DuplicatesAnswer, answers.JSON, answers.MSGPACK),
        202: answer_of(ComputingAnswer, answers.JSON, answers.MSGPACK),
    },
)
async def read_duplicates(
    request: Request, name: str, state: StateDep, parameters: Annotated[DuplicatesParameters, Query()]
) -> Response:
    """Groups of pictures that are the same, or nearly, the surest first.

    Each item is linked with those of its 16 nearest whose cosine reaches the threshold, and what hangs
    together by links is a group; so a group may be a chain, whose `min_score` is low. Another threshold is
    answered at once.
    """

    def content(result: Result) -> dict[str, Any]:
        page = duplicate_page(
            state["catalogue"].get(name),
            result,
            threshold=parameters.threshold,
            limit=parameters.limit,
            cursor=parameters.cursor,
        )
        return {
            "threshold": parameters.threshold,
            "total_groups": page.total_groups,
            "total_items": page.total_items,
            "data": [
                {
                    "size": group.size,
                    "ids": group.ids,
                    "scores": [round(score, _DIGITS) for score in group.scores],
                    "mean_score": round(group.mean_score, _DIGITS),
                    "min_score": round(group.min_score, _DIGITS),
                    "keep": group.keep,
                    "exact": group.is_exact,
                    "same_bytes": group.same_bytes,
                }
                for group in page.groups
            ],
            "next_cursor": page.next_cursor,
        }

    return await _answer(request, state, name, Wanted(kind="duplicates"), content)


@router.get(
    "/clusters",
    summary="See what a collection is made of",
    responses={
        200: answer_of(ClustersAnswer, answers.JSON, answers.MSGPACK),
        202: answer_of(ComputingAnswer, answers.JSON, answers.MSGPACK),
    },
)
async def read_clusters(
    request: Request, name: str, state: StateDep, parameters: Annotated[ClustersParameters, Query()]
) -> Response:
    """The collection in parts that look alike, the largest first, each with pictures that show what it is."""

    def content(result: Result) -> dict[str, Any]:
        data = [
            {
                "size": cluster.size,
                "cohesion": round(cluster.cohesion, _DIGITS),
                "representatives": cluster.representatives,
                "outliers": cluster.outliers,
            }
            for cluster in cluster_list(result)
        ]
        labels = {"labels": result.kept.arrays["labels"]} if parameters.labels else {}
        return {"data": data, **labels}

    return await _answer(request, state, name, Wanted(kind="clusters", clusters=parameters.k), content)


async def _answer(
    request: Request,
    state: State,
    name: str,
    wanted: Wanted,
    content: Callable[[Result], dict[str, Any]],
) -> Response:
    media_type = answers.negotiate(request, answers.JSON, answers.MSGPACK)

    def look() -> tuple[Look, dict[str, Any] | None]:
        found = state["reading"].look(name, wanted)
        return found, None if found.result is None else _described(found, found.result) | content(
            found.result
        )

    found, described = await in_worker(state, look)
    if described is None:
        waiting = {"collection": name, "state": "computing", "progress": _rounded(found.progress)}
        answer = answers.structured(waiting, media_type)
        answer.status_code = 202
    else:
        answer = answers.structured({"collection": name, **described}, media_type)
    if found.is_stale:
        answer.headers["Retry-After"] = str(math.ceil(found.retry_after_s))
    return answer


def _described(found: Look, result: Result) -> dict[str, Any]:
    return {
        "state": "ready",
        "stale": found.is_stale,
        "progress": _rounded(found.progress),
        "seq": result.seq,
        "items": result.items,
        "computed_at": result.computed_at,
    }


def _rounded(progress: float | None) -> float | None:
    return None if progress is None else round(progress, 3)
