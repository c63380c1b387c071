"""`POST /similar`: the nearest items of a collection, by image, item, embedding, or by likes and dislikes.

Dimension key: Q queries · D embedding
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from app.api import answers
from app.api.body import SentImage, Upload, fetched, images_from_json, read_upload
from app.api.embed import check_failures, embed_images, failure_answer, model_answer, on_error
from app.api.openapi import answer_of, body_of, example
from app.api.refusals import InvalidParameter, NoImages
from app.api.schemas import parse
from app.api.similar_schemas import Example, SentVectors, SimilarAnswer, SimilarParameters
from app.api.state import State, StateDep, collection_and_model, in_worker, timed, while_connected
from app.errors import FingerprintMismatch, InvalidQuery, InvalidVector, TooLarge, UnknownItem
from app.fetching import ImageAddress
from app.inference.results import ImageEmbedding, ImageFailure
from app.search.collection import Collection, Neighbour
from app.search.grouping import Grouping, grouped
from app.search.ranking import (
    Examples,
    Finder,
    Narrowing,
    Window,
    average_of,
    best_of,
    nearest_to,
    ranked,
    ranked_each,
)
from app.served_models import ServedModel

router = APIRouter(tags=["search"])

MAX_FOUND: Final = 25_600  # 256 queries of 100 neighbours; with metadata of 300 bytes, 9 MB of JSON
_OTHER_VALUES: Final = 16_384  # of a JSON body beside embeddings: ids, a filter's values, images

Row = NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class _Question:
    """What a request asks, checked; nothing was embedded or searched yet.

    Attributes:
        images: To embed: the queries themselves, or those among the examples, in order.
        rows_QD: The embeddings to search by; None where there are none.
    """

    upload: Upload
    parameters: SimilarParameters
    collection: Collection
    model: ServedModel
    window: Window
    narrowing: Narrowing
    grouping: Grouping | None
    images: list[SentImage | ImageAddress]
    rows_QD: Row | None


@dataclass(kw_only=True)
class _Queries:
    """What is searched by.

    Attributes:
        rows: One embedding for each query that can be asked.
        own_ids: The item that each of them is; empty where they are none.
        places: Where each stands among the request's queries.
        failed: The answers of those that can't be asked.
    """

    rows: list[Row] = field(default_factory=list)
    own_ids: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


@router.post(
    "/similar",
    summary="Find similar pictures",
    responses={200: answer_of(SimilarAnswer, answers.JSON, answers.MSGPACK)},
    openapi_extra=body_of(SimilarParameters)
    | example(
        "curl -F images=@cat.jpg '{origin}/similar?k=5'",
        """curl {origin}/similar --json '{"id": "cats/1.jpg", "filter": {"field": "album", "eq": "sea"}}'""",
        """curl {origin}/similar --json '{"positive": ["cats/1.jpg"], "negative": ["dogs/1.jpg"]}'""",
        """curl {origin}/similar --json '{"id": ["cats/1.jpg", "cats/2.jpg"], "diversify": 0.3}'""",
        """curl {origin}/similar --json '{"id": "cats/1.jpg", "group_by": "album", "group_size": 3}'""",
    ),
)
async def similar(request: Request, state: StateDep) -> Response:
    """Finds the nearest items to images, to items by `id`, to an `embedding`, or to likes and dislikes.

    A score is the cosine similarity: 1 is the same direction, 0 is unrelated. Each image, id and embedding of
    a request has its neighbours or its own error, best first; equal scores are in order of id. `threshold`,
    `max_score`, `filter` and `exclude` say what may be found at all; `offset` and `k` count what was chosen
    among it. `diversify` and `group_by` don't go together. With `group_by`, an answer has `groups` in place
    of `neighbours`.
    """
    media_type = answers.negotiate(request, answers.JSON, answers.MSGPACK)
    largest = max(model.info.dimensions for model in state["models"].all())
    max_values = state["settings"].max_client_batch_size * (largest + 2) + _OTHER_VALUES
    with timed(state, "receive"):
        upload = await read_upload(request, state, max_values=max_values)
    said = request.headers.get("x-fingerprint")

    def begin() -> _Question | Response:
        question = _question(state, upload, header_fingerprint=said)
        return question if question.images else _answer(state, question, [], media_type)

    # One visit to a worker answers a query without images: each costs a tenth of a millisecond and more.
    begun = await in_worker(state, begin)
    if isinstance(begun, Response):
        return begun
    results = await while_connected(request, _embed(state, begun))
    return await in_worker(state, _answer, state, begun, results, media_type)


def _question(state: State, upload: Upload, *, header_fingerprint: str | None) -> _Question:
    parameters = parse(SimilarParameters, upload.parameters)
    _require_one_query(upload, parameters)
    _refuse_contradictions(parameters)
    collection, model = collection_and_model(state, parameters.collection, model=parameters.model)
    _check_fingerprint(collection, parameters.fingerprint, header_fingerprint)
    window = Window(k=parameters.k, offset=parameters.offset)
    grouping = None
    if parameters.group_by is not None:
        grouping = Grouping(field=parameters.group_by, group_size=parameters.group_size or 1)
    max_queries = state["settings"].max_client_batch_size
    rows_QD = None
    if parameters.embedding is not None:
        rows_QD = parameters.embedding.rows(collection.dimensions, at_most=max_queries, name="embedding")
    question = _Question(
        upload=upload,
        parameters=parameters,
        collection=collection,
        model=model,
        window=window,
        narrowing=Narrowing(
            threshold=parameters.threshold,
            max_score=parameters.max_score,
            filter=parameters.filter,
            exclude_ids=tuple(parameters.exclude),
            exact=parameters.exact,
        ),
        grouping=grouping,
        images=[*upload.images] or _images_of_examples(parameters),
        rows_QD=rows_QD,
    )
    _check_amounts(question, max_queries=max_queries)
    return question


def _require_one_query(upload: Upload, parameters: SimilarParameters) -> None:
    given = [
        name
        for name, is_there in (
            ("images", bool(upload.images)),
            ("id", parameters.id is not None and parameters.id != []),
            ("embedding", parameters.embedding is not None),
            ("positive", bool(parameters.positive)),
        )
        if is_there
    ]
    if not given and parameters.negative:
        raise InvalidQuery("dislikes alone say nothing of what is wanted: give at least one like, `positive`")
    if not given:
        raise NoImages(
            "there is nothing to search by: send images, or `id`, or `embedding`, or likes as `positive`"
        )
    if len(given) > 1:
        raise InvalidParameter(
            f"give one of images, id, embedding and positive, not {' and '.join(given)}", parameter=given[1]
        )


def _refuse_contradictions(parameters: SimilarParameters) -> None:
    for without, named in (
        (parameters.group_by is None and parameters.group_size is not None, "group_size without group_by"),
        (parameters.group_by is not None and parameters.diversify > 0, "group_by and diversify together"),
        (not parameters.positive and bool(parameters.negative), "negative without positive"),
        (not parameters.positive and parameters.strategy != "average", "strategy without positive"),
    ):
        if without:
            raise InvalidQuery(f"{named} has no meaning: leave one out, or give the other")


def _check_fingerprint(collection: Collection, *said: str | None) -> None:
    for fingerprint in said:
        if fingerprint is not None and fingerprint != collection.fingerprint:
            raise FingerprintMismatch(
                f"the query's embeddings are of the model {fingerprint[:100]}, and the collection "
                f"{collection.name!r} holds those of {collection.fingerprint}: embed the query with that "
                "model, or search another collection",
                expected=collection.fingerprint,
                found=fingerprint,
            )


def _check_amounts(question: _Question, *, max_queries: int) -> None:
    asked = question.parameters.id
    queries = len(asked) if isinstance(asked, list) else 1
    if question.parameters.positive == []:
        queries = max(queries, len(question.images), 0 if question.rows_QD is None else len(question.rows_QD))
    if queries > max_queries:
        raise TooLarge(
            f"the request has {queries} queries, at most {max_queries} are taken: send fewer at once",
            limit=max_queries,
            actual=queries,
        )
    found = queries * question.window.k * (question.grouping.group_size if question.grouping else 1)
    if found > MAX_FOUND:
        raise TooLarge(
            f"the request asks for {found:,} neighbours in all, at most {MAX_FOUND:,} are given: ask for a "
            "smaller k, or send fewer queries at once",
            limit=MAX_FOUND,
            actual=found,
        )


def _images_of_examples(parameters: SimilarParameters) -> list[SentImage | ImageAddress]:
    sent = []
    for name, given in (("positive", parameters.positive), ("negative", parameters.negative)):
        texts = [example.image for example in given if example.image is not None]
        sent += images_from_json(texts, pointer=f"/{name}")
    return sent


async def _embed(state: State, question: _Question) -> list[ImageEmbedding | ImageFailure]:
    parameters = question.parameters
    with timed(state, "embed"):
        results = await embed_images(
            state,
            question.model.engine,
            await fetched(state, question.images),
            timeout_s=parameters.timeout,
            priority=parameters.priority,
        )
    # An example that can't be seen would change what the others mean: then there is no answer.
    check_failures(results, "fail" if parameters.positive else on_error(parameters.on_error, question.upload))
    return results


def _answer(
    state: State,
    question: _Question,
    embedded: Sequence[ImageEmbedding | ImageFailure],
    media_type: str,
) -> Response:
    """Searches, and says what was found; blocks."""
    collection, parameters = question.collection, question.parameters
    began_s = time.perf_counter()
    with timed(state, "search"):
        if parameters.positive:
            data = [{"index": 0} | _found_by_examples(question, embedded)]
        else:
            data = _found_by_queries(question, _queries(question, embedded))
    took_ms = (time.perf_counter() - began_s) * 1000
    content: dict[str, Any] = {
        "model": model_answer(question.model.info),
        "collection": {
            "name": collection.name,
            "fingerprint": collection.fingerprint,
            "items": collection.count(),
            "metric": "cosine",
        },
        "data": data,
    }
    if parameters.explain:
        content["explain"] = _explained(question) | {"took_ms": round(took_ms, 3)}
    return answers.structured(content, media_type)


def _queries(question: _Question, embedded: Sequence[ImageEmbedding | ImageFailure]) -> _Queries:
    parameters, queries = question.parameters, _Queries()
    if question.rows_QD is not None:
        queries.rows = list(question.rows_QD)
        queries.places = list(range(len(queries.rows)))
    elif parameters.id is not None:
        _add_items(queries, question, parameters.id)
    for place, result in enumerate(embedded):
        if isinstance(result, ImageFailure):
            queries.failed.append(failure_answer(place, result))
        else:
            queries.rows.append(result.embedding)
            queries.places.append(place)
    return queries


def _add_items(queries: _Queries, question: _Question, asked: str | list[str]) -> None:
    """An unknown id alone is the request's error; of several it is its own."""
    fails = isinstance(asked, str) or question.parameters.on_error == "fail"
    ids = [asked] if isinstance(asked, str) else asked
    for place, (item_id, item) in enumerate(zip(ids, question.collection.get(ids), strict=True)):
        if item is not None:
            queries.rows.append(item.vector)
            queries.own_ids.append(item_id)
            queries.places.append(place)
            continue
        error = _unknown_item(question.collection, item_id)
        if fails:
            raise error
        queries.failed.append({"index": place, "error": {"code": error.code, "title": error.title}})


