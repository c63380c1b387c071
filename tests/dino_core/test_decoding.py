"""Bytes -> upright RGB: every kind of picture and of damage, and the same pixels from both decoders."""

import concurrent.futures
import functools
import io
import json
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from dino_core import decoding
from dino_core.decoding import SUPPORTED_FORMATS, ImageHeader, ImageLimits, decode, read_header
from dino_core.errors import ImageError
from dino_core.headers import scan_jpeg

SHARED = Path(os.environ.get("DINO_SHARED", Path(__file__).parents[2].parent / "shared"))
ODD_IMAGES = SHARED / "data" / "odd-images"
ANY_SHAPE = ImageLimits(min_side_px=1, max_aspect_ratio=100_000)
# Damaged where we don't look; refused by Pillow, which reads the whole file.
MORE_THAN_PILLOW = {
    "fuzzing-corpus/gif/mozilla/6d939393058de0579fca1bbf10ecff25.gif",  # its second frame
    "wuffs/artificial-png/exif.png",  # its EXIF block
}
# One 16 x 24 picture with no symmetry, so that every turn and mirror shows.
PICTURE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)


FINEST: dict[str, dict[str, object]] = {
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 95, "subsampling": 0},
    "AVIF": {"quality": 100},
}


def encoded(picture: Image.Image | np.ndarray, image_format: str, **options: object) -> bytes:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def rgb(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def refusal(data: bytes, limits: ImageLimits = ImageLimits()) -> ImageError:  # noqa: B008 - frozen
    with pytest.raises(ImageError) as caught:
        decode(data, limits=limits)
    return caught.value


@pytest.mark.parametrize("image_format", SUPPORTED_FORMATS)
def test_every_format_is_read(image_format: str) -> None:
    options = FINEST.get(image_format, {})
    data = encoded(Image.fromarray(PICTURE), image_format, **options)
    assert read_header(data) == ImageHeader(image_format, width_px=24, height_px=16)
    difference = (decode(data).float() - rgb(Image.fromarray(PICTURE)).float()).abs().mean()
    assert difference < (12 if image_format in {"JPEG", "AVIF", "GIF"} else 1e-9)  # these lose


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_undone_as_pillow_does(image_format: str, orientation: int) -> None:
    lossless = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(PICTURE, image_format, exif=exif(orientation), **lossless)
    expected = rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert torch.equal(decode(data), expected)
    header = read_header(data)
    assert (header.width_px, header.height_px) == (24, 16)  # as stored


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_in_both_byte_orders_and_as_a_long(order: str) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(f"{order}HHHIHH", 2, 0x0100, 3, 1, 24, 0) + struct.pack(
        f"{order}HHII", 0x0112, 4, 1, 6
    )
    block = b"Exif\0\0" + mark + struct.pack(f"{order}I", 8) + entries
    assert decode(encoded(PICTURE, "JPEG", exif=block)).shape == (3, 24, 16)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"Exif\0\0", id="empty"),
        pytest.param(b"Exif\0\0XX*\0\x08\0\0\0", id="no byte order"),
        pytest.param(b"Exif\0\0II*\0\xff\xff\xff\xff", id="directory outside"),
        pytest.param(b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x01\x01", id="entries outside"),
        pytest.param(b"Exif\0\0II*\0\x08\0\0\0\0\0", id="no entries"),
    ],
)
def test_a_damaged_exif_block_leaves_the_picture_as_stored(block: bytes) -> None:
    assert decode(encoded(PICTURE, "JPEG", exif=block)).shape == (3, 16, 24)


def test_transparent_parts_are_white() -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[..., 3] = np.arange(16) * 17  # black, from clear to solid
    for image_format in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
        pixels = decode(encoded(rgba, image_format, **options))
        assert torch.equal(pixels[0, 0], 255 - torch.arange(16, dtype=torch.uint8) * 17)


def test_grey_with_alpha_is_grey_on_white() -> None:
    grey_and_alpha = Image.merge("LA", [Image.new("L", (16, 16), 100), Image.new("L", (16, 16), 51)])
    pixels = decode(encoded(grey_and_alpha, "PNG"))
    assert set(pixels.flatten().tolist()) == {224}  # 100 * 0.2 + 255 * 0.8


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(0, (0, 0, 8, 16))
    pixels = decode(encoded(image, "PNG", transparency=0))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 15].tolist() == [200, 0, 0]


def test_a_transparent_colour_is_white() -> None:
    image = Image.new("RGB", (16, 16), (1, 2, 3))
    image.paste((9, 8, 7), (0, 0, 8, 16))
    pixels = decode(encoded(image, "PNG", transparency=(9, 8, 7)))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 15].tolist() == [1, 2, 3]


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    samples = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pixels = decode(encoded(Image.fromarray(samples), "PNG"))
    assert pixels[0].flatten().tolist() == list(range(256))


