"""`POST /collections/{name}/items` as NDJSON: a line in, a line out, for as many lines as there are.

Each line succeeds or fails for itself, and a result line is sent when its item is on disk.
"""

from collections.abc import Sequence
from typing import Any

from app.adding import Addition, embed_patiently, make_items
from app.api.embed import failure_answer
from app.api.joining import Joining, addition_of
from app.api.line_stream import Batch, LineStream, json_lines, line_bounds, line_members
from app.api.lines import Line
from app.api.problems import item_error
from app.api.schemas import NewItem, parse
from app.api.state import State, in_worker, write_to_current
from app.errors import ServiceError
from app.inference.results import ImageFailure
from app.search.collection import Item
from dino_core.preprocess import ImageLimits

_Made = tuple[int, Item | ImageFailure | ServiceError]


def item_stream(state: State, joining: Joining) -> LineStream[list[_Made]]:
    """The answer to a stream of items, which reads it while it is sent.

    Args:
        state: Of the service.
        joining: The collection, and what may join it.
    """
    lines = _ItemLines(state, joining)
    return LineStream(line_bounds(state["settings"]), make=lines.make, finish=lines.write)


class _ItemLines:
    """Lines to items, and items to the collection."""

    def __init__(self, state: State, joining: Joining) -> None:
        self._state = state
        self._joining = joining
        self._bounds = line_bounds(state["settings"])

    async def make(self, batch: Batch) -> list[_Made]:
        """Items of a batch, or what each line's error is."""
        state, engine = self._state, self._joining.model.engine
        parsed = await in_worker(state, lambda: [self._parsed(number, line) for number, line in batch])
        additions = [addition for _, addition in parsed if isinstance(addition, Addition)]
        try:
            items = iter(
                await make_items(
                    additions,
                    collection=self._joining.collection,
                    embed=lambda images: embed_patiently(engine, images),
                    workers=state["workers"],
                    limits=ImageLimits(max_pixels=state["settings"].max_image_pixels),
                    fetcher=state["fetcher"],
                )
            )
        except ServiceError as error:
            return [
                (number, error if isinstance(addition, Addition) else addition) for number, addition in parsed
            ]
        return [
            (number, next(items) if isinstance(addition, Addition) else addition)
            for number, addition in parsed
        ]

    def _parsed(self, number: int, line: Line) -> tuple[int, Addition | ServiceError]:
        try:
            item = parse(NewItem, line_members(line, self._bounds))
            return number, addition_of(item, self._joining, where=f"line {number}", pointer="/image")
        except ServiceError as error:
            return number, error

    async def write(self, made: Sequence[_Made]) -> bytes:
        """Writes a batch's items, and gives its result lines."""
        items = [item for _, item in made if isinstance(item, Item)]
        fingerprint = self._joining.collection.fingerprint
        try:
            statuses: list[Any] = []
            if items:
                statuses = await in_worker(
                    self._state,
                    write_to_current,
                    self._state,
                    self._joining.name,
                    lambda collection: collection.upsert(items, fingerprint=fingerprint),
                )
        except ServiceError as error:
            statuses = [error] * len(items)
        status = iter(statuses)
        return json_lines(
            _answer(number, item, next(status) if isinstance(item, Item) else None) for number, item in made
        )


def _answer(number: int, item: Item | ImageFailure | ServiceError, status: object) -> dict[str, Any]:
    if isinstance(item, ImageFailure):
        return failure_answer(number, item)
    error = item if isinstance(item, ServiceError) else status
    if isinstance(error, ServiceError):
        return {"index": number, "error": item_error(error)}
    assert isinstance(item, Item), "a line has neither an item nor an error: this is a bug"
    return {"index": number, "id": item.id, "status": status}
