"""Small pictures to look at, made when a picture joins a collection. No HTTP, no storage."""

import io

from PIL import Image

from dino_core.preprocess import ImageLimits, decode

_DEFAULT_LIMITS = ImageLimits()

THUMBNAIL_PX = 320  # longest side: a 3:2 photograph, cropped to a square, is sharp at 200 pixels
_QUALITY = 80  # WebP; about 10 kB for a photograph


def make_thumbnail(data: bytes, *, limits: ImageLimits = _DEFAULT_LIMITS) -> bytes:
    """Makes a WebP of a file, oriented and over white as the model sees it, but not cropped.

    Releases the interpreter's lock while it decodes, resizes and encodes; call it from a thread.

    Args:
        data: A whole file, in any of the formats that we read.
        limits: What the picture may ask of the decoder.

    Returns:
        WebP; its longer side is at most `THUMBNAIL_PX`, and a smaller picture keeps its size.

    Raises:
        ImageError: The file can't be decoded.
    """
    rgb_HWC = decode(data, limits=limits, shorter_side_px=THUMBNAIL_PX).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(rgb_HWC)
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=_QUALITY, method=4)
    return encoded.getvalue()
