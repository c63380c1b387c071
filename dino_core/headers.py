"""What the first bytes of a picture say, read without a decoder: format, size, orientation.

Refusing a picture by its header must cost microseconds and must not hand the bytes to a decoder, so this is
plain parsing of bytes that may be hostile: every read is bounded, and what does not parse is `None`, never an
exception.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

FORMAT_MARKS = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
}
ORIENTATION_TAG = 0x0112
JPEG_END = b"\xff\xd9"
JPEG_SCAN = 0xDA
# Markers that carry no length: TEM and the eight restarts.
JPEG_STANDALONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
JPEG_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Baseline, extended and progressive, Huffman- or arithmetic-coded; the rest is lossless or hierarchical.
JPEG_COMMON_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC9, 0xCA})


@dataclass(frozen=True)
class JpegHeader:
    """What stands before the first scan of a JPEG.

    Attributes:
        width_px: As stored, before the orientation is applied.
        height_px: As stored, before the orientation is applied.
        components: 1 for grey, 3 for colour, 4 for CMYK and YCCK.
        is_common: Eight bits a sample, in one of the processes that libjpeg-turbo decodes.
        orientation: EXIF orientation, 1 to 8; 1 where there is none or it is damaged.
        scan_offset: Where the compressed data begins.
    """

    width_px: int
    height_px: int
    components: int
    is_common: bool
    orientation: int
    scan_offset: int


def sniff_format(data: bytes) -> str | None:
    """Names the format that the first bytes announce, in Pillow's spelling; None for all we don't read."""
    for image_format, marks in FORMAT_MARKS.items():
        if data.startswith(marks):
            return image_format
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and _has_avif_brand(data):
        return "AVIF"
    return None


def stored_size_px(data: bytes, image_format: str) -> tuple[int, int] | None:
    """Reads width and height from the header of a picture that is no JPEG.

    Args:
        data: The whole file.
        image_format: What `sniff_format` said of it.

    Returns:
        (width, height) in pixels as stored; None where the header is too short, or (AVIF) needs a real
        parser.
    """
    try:
        match image_format:
            case "PNG":
                return struct.unpack_from(">II", data, 16)
            case "GIF":
                return struct.unpack_from("<HH", data, 6)
            case "BMP":
                return _bmp_size_px(data)
            case "WEBP":
                return _webp_size_px(data)
            case _:
                return None
    except struct.error:
        return None


def scan_jpeg(data: bytes) -> JpegHeader | None:
    """Walks the segments of a JPEG up to its first scan.

    Args:
        data: The whole file, beginning with a JPEG's first marker.

    Returns:
        The header; None where the segments are not a clean chain (a decoder may still make sense of them).
    """
    frame = b""
    exif = b""
    try:
        for marker, start, end in _jpeg_segments(data):
            if marker in JPEG_FRAME_MARKERS:
                frame = data[start - 3 : end]  # with its marker, which names the coding process
            elif marker == 0xE1 and not exif and data.startswith(b"Exif\0\0", start):
                exif = data[start:end]
        process, precision_bits, height_px, width_px, components = struct.unpack_from(">BxxBHHB", frame)
    except (IndexError, struct.error):
        return None
    return JpegHeader(
        width_px=width_px,
        height_px=height_px,
        components=components,
        is_common=precision_bits == 8 and process in JPEG_COMMON_FRAMES,
        orientation=exif_orientation(exif),
        scan_offset=end,
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start, end) of each segment's content, the header of the first scan being the last.

    Raises:
        IndexError: The chain of segments breaks, or the file ends.
    """
    position = 2
    marker = 0
    while marker != JPEG_SCAN:
        if data[position] != 0xFF:
            raise IndexError(position)
        while data[position] == 0xFF:  # any number of fill bytes may stand before a marker
            position += 1
        marker = data[position]
        position += 1
        if marker in JPEG_STANDALONE_MARKERS:
            continue
        length = data[position] << 8 | data[position + 1]
        if length < 2:
            raise IndexError(position)
        yield marker, position + 2, position + length
        position += length


def exif_orientation(exif: bytes) -> int:
    """Finds the orientation in an EXIF block, as browsers do: in its first directory, and nowhere else.

    Args:
        exif: A TIFF structure, with or without the leading "Exif" mark.

    Returns:
        1 to 8; 1 ("as stored") where there is none or the block is damaged.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == ORIENTATION_TAG:
                # A SHORT by the standard; some writers store a LONG.
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", tiff, entry + 8)
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def ends_early(data: bytes, image_format: str) -> bool:
    """Says whether a picture that failed to decode lacks its end, as after a broken download."""
    match image_format:
        case "JPEG":
            header = scan_jpeg(data)
            return data.find(JPEG_END, header.scan_offset if header else len(data) - 2) < 0
        case "PNG":
            return data.rfind(b"IEND") < 0
        case "GIF":
            return not data.endswith(b";")
        case "BMP":
            return int.from_bytes(data[2:6], "little") > len(data)
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 > len(data)
        case _:
            return _box_runs_over(data)


def _has_avif_brand(data: bytes) -> bool:
    """A file-type box lists its brands in fours: major, version, then the compatible ones."""
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    return any(brands[i : i + 4] in (b"avif", b"avis") for i in range(0, len(brands), 4))


def _bmp_size_px(data: bytes) -> tuple[int, int]:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    if header_bytes == 12:  # OS/2 1.x
        width_px, height_px = struct.unpack_from("<HH", data, 18)
        return width_px, height_px
    width_px, height_px = struct.unpack_from("<Ii", data, 18)
    return width_px, abs(height_px)  # a negative height means "top row first"


def _webp_size_px(data: bytes) -> tuple[int, int] | None:
    match data[12:16]:
        case b"VP8X":
            low_and_high = struct.unpack_from("<HBHB", data, 24)  # two 24-bit numbers, each less one
            return 1 + low_and_high[0] + (low_and_high[1] << 16), 1 + low_and_high[2] + (
                low_and_high[3] << 16
            )
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF  # the upper two bits are a display hint
        case _:
            return None


def _box_runs_over(data: bytes) -> bool:
    position = 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if size < 8:  # 0 is "to the end", 1 is a 64-bit size, the others are damage
            return False
        position += size
    return position > len(data)
