"""Requests as bytes, made before the measurement, with a number in each picture that makes it a new one.

A service keeps embeddings by content, and computes pictures that are in flight twice only once. A load of a
few files again and again would measure that. So every JPEG that is sent carries its number in a comment
segment: other bytes, the same pixels.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.bench.wire import Endpoint

WIDTH_PX, HEIGHT_PX = 500, 375  # a photograph of ImageNet's, at the median
_JPEG_QUALITY: Final = 85
_OCTAVES: Final = (4, 12, 40, 120, 240)  # cells across; a photograph has detail of every size
_START_OF_IMAGE: Final = b"\xff\xd8"
_NUMBER_DIGITS: Final = 16
_COMMENT: Final = b"\xff\xfe" + (2 + _NUMBER_DIGITS).to_bytes(2, "big")
_BOUNDARY: Final = "dinoserve-bench-7d1f0c5b"
_PART_HEAD: Final = (
    f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="image"\r\n'
    "Content-Type: application/octet-stream\r\n\r\n"
).encode()
_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff")
_MOST_FILES: Final = 1_000

Priority = Literal["interactive", "bulk"]


@dataclass(frozen=True)
class Payload:
    """One request, ready to be written.

    Attributes:
        segments: Its bytes; each `None` is the place of a picture's number.
        images: How many pictures it has.
        label: Given to what is measured of it.
    """

    segments: tuple[bytes | None, ...]
    images: int
    label: str = ""

    @property
    def size_bytes(self) -> int:
        """Of the whole request."""
        return sum(_NUMBER_DIGITS if segment is None else len(segment) for segment in self.segments)

    def numbered(self, numbers: Iterator[int]) -> list[bytes]:
        """The segments, with a new number in each place."""
        return [
            b"%016d" % next(numbers) if segment is None else segment  # as long as _NUMBER_DIGITS says
            for segment in self.segments
        ]


def generated_pictures(count: int, *, width_px: int = WIDTH_PX, height_px: int = HEIGHT_PX) -> list[bytes]:
    """JPEGs whose detail and size are like a photograph's; the same for the same count."""
    rng = np.random.default_rng(0)
    return [_jpeg(rng, width_px, height_px) for _ in range(count)]


def pictures_of(folder: Path) -> list[bytes]:
    """The pictures in a folder and below it, in order of path, at most 1,000.

    Raises:
        ValueError: There is none.
        OSError: One can't be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} has no pictures ({', '.join(_SUFFIXES)})")
    return [path.read_bytes() for path in paths[:_MOST_FILES]]


def embed_payloads(
    endpoint: Endpoint,
    pictures: Sequence[bytes],
    *,
    images_per_request: int = 1,
    as_form: bool = False,
    api_key: str | None = None,
    timeout_s: float = 30.0,
    priority: Priority | None = None,
) -> list[Payload]:
    """Requests to `/embed`: one picture as the raw body, several as a form.

    Args:
        endpoint: For the Host header.
        pictures: Files.
        images_per_request: Of each request.
        as_form: Also a picture by itself.
        api_key: Where the service wants one.
        timeout_s: The deadline that each request tells the service.
        priority: Told to the service, and the payloads' label; None leaves it to the service.

    Returns:
        As many as there are pictures, so that each is used equally.
    """
    query = f"on_error=fail&encoding=base64&timeout={timeout_s:g}"
    query += "" if priority is None else f"&priority={priority}"
    head = f"POST /embed?{query} HTTP/1.1\r\nHost: {endpoint.host_header}\r\nAccept: application/json\r\n"
    head += "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
    parts = [_numbered_file(picture) for picture in pictures]
    around = itertools.cycle(parts)
    made = []
    for _ in parts:
        chosen = list(itertools.islice(around, images_per_request))
        made.append(_payload(head, chosen, priority or "", as_form=as_form or images_per_request > 1))
    return made


def is_numbered(picture: bytes) -> bool:
    """Whether a picture can carry a number: a JPEG can. Others are sent as they are, and may meet a cache."""
    return picture.startswith(_START_OF_IMAGE)


def _payload(head: str, files: Sequence[tuple[bytes | None, ...]], label: str, *, as_form: bool) -> Payload:
    if not as_form:
        media_type = "application/octet-stream"
        body = list(files[0])
    else:
        media_type = f"multipart/form-data; boundary={_BOUNDARY}"
        body = []
        for file in files:
            body += [_PART_HEAD, *file, b"\r\n"]
        body.append(f"--{_BOUNDARY}--\r\n".encode())
    size_bytes = sum(_NUMBER_DIGITS if segment is None else len(segment) for segment in body)
    head += f"Content-Type: {media_type}\r\nContent-Length: {size_bytes}\r\n\r\n"
    return Payload((head.encode(), *body), images=len(files), label=label)


def _numbered_file(picture: bytes) -> tuple[bytes | None, ...]:
    if not is_numbered(picture):
        return (picture,)
    return (_START_OF_IMAGE + _COMMENT, None, picture[len(_START_OF_IMAGE) :])


def _jpeg(rng: np.random.Generator, width_px: int, height_px: int) -> bytes:
    pixels_HWC = np.full((height_px, width_px, 3), 128.0, np.float32)
    for cells in _OCTAVES:
        # As in nature, where a spectrum falls with frequency: half the contrast at three times the detail.
        contrast = 220 / cells**0.6
        noise: npt.NDArray[np.uint8] = rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize((width_px, height_px), Image.Resampling.BICUBIC)
        pixels_HWC += (np.asarray(smooth, np.float32) - 127.5) * (contrast / 127.5)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
