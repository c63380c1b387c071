"""Bodies to images and parameters, by Content-Type. Bytes are bounded as they arrive; nothing is decoded."""

import asyncio
import binascii
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import orjson
from fastapi import Request
from numpy.typing import NDArray
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from app.api.multipart import MultipartReader, PartLimits
from app.api.refusals import (
    ClientLeft,
    InvalidArray,
    InvalidJson,
    InvalidParameter,
    NoImages,
    UnsupportedMediaType,
    UploadTimeout,
)
from app.api.state import State, in_worker, while_connected
from app.errors import TooLarge
from app.fetching import URL_NOT_TAKEN, ImageAddress
from app.inference.results import ImageFailure

SentImage = bytes | ImageFailure  # a file, or why what was sent can't be one
_NPY_MAGIC: Final = b"\x93NUMPY"
_PARTS_PER_IMAGE: Final = 4  # the file, its id, its metadata, its source
_OTHER_PARTS: Final = 32
_MAX_TEXT_BYTES: Final = 64 * 2**10  # four times what metadata may have
_COUNTED_AT_ONCE_BYTES: Final = 2**20
_VALUE_BYTES: Final = 26  # the longest text of a float64, with a comma and a space
_PARSED_AT_ONCE_BYTES: Final = 64 * 2**10  # in 0.2 ms, as long as handing it to a thread and back takes


@dataclass
class Upload:
    """What a request sent.

    Attributes:
        images: In order.
        filenames: One for each image; None where it had none.
        pixels: uint8 [B, H, W, C], where an array was sent instead of images.
        parameters: By name; text, lists of text, or what stood in JSON.
        in_body: Whether parameters stood in a JSON body.
        single: Whether the body was one image by itself.
    """

    images: list[SentImage] = field(default_factory=list)
    filenames: list[str | None] = field(default_factory=list)
    pixels: NDArray[np.uint8] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    in_body: bool = False
    single: bool = False

    @property
    def count(self) -> int:
        """How many images."""
        if self.pixels is None:
            return len(self.images)
        return len(self.pixels) if self.pixels.ndim else 0  # such an array is refused where it is embedded


async def read_upload(
    request: Request,
    state: State,
    *,
    lists: Iterable[str] = (),
    arrays: bool = False,
    max_values: int | None = None,
) -> Upload:
    """Reads a body with images.

    Args:
        request: Its body unread.
        state: For limits and threads.
        lists: Names of the parameters that may be given several times in a form.
        arrays: Whether the route takes application/x-npy.
        max_values: How many values a JSON body may have: parsing millions of numbers, unlike images, would
            keep other requests waiting, also from another thread.

    Raises:
        UnsupportedMediaType: The body is of another kind.
        InvalidJson: It isn't what its Content-Type says; so InvalidMultipart and InvalidArray.
        InvalidParameter: A parameter is given twice.
        TooLarge: It is above the limit of bytes.
        TooManyParts: It has more parts than the largest request needs.
        UploadTimeout: It did not arrive in time.
        ClientLeft: The caller closed the connection.
    """
    kind, options = _content_type(request)
    texts = list(request.query_params.multi_items())
    match kind:
        case "multipart/form-data":
            upload, form = await _read_multipart(request, state, options.get(b"boundary", b""))
            texts += form
        case "application/json":
            text = await _read_all(request, state)
            if len(text) <= _PARSED_AT_ONCE_BYTES:
                upload, images = _json_upload(text, max_values)
            else:
                upload, images = await in_worker(state, _json_upload, text, max_values)
            upload.images = await while_connected(request, fetched(state, images))
        case "application/x-npy" if arrays:
            data = await _read_all(request, state)
            upload = Upload(pixels=await in_worker(state, _array, data))
        case _ if kind.startswith("image/") or kind == "application/octet-stream":
            upload = Upload([await _read_all(request, state)], [None], single=True)
        case _:
            raise UnsupportedMediaType(_what_is_taken(kind, arrays=arrays))
    _add_texts(upload, texts, lists=frozenset() if upload.in_body else frozenset(lists))
    return upload


def query_texts(request: Request) -> dict[str, Any]:
    """The parameters of a query, each once.

    Raises:
        InvalidParameter: One is given twice.
    """
    upload = Upload()
    _add_texts(upload, list(request.query_params.multi_items()), lists=frozenset())
    return upload.parameters