def test_sixteen_bit_grey_may_have_a_transparent_value() -> None:
    samples = np.full((16, 16), 1000, np.uint16)
    samples[:, 8:] = 30_000
    pixels = decode(with_chunk(encoded(Image.fromarray(samples), "PNG"), b"tRNS", struct.pack(">H", 1000)))
    assert pixels[0, 0, 0] == 255
    assert pixels[0, 0, 15] == 30_000 >> 8


def test_one_bit_and_grey_pictures_become_rgb() -> None:
    bits = Image.fromarray(PICTURE[..., 0] > 127)
    for image_format in ("PNG", "BMP"):
        assert torch.equal(decode(encoded(bits, image_format)), rgb(bits))
    grey = encoded(PICTURE[..., 0], "JPEG")
    assert torch.equal(decode(grey), rgb(Image.open(io.BytesIO(grey))))


def test_cmyk_jpegs_become_rgb_as_in_pillow() -> None:
    data = encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG")
    assert torch.equal(decode(data), rgb(Image.open(io.BytesIO(data))))
    assert (decode(data).float() - rgb(Image.fromarray(PICTURE)).float()).abs().mean() < 12


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(image_format: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert decode(data)[:, 8, 8].tolist() == pytest.approx([255, 0, 0], abs=2)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_decoders_give_the_same_pixels(subsampling: int, progressive: bool) -> None:
    data = encoded(
        PICTURE.repeat(4, 0).repeat(4, 1), "JPEG", subsampling=subsampling, progressive=progressive
    )
    assert torch.equal(decode(data), rgb(Image.open(io.BytesIO(data))))
    halved = decode(data, shorter_side_px=32)
    assert halved.shape == (3, 32, 48)
    assert torch.equal(halved, with_pillow_alone(data, divisor=2))


@pytest.mark.parametrize(
    ("height_px", "width_px", "shorter_side_px", "divisor"),
    [
        pytest.param(128, 192, 64, 2, id="just large enough for a half"),
        pytest.param(126, 192, 64, 1, id="a little too small"),
        pytest.param(129, 192, 64, 1, id="an odd side"),
        pytest.param(512, 512, 64, 8, id="an eighth"),
        pytest.param(516, 512, 64, 4, id="divisible by four"),
        pytest.param(512, 512, None, 1, id="not allowed"),
    ],
)
def test_jpegs_are_scaled_only_where_no_row_is_cut(
    height_px: int, width_px: int, shorter_side_px: int | None, divisor: int
) -> None:
    data = encoded(np.zeros((height_px, width_px, 3), np.uint8), "JPEG")
    assert decode(data, shorter_side_px=shorter_side_px).shape == (
        3,
        height_px // divisor,
        width_px // divisor,
    )


def test_the_pixels_lie_in_rows_of_triples() -> None:
    for image_format in ("JPEG", "PNG"):
        pixels = decode(encoded(PICTURE, image_format))
        assert pixels.dtype == torch.uint8
        assert pixels[None].is_contiguous(memory_format=torch.channels_last)


def test_harmless_damage_is_forgiven_as_pillow_does() -> None:
    data = encoded(PICTURE, "JPEG")
    garbage_before_the_next_marker = data[:20] + b"\0\0\0\0" + data[20:]
    fill_bytes = data[:20] + b"\xff\xff\xff" + data[20:]
    standalone_marker = data[:20] + b"\xff\x01" + data[20:]
    expected = decode(data)
    assert scan_jpeg(garbage_before_the_next_marker) is None
    for damaged in (garbage_before_the_next_marker, fill_bytes, standalone_marker, data + b"tail"):
        assert torch.equal(decode(damaged), expected)
    assert read_header(garbage_before_the_next_marker) == ImageHeader("JPEG", 24, 16)


def test_a_jpeg_that_only_pillow_forgives_is_scaled_all_the_same() -> None:
    data = encoded(PICTURE.repeat(4, 0).repeat(4, 1), "JPEG")
    damaged = data[:-2] + b"\0\0\0\0" + data[-2:]  # libjpeg warns of bytes before the end marker
    assert decode(damaged, shorter_side_px=32).shape == (3, 32, 48)
    assert torch.equal(decode(damaged, shorter_side_px=32), decode(data, shorter_side_px=32))


@pytest.mark.parametrize("image_format", SUPPORTED_FORMATS)
def test_a_picture_cut_short_is_called_truncated(image_format: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(noise, image_format)
    for share in (0.5, 0.9):
        error = refusal(data[: int(len(data) * share)])
        assert error.code == "truncated_image"
        assert error.title == f"The image begins as {image_format} and ends too early."


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(b"", "empty_image", id="nothing"),
        pytest.param(b"hello, world", "unsupported_format", id="text"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format", id="SVG"),
        pytest.param(b"II*\0\x08\0\0\0", "unsupported_format", id="TIFF"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0", "unsupported_format", id="PostScript"),
        pytest.param(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported_format", id="HEIC"),
        pytest.param(b"\xff\xd8\xff", "truncated_image", id="the first bytes of a JPEG"),
        pytest.param(
            b"\xff\xd8\xff\xe0\0\0" + bytes(40) + b"\xff\xd9", "undecodable_image", id="JPEG, empty segment"
        ),
        pytest.param(
            b"\xff\xd8\xff\xda\0\x08" + bytes(40) + b"\xff\xd9", "undecodable_image", id="JPEG, no frame"
        ),
        pytest.param(b"\x89PNG\r\n\x1a\n", "truncated_image", id="the first bytes of a PNG"),
        pytest.param(b"GIF89a", "truncated_image", id="the first bytes of a GIF"),
        pytest.param(b"RIFF\x10\0\0\0WEBPVP8?" + bytes(40), "undecodable_image", id="an unknown WebP"),
        pytest.param(b"RIFF\xff\0\0\0WEBPVP8 ", "truncated_image", id="the first bytes of a WebP"),
        pytest.param(b"BM" + bytes(10), "undecodable_image", id="the first bytes of a BMP"),
        pytest.param(b"\0\0\0\x18ftypavif\0\0\0\0avifmif1\0\0\0\0", "undecodable_image", id="an empty AVIF"),
        pytest.param(b"\0\0\0\x18ftypavif\0\0\0\0avifmif1\0\0\1\0meta", "truncated_image", id="a short AVIF"),
        pytest.param(
            b"\0\0\0\x18ftypavif\0\0\0\0avifmif1\0\0\0\7meta", "undecodable_image", id="an impossible AVIF"
        ),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(data: bytes, code: str) -> None:
    assert refusal(data).code == code
    with pytest.raises(ImageError):
        read_header(data)


def test_a_jpeg_of_twelve_bits_is_called_unsupported() -> None:
    data = bytearray(encoded(PICTURE, "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    assert refusal(bytes(data)).code == "unsupported_format"


def test_a_jpeg_whose_frame_is_not_the_announced_one_is_not_trusted_with_memory() -> None:
    """Two frames: our scan believes the last, libjpeg the first; no more than announced is written."""
    data = encoded(np.zeros((64, 64, 3), np.uint8), "JPEG")
    frame = data.index(b"\xff\xc0")
    length = 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    second = bytearray(data[frame : frame + length])
    second[5:9] = struct.pack(">HH", 8, 8)
    assert (
        refusal(data[: frame + length] + bytes(second) + data[frame + length :]).code == "undecodable_image"
    )


LIMITS = ImageLimits(max_pixels=1000, min_side_px=10, max_aspect_ratio=3)


@pytest.mark.parametrize("image_format", SUPPORTED_FORMATS)
@pytest.mark.parametrize(
    ("width_px", "height_px", "code", "limit", "actual"),
    [
        pytest.param(40, 26, "image_too_large", 1000, 1040, id="too many pixels"),
        pytest.param(9, 20, "image_too_small", 10, 9, id="too narrow"),
        pytest.param(10, 31, "aspect_ratio_too_extreme", 3, 4, id="too long"),
    ],
)
def test_each_limit_refuses_by_the_header(
    image_format: str, width_px: int, height_px: int, code: str, limit: int, actual: int
) -> None:
    data = encoded(Image.new("RGB", (width_px, height_px)), image_format)
    for attempt in (functools.partial(decode, limits=LIMITS), functools.partial(read_header, limits=LIMITS)):
        with pytest.raises(ImageError) as caught:
            attempt(data)
        assert (caught.value.code, caught.value.limit, caught.value.actual) == (code, limit, actual)


@pytest.mark.parametrize("image_format", SUPPORTED_FORMATS)
@pytest.mark.parametrize("size", [(40, 25), (25, 40), (10, 30), (30, 10), (10, 10)])
def test_what_just_meets_the_limits_is_accepted(image_format: str, size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size), image_format)
    assert decode(data, limits=LIMITS).shape == (3, size[1], size[0])


@pytest.mark.parametrize("side_px", [9_500, 20_000])
def test_a_decompression_bomb_is_refused_by_its_header(side_px: int) -> None:
    """Above Pillow's warning and above its error: both sizes take the same way."""
    scan_lines = zlib.compress(bytes(1000))
    data = png(struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0), scan_lines)
    error = refusal(data)
    assert (error.code, error.limit, error.actual) == ("image_too_large", 89_478_485, side_px**2)


def test_of_an_avif_the_decoder_gives_the_size_and_the_limits_hold() -> None:
    data = encoded(PICTURE, "AVIF")
    assert refusal(data, ImageLimits(max_pixels=383)).actual == 384


def test_pillows_own_bound_becomes_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    error = refusal(encoded(PICTURE, "PNG"))
    assert (error.code, error.limit) == ("image_too_large", decoding.PILLOW_MAX_PIXELS)


def test_warnings_of_pillow_stay_inside_and_filters_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)  # 384 pixels: a warning, not yet an error
    before = list(warnings.filters)
    assert decode(encoded(PICTURE, "PNG")).shape == (3, 16, 24)
    assert warnings.filters == before


def test_warnings_stay_inside_and_pixels_apart_in_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    before = list(warnings.filters)
    pictures = [np.full((16, 24, 3), value, np.uint8) for value in range(0, 250, 5)]
    files = [encoded(picture, image_format) for picture in pictures for image_format in ("PNG", "JPEG")]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(decode, files))
    for value, pixels in zip((v for v in range(0, 250, 5) for _ in range(2)), decoded, strict=True):
        assert (pixels.float() - value).abs().max() <= 2  # JPEG is not exact
    assert warnings.filters == before


def test_pillows_global_settings_are_left_alone() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


@pytest.mark.parametrize(
    "limits",
    [{"max_pixels": 0}, {"max_pixels": 2**40}, {"min_side_px": 0}, {"max_aspect_ratio": 0}],
    ids=lambda limits: next(iter(limits)),
)
def test_limits_that_mean_nothing_cannot_be_set(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        ImageLimits(**limits)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_gives_anything_but_pixels_or_an_image_error(data: st.DataObject) -> None:
    good = bytearray(GOOD[data.draw(st.sampled_from(sorted(GOOD)))])
    for _ in range(data.draw(st.integers(0, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)))])
    try:
        pixels = decode(damaged)
    except ImageError:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3


def test_every_odd_image_gives_pixels_or_its_error_and_no_less_than_pillow_reads() -> None:
    outcomes: Counter[tuple[bool, bool]] = Counter()
    titles: set[str] = set()
    for entry, data in odd_images():
        image_format = "JPEG" if entry["format"] == "MPO" else entry["format"]
        try:
            pixels = decode(data, limits=ANY_SHAPE)
        except ImageError as error:
            decoded = False
            titles.add(error.title)
        else:
            assert pixels.dtype == torch.uint8
            assert pixels.ndim == 3
            assert sorted(pixels.shape[1:]) == sorted(entry["size"])
            decoded = True
        if image_format in SUPPORTED_FORMATS:
            expected = entry["pillow_13_decodes"] or entry["file"] in MORE_THAN_PILLOW
            assert decoded == expected, entry["file"]
        outcomes[decoded, image_format in SUPPORTED_FORMATS] += 1
    assert outcomes[True, False] == 0
    assert outcomes[True, True] > 1000
    assert outcomes[False, True] > 100
    assert len({re.sub(r"[0-9,]+", "n", title) for title in titles}) < 30  # our words, never a decoder's


def test_every_odd_jpeg_has_the_pixels_and_the_orientation_that_pillow_gives_it() -> None:
    compared = 0
    for entry, data in odd_images():
        if entry["format"] in {"JPEG", "MPO"} and entry["pillow_13_decodes"]:
            pixels = decode(data, limits=ANY_SHAPE)
            assert torch.equal(pixels, with_pillow_alone(data)), entry["file"]
            compared += 1
    assert compared > 200


def odd_images() -> Iterator[tuple[dict[str, Any], bytes]]:
    if not ODD_IMAGES.is_dir():
        pytest.skip("needs ../shared/data/odd-images (or DINO_SHARED)")
    for line in (ODD_IMAGES / "MANIFEST.jsonl").read_text().splitlines():
        entry = json.loads(line)
        yield entry, (ODD_IMAGES / entry["file"]).read_bytes()


def with_pillow_alone(data: bytes, *, divisor: int = 1) -> Tensor:
    """The slow way for a JPEG that could go the fast one; the orientation by Pillow's own reading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        if divisor > 1:
            image.draft("RGB", (image.width // divisor, image.height // divisor))
        return rgb(ImageOps.exif_transpose(image))


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """Puts a chunk before a PNG's pixels."""
    at = data.index(b"IDAT") - 4
    return data[:at] + chunk(kind, content) + data[at:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(header: bytes, scan_lines: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", scan_lines) + chunk(b"IEND", b"")


GOOD = {image_format: encoded(PICTURE, image_format) for image_format in SUPPORTED_FORMATS} | {
    "JPEG, turned": encoded(PICTURE, "JPEG", exif=exif(6)),
    "JPEG, CMYK": encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "PNG, palette": encoded(Image.fromarray(PICTURE).quantize(16), "PNG"),
    "WEBP, lossless": encoded(PICTURE, "WEBP", lossless=True),
}