def _found_by_queries(question: _Question, queries: _Queries) -> list[dict[str, Any]]:
    if not queries.rows:
        return queries.failed
    collection, parameters, window = question.collection, question.parameters, question.window
    with_vectors = "embedding" in parameters.include
    if question.grouping is None:
        found = ranked_each(
            collection,
            np.stack(queries.rows),
            window,
            question.narrowing,
            own_ids=queries.own_ids,
            diversity=parameters.diversify,
            with_vectors=with_vectors,
        )
        answered = [{"neighbours": _neighbours_answer(one, question)} for one in found]
    else:
        own_ids = [[own] for own in queries.own_ids] or [[] for _ in queries.rows]
        answered = [
            _groups_answer(nearest_to(collection, row), question.narrowing.without(own), question)
            for row, own in zip(queries.rows, own_ids, strict=True)
        ]
    data = [{"index": place} | one for place, one in zip(queries.places, answered, strict=True)]
    return sorted(data + queries.failed, key=lambda answer: int(answer["index"]))


def _found_by_examples(
    question: _Question, embedded: Sequence[ImageEmbedding | ImageFailure]
) -> dict[str, Any]:
    parameters, collection = question.parameters, question.collection
    given = [*parameters.positive, *parameters.negative]
    ids = [example.id for example in given if example.id is not None]
    items = dict(zip(ids, collection.get(ids), strict=True))
    rows_of_images = iter([result.embedding for result in embedded if isinstance(result, ImageEmbedding)])

    def row_of(example: Example) -> Row:
        if example.image is not None:
            return next(rows_of_images)
        if example.id is None:
            return _one_row(example, collection.dimensions)
        if (item := items[example.id]) is None:
            raise _unknown_item(collection, example.id)
        return item.vector

    likes, dislikes = (
        _examples(given, [row_of(example) for example in given], dimensions=collection.dimensions)
        for given in (parameters.positive, parameters.negative)
    )
    find = _finder(collection, likes, dislikes, strategy=parameters.strategy)
    narrowing = question.narrowing.without(ids)
    if question.grouping is not None:
        return _groups_answer(find, narrowing, question)
    found = ranked(
        find,
        question.window,
        narrowing,
        diversity=parameters.diversify,
        with_vectors="embedding" in parameters.include,
    )
    return {"neighbours": _neighbours_answer(found, question)}


