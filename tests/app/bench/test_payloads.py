"""What the generator sends is what a service reads: the same pixels, other bytes each time."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from python_multipart.multipart import parse_form

from app.bench.payloads import embed_payloads, generated_pictures, is_numbered, pictures_of
from app.bench.wire import Endpoint
from tests.app.running import picture

ENDPOINT = Endpoint("127.0.0.1", 8000)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def head_and_body(request: bytes) -> tuple[dict[str, str], bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode("ascii").split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body


def test_generated_pictures_are_like_photographs_and_the_same_each_time() -> None:
    made = generated_pictures(3)
    assert made == generated_pictures(3)
    assert len(set(made)) == 3
    for data in made:
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
        assert 20_000 < len(data) < 60_000  # photographs of this size and quality have 34 kB


def test_one_picture_is_the_body_with_the_same_pixels_and_other_bytes_each_time() -> None:
    (payload,) = embed_payloads(ENDPOINT, [picture(1)], api_key="a key", priority="bulk")
    numbers = itertools.count(7)
    requests = [b"".join(payload.numbered(numbers)) for _ in range(2)]
    assert len(requests[0]) == len(requests[1]) == payload.size_bytes
    assert requests[0].startswith(
        b"POST /embed?on_error=fail&encoding=base64&timeout=30&priority=bulk HTTP/1.1\r\n"
    )
    bodies = []
    for request in requests:
        headers, body = head_and_body(request)
        assert (headers["host"], headers["authorization"]) == ("127.0.0.1:8000", "Bearer a key")
        assert int(headers["content-length"]) == len(body)
        assert (pixels(body) == pixels(picture(1))).all()
        bodies.append(body)
    assert bodies[0] != bodies[1]
    assert (payload.images, payload.label) == (1, "bulk")


def test_several_pictures_are_a_form_and_each_is_used_equally() -> None:
    files = [picture(1), picture(2), picture(3, format="PNG")]
    payloads = embed_payloads(ENDPOINT, files, images_per_request=2)
    sent: list[bytes] = []
    for payload in payloads:
        headers, body = head_and_body(b"".join(payload.numbered(itertools.count())))
        assert int(headers["content-length"]) == len(body)
        parse_form(
            {"Content-Type": headers["content-type"].encode()},
            io.BytesIO(body),
            on_field=None,
            on_file=lambda file: sent.append(_content(file)),
        )
    assert len(payloads) == 3
    order = [0, 1, 2, 0, 1, 2]
    for data, number in zip(sent, order, strict=True):
        assert (pixels(data) == pixels(files[number])).all()
    assert sent[2] == files[2]  # no JPEG: as it is
    assert [is_numbered(file) for file in files] == [True, True, False]


def _content(file: object) -> bytes:
    opened = file.file_object  # type: ignore[attr-defined]
    opened.seek(0)
    content = opened.read()
    assert isinstance(content, bytes)
    return content


def test_a_folders_pictures_come_in_order_of_path(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, data in (("b/1.JPG", b"2"), ("a.png", b"1"), ("notes.txt", b"no")):
        (tmp_path / name).write_bytes(data)
    assert pictures_of(tmp_path) == [b"1", b"2"]


def test_a_folder_without_pictures_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no pictures"):
        pictures_of(tmp_path)
