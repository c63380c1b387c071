"""Answers in the form that Accept asks for: JSON, MessagePack, or NumPy's .npy."""

import io
import math
from typing import Any, Final

import msgpack
import numpy as np
import orjson
from fastapi import Request
from starlette.responses import Response

from app.api.refusals import NotAcceptable
from app.errors import TooLarge
from app.inference.results import Matrix

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
NPY: Final = "application/x-npy"
PNG: Final = "image/png"
MAX_ANSWER_BYTES: Final = 64 * 2**20  # patches of 220 images by a ViT-S/16 at 224 px, as float32
_ALIASES: Final = {"application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}


def negotiate(request: Request, *offers: str) -> str:
    """The form that the caller likes best; the first offer where it doesn't say.

    Raises:
        NotAcceptable: It takes none of the offers.
    """
    accept = ", ".join(request.headers.getlist("accept")).strip() or "*/*"
    ranges = [_range(part) for part in accept.split(",")]
    ranked = []
    for rank, offer in enumerate(offers):
        fitting = [
            (-_exactness(asked, offer), place, quality)
            for place, (asked, quality) in enumerate(ranges)
            if _exactness(asked, offer)
        ]
        # What is said of the form itself counts before what is said of all: `*/*, image/png;q=0` is no PNG.
        exactness, place, quality = min(fitting, default=(0, 0, 0.0))
        if quality > 0:
            # Ties go to what is named exactly, then to what the caller names first, then to our order.
            ranked.append((-quality, exactness, place, rank, offer))
    if not ranked:
        raise NotAcceptable(f"Accept is {accept[:200]!r}, and this route answers with {' or '.join(offers)}")
    return min(ranked)[-1]


def structured(content: dict[str, Any], media_type: str) -> Response:
    """JSON, with numbers as short as float32 allows, or MessagePack. NumPy arrays may be anywhere in it."""
    if media_type == MSGPACK:
        return Response(msgpack.packb(content, default=_plain), media_type=MSGPACK)
    return Response(orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type=JSON)


def structured_piecewise(content: dict[str, Any], media_type: str) -> Response:
    """As `structured`, for large `data` on a worker's thread.

    One item is encoded after the other, so that other threads have the interpreter's lock in between.
    """
    if media_type == MSGPACK:
        return structured(content, media_type)
    others = {name: value for name, value in content.items() if name != "data"}
    items = (orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY) for item in content["data"])
    text = orjson.dumps(others)[:-1] + b',"data":[' + b",".join(items) + b"]}"
    return Response(text, media_type=JSON)


def refuse_large(values: int, *, value_bytes: float) -> None:
    """Refuses an answer before the work for it, where it would be larger than any may be.

    Args:
        values: Numbers in it.
        value_bytes: Of one, in the form that was asked for.

    Raises:
        TooLarge: It would be.
    """
    expected = math.ceil(values * value_bytes)
    if expected > MAX_ANSWER_BYTES:
        raise TooLarge(
            f"the answer would have about {expected:,} bytes, at most {MAX_ANSWER_BYTES:,} are sent: send "
            f"fewer images at once, or ask for less with `Accept: {NPY}` and dtype=float16",
            limit=MAX_ANSWER_BYTES,
            actual=expected,
        )


def npy(rows_BD: Matrix | np.ndarray[Any, np.dtype[np.floating]], *, failed: int) -> Response:
    """A NumPy file; the header X-Failed-Items says how many rows are NaN."""
    buffer = io.BytesIO()
    np.save(buffer, rows_BD, allow_pickle=False)
    return Response(buffer.getvalue(), media_type=NPY, headers={"X-Failed-Items": str(failed)})


def _plain(value: object) -> object:
    """Arrays as bytes: little-endian, of the dtype that the answer names."""
    if isinstance(value, np.ndarray):
        return value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
    raise TypeError(f"{type(value).__name__} can't be in an answer: this is a bug")


def _range(part: str) -> tuple[str, float]:
    """A media range of Accept, and how much it is liked."""
    asked, *options = (piece.strip().lower() for piece in part.split(";"))
    return _ALIASES.get(asked, asked), _quality(options)


def _exactness(asked: str, offer: str) -> int:
    """3 for the form itself, 2 for its kind, 1 for all; 0 where the range is of others."""
    return {offer: 3, offer.partition("/")[0] + "/*": 2, "*/*": 1}.get(asked, 0)


def _quality(options: list[str]) -> float:
    for option in options:
        if option.startswith("q="):
            try:
                return float(option[2:])
            except ValueError:
                return 0.0
    return 1.0