def _one_row(example: Example, dimensions: int) -> Row:
    sent: SentVectors = example.embedding
    row: Row = sent.rows(dimensions, at_most=1, name="embedding")[0]
    if len(row) != dimensions:
        raise InvalidVector(f"an example has an embedding of {len(row)} numbers; expected {dimensions}")
    return row


def _examples(given: Sequence[Example], rows: Sequence[Row], *, dimensions: int) -> Examples:
    weights = [1.0 if example.weight is None else example.weight for example in given]
    weighted = any(example.weight is not None for example in given)
    return Examples(
        vectors_ND=np.stack(rows) if rows else np.empty((0, dimensions), np.float32),
        weights_N=np.array(weights) if weighted else None,
    )


def _finder(collection: Collection, likes: Examples, dislikes: Examples, *, strategy: str) -> Finder:
    if strategy == "best_score":
        return best_of(collection, likes, dislikes)
    return nearest_to(collection, average_of(likes, dislikes, dimensions=collection.dimensions))


def _groups_answer(find: Finder, narrowing: Narrowing, question: _Question) -> dict[str, Any]:
    assert question.grouping is not None, "groups were not asked for: this is a bug"
    found = grouped(
        find,
        question.grouping,
        question.window,
        narrowing,
        with_vectors="embedding" in question.parameters.include,
    )
    groups = [
        {"value": group.value, "neighbours": _neighbours_answer(group.neighbours, question)}
        for group in found
    ]
    return {"groups": groups}


def _neighbours_answer(neighbours: Sequence[Neighbour], question: _Question) -> list[dict[str, Any]]:
    include = question.parameters.include
    rows: list[dict[str, Any]] = [{"id": found.id, "score": round(found.score, 6)} for found in neighbours]
    for row, found in zip(rows, neighbours, strict=True):
        if "metadata" in include:
            row["metadata"] = found.metadata
        if "embedding" in include:
            row["embedding"] = found.vector
    return rows


def _explained(question: _Question) -> dict[str, Any]:
    narrowing = question.narrowing
    how = question.collection.explain(filter=narrowing.filter, exact=narrowing.exact)
    explained: dict[str, Any] = {"method": how.method, "items": how.items}
    return explained if how.matched is None else explained | {"matched": how.matched}


def _unknown_item(collection: Collection, item_id: str) -> UnknownItem:
    return UnknownItem(f"collection {collection.name!r} has no item {item_id[:256]!r}")