async def read_json(request: Request, state: State) -> dict[str, Any]:
    """Reads a body that is a JSON object, without images.

    Raises:
        UnsupportedMediaType: The body is of another kind.
        InvalidJson: It isn't a JSON object.
        TooLarge: As `read_upload`, and so UploadTimeout and ClientLeft.
    """
    kind, _ = _content_type(request)
    if kind != "application/json":
        raise UnsupportedMediaType(f"{_found(kind)}, and this route takes application/json")
    return await in_worker(state, json_object, await _read_all(request, state))


async def fetched(
    state: State, images: Sequence[SentImage | ImageAddress], *, each: bool = False
) -> list[SentImage]:
    """Files in the places of their addresses; costs nothing where there are none.

    Args:
        state: Of the service.
        images: As `image_from_json` gives them.
        each: Where no URLs are taken, that is each one's own failure, and not the request's.

    Raises:
        InvalidJson: This service takes no URLs.
        TooLarge: See `Fetcher.fetch_all`, and so Overloaded and DeadlineExceeded.
    """
    addresses = [image for image in images if isinstance(image, ImageAddress)]
    fetcher = state["fetcher"]
    if addresses and fetcher is None and not each:
        raise InvalidJson(
            "images by URL are not taken (--allow-url-inputs): fetch the image and send its bytes, as base64 "
            "or multipart",
            pointer=addresses[0].pointer,
        )
    files = iter([URL_NOT_TAKEN] * len(addresses) if fetcher is None else await fetcher.fetch_all(addresses))
    return [next(files) if isinstance(image, ImageAddress) else image for image in images]


def images_from_json(sent: Iterable[object], *, pointer: str) -> list[SentImage | ImageAddress]:
    """Base64 texts, data URIs and URLs to files, or where they are.

    Args:
        sent: Of a JSON array.
        pointer: To the array, for errors.

    Raises:
        InvalidJson: One is not a text.
    """
    return [image_from_json(value, pointer=f"{pointer}/{index}") for index, value in enumerate(sent)]


def require_images(upload: Upload) -> None:
    """Refuses a request that has none.

    Raises:
        NoImages: It has none.
    """
    if not upload.images and (upload.pixels is None or not upload.pixels.size):
        raise NoImages(
            "the request has no image: send multipart/form-data with files in the field `images`, an "
            'image as the body, or JSON {"images": [base64, …]}'
        )


async def _read_multipart(
    request: Request, state: State, boundary: bytes
) -> tuple[Upload, list[tuple[str, str]]]:
    """The files, and the texts of the other fields."""
    settings = state["settings"]
    reader = MultipartReader(
        boundary,
        PartLimits(
            max_parts=_PARTS_PER_IMAGE * settings.max_client_batch_size + _OTHER_PARTS,
            max_file_bytes=settings.max_image_bytes,
            max_text_bytes=_MAX_TEXT_BYTES,
        ),
    )
    # A chunk is what the socket had, some tens of kilobytes: its parsing is too short to keep others waiting.
    await _take_chunks(request, state, reader.feed)
    reader.finish()
    upload = Upload(
        [_within_limit(file.data, file.size_bytes, settings.max_image_bytes) for file in reader.files],
        [file.filename for file in reader.files],
    )
    return upload, reader.texts


def _within_limit(data: bytes, size_bytes: int, limit: int) -> SentImage:
    if size_bytes <= limit:
        return data
    return ImageFailure(
        "image_too_large",
        f"The image has {size_bytes:,} bytes, at most {limit:,} are accepted.",
        limit=limit,
        actual=size_bytes,
    )


async def _read_all(request: Request, state: State) -> bytes:
    chunks: list[bytes] = []
    await _take_chunks(request, state, chunks.append)
    return b"".join(chunks)


async def _take_chunks(request: Request, state: State, take: Callable[[bytes], None]) -> None:
    timeout_s = state["settings"].upload_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                take(chunk)
    except TimeoutError:
        raise UploadTimeout(
            f"the body was not here after {timeout_s:g} s: send fewer images at once"
        ) from None
    except ClientDisconnect:
        raise ClientLeft("the caller closed the connection before the body was here") from None


