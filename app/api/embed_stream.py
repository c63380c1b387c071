"""`POST /embed/stream`: a line with an image in, a line with its embedding out, for any number of lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.adding import embed_patiently
from app.api import answers
from app.api.body import SentImage, fetched, image_from_json, query_texts
from app.api.embed import image_error
from app.api.embed_schemas import EmbedLine, EmbedStreamParameters, StreamedEmbedding
from app.api.embedded import image_answer, reading_of, result_bytes, row_of
from app.api.guard import LINES_MEDIA_TYPE, is_line_stream
from app.api.line_stream import Batch, LineStream, json_lines, line_bounds, line_members
from app.api.lines import Line, LineBounds
from app.api.openapi import example, lines_body_of, lines_of
from app.api.problems import item_error
from app.api.refusals import UnsupportedMediaType
from app.api.schemas import parse
from app.api.state import State, StateDep, in_worker, served_model
from app.errors import ServiceError
from app.fetching import ImageAddress
from app.inference.engine import Engine
from app.inference.features import Reading
from app.inference.results import ImageEmbedding, ImageFailure

router = APIRouter(tags=["embeddings"])


@router.post(
    "/embed/stream",
    summary="Embed any number of images",
    responses={200: lines_of(StreamedEmbedding)},
    openapi_extra=lines_body_of(EmbedLine, EmbedStreamParameters)
    | example(
        "curl -N -T images.ndjson -X POST -H 'Content-Type: application/x-ndjson' {origin}/embed/stream",
    ),
)
async def embed_stream(request: Request, state: StateDep) -> Response:
    """Embeds the image of each line, `{"image": base64 or a data URI, "id": whatever you like}`.

    The answer has a line for each, in their order; `index` is the number of the line, and `id` comes back.
    Each succeeds or fails for itself. Read the answer while you send: nothing more is read while answers are
    not taken, and so neither side holds more than a few images. The work is done behind that of others.
    """
    answers.negotiate(request, LINES_MEDIA_TYPE)
    if not is_line_stream(request.scope):
        raise UnsupportedMediaType(f"this route takes {LINES_MEDIA_TYPE}: a JSON object in each line")
    form = parse(EmbedStreamParameters, query_texts(request))
    model = served_model(state, form.model)
    engine, reading = model.engine, reading_of(form, model.manifest)
    bounds = line_bounds(state["settings"], result_bytes=result_bytes(form, engine, reading))
    lines = _EmbedLines(state, engine, form, reading, bounds)
    return LineStream(bounds, make=lines.make, finish=lines.finish)


@dataclass(frozen=True)
class _Sent:
    """A line that was understood, or why it was not.

    Attributes:
        place: What its result begins with: `index`, and `id` where it has one.
    """

    place: dict[str, Any]
    image: SentImage | ServiceError


_Read = tuple[dict[str, Any], SentImage | ImageAddress | ServiceError]  # its place, and what is there


@dataclass(frozen=True)
class _EmbedLines:
    """Lines to result lines."""

    state: State
    engine: Engine
    form: EmbedStreamParameters
    reading: Reading | None
    bounds: LineBounds

    async def make(self, batch: Batch) -> bytes:
        """The result lines of a batch."""
        read = await in_worker(self.state, lambda: [self._read(number, line) for number, line in batch])
        sent = await self._with_files(read)
        files = [one.image for one in sent if isinstance(one.image, bytes)]
        results: list[ImageEmbedding | ImageFailure | ServiceError]
        try:
            results = [*await embed_patiently(self.engine, files, reading=self.reading)] if files else []
        except ServiceError as error:
            results = [error] * len(files)
        # Vectors become text here, where batches overlap, and not in `finish`, where they wait in line.
        return await in_worker(self.state, self._text, sent, results)

    async def finish(self, text: bytes) -> bytes:
        """What was made is what is sent."""
        return text

    async def _with_files(self, sent: list[_Read]) -> list[_Sent]:
        addresses = [image for _, image in sent if isinstance(image, ImageAddress)]
        files: Sequence[SentImage | ServiceError]
        try:
            files = await fetched(self.state, addresses, each=True)
        except ServiceError as error:
            files = [error] * len(addresses)
        left = iter(files)
        return [
            _Sent(place, next(left) if isinstance(image, ImageAddress) else image) for place, image in sent
        ]

    def _read(self, number: int, line: Line) -> _Read:
        place: dict[str, Any] = {"index": number}
        try:
            members = line_members(line, self.bounds)
            if isinstance(members.get("id"), str | int):
                place["id"] = members["id"]
            return place, image_from_json(parse(EmbedLine, members).image, pointer="/image")
        except ServiceError as error:
            return place, error

    def _text(self, sent: list[_Sent], results: list[ImageEmbedding | ImageFailure | ServiceError]) -> bytes:
        left = iter(results)
        return json_lines(
            one.place | self._result(next(left) if isinstance(one.image, bytes) else one.image)
            for one in sent
        )

    def _result(self, result: ImageEmbedding | ImageFailure | ServiceError) -> dict[str, Any]:
        if isinstance(result, ServiceError):
            return {"error": item_error(result)}
        row = row_of(result, self.form)
        if isinstance(row, ImageFailure):
            return {"error": image_error(row)}
        return image_answer(result, row, as_text=self.form.encoding == "base64")
