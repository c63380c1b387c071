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
    accept = request.headers.get("accept", "*/*")
    ranked = []
    for place, part in enumerate(accept.split(",")):
        media_type, *options = (piece.strip().lower() for piece in part.split(";"))
        quality = _quality(options)
        for rank, offer in enumerate(offers):
            if quality > 0 and _fits(_ALIASES.get(media_type, media_type), offer):
                # Ties go to what is named exactly, then to what the caller names first, then to our order.
                ranked.append((-quality, "*" in media_type, place, rank, offer))
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


def _fits(asked: str, offer: str) -> bool:
    return asked in {offer, "*/*", offer.partition("/")[0] + "/*"}


def _quality(options: list[str]) -> float:
    for option in options:
        if option.startswith("q="):
            try:
                return float(option[2:])
            except ValueError:
                return 0.0
    return 1.0