def _json_upload(text: bytes, max_values: int | None) -> tuple[Upload, list[SentImage | ImageAddress]]:
    """What a JSON body says, and its images, which may have to be fetched yet."""
    if max_values is not None:
        _refuse_many_values(text, max_values)
    members = json_object(text)
    images = members.pop("images", [])
    if not isinstance(images, list):
        raise InvalidJson("`images` is not an array of base64 texts or data URIs", pointer="/images")
    files = images_from_json(images, pointer="/images")
    return Upload(filenames=[None] * len(files), parameters=members, in_body=True), files


def _refuse_many_values(text: bytes, limit: int) -> None:
    """Counts commas: base64 has none, so this bounds lists and objects and not the size of images."""
    longest = limit * _VALUE_BYTES
    if len(text) > longest and b'"image' not in text:
        raise TooLarge(
            f"the JSON has {len(text):,} bytes and no images; without images, at most {longest:,} are read "
            "here: send fewer embeddings at once",
            limit=longest,
            actual=len(text),
        )
    values = 1
    for start in range(0, len(text), _COUNTED_AT_ONCE_BYTES):
        values += text.count(b",", start, start + _COUNTED_AT_ONCE_BYTES)
        if values > limit:
            raise TooLarge(
                f"the JSON has more than {limit:,} values, which is as many as are read here: send fewer "
                "embeddings at once, or as base64",
                limit=limit,
                actual=values,
            )


def json_object(text: bytes, *, what: str = "body") -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InvalidJson: It is something else.
    """
    try:
        members = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise InvalidJson(f"the {what} is not valid JSON") from None
    if not isinstance(members, dict):
        raise InvalidJson(f"the {what} is JSON, and not an object: send {{…}}")
    return members


def image_from_json(value: object, *, pointer: str) -> SentImage | ImageAddress:
    """A base64 text or a data URI to a file; a URL to an address, for `fetched`.

    Args:
        value: Of a JSON document.
        pointer: To it, for errors.

    Raises:
        InvalidJson: It is neither.
    """
    if isinstance(value, dict) and isinstance(url := value.get("url"), str) and len(value) == 1:
        return ImageAddress(url, pointer)
    if not isinstance(value, str):
        raise InvalidJson(
            f'{pointer} is neither a text of base64, nor a data URI, nor {{"url": …}}', pointer=pointer
        )
    text = value
    if value.startswith("data:"):
        head, _, text = value.partition(",")
        if not head.endswith(";base64"):
            return ImageFailure("invalid_base64", "The data URI is not `data:image/…;base64,…`.")
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        return ImageFailure("invalid_base64", "The text is not valid base64.")


def _array(data: bytes) -> NDArray[np.uint8]:
    # numpy.load would also open zip archives, which can be bombs, and pickles, which can be anything.
    if not data.startswith(_NPY_MAGIC):
        raise InvalidArray("the body is not in NumPy's .npy format")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # NumPy reads the header as Python, whose tokenizer and compiler raise what they like
        raise InvalidArray("the body is not a whole .npy of plain numbers") from None
    pixels: NDArray[np.uint8] = array[None] if array.ndim == 3 else array
    return pixels


def _add_texts(upload: Upload, texts: list[tuple[str, str]], *, lists: frozenset[str]) -> None:
    """Adds the texts of query and form to the parameters; each once, but for those that are lists."""
    for name, text in texts:
        if name in lists:
            upload.parameters.setdefault(name, []).append(text)
        elif name in upload.parameters:
            raise InvalidParameter(f"{name} is given twice", parameter=name)
        else:
            upload.parameters[name] = text


def _content_type(request: Request) -> tuple[str, dict[bytes, bytes]]:
    media_type, options = parse_options_header(request.headers.get("content-type", ""))
    return media_type.decode("latin-1").lower(), options


def _found(kind: str) -> str:
    return f"the Content-Type is {kind[:100]!r}" if kind else "there is no Content-Type"


def _what_is_taken(kind: str, *, arrays: bool) -> str:
    taken = "multipart/form-data, image/*, application/json" + (" or application/x-npy" if arrays else "")
    return f"{_found(kind)}, and this route takes {taken}: for one image, say image/jpeg"
