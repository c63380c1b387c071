"""What files say of themselves, before admission: cheap, and no pixel is decoded."""

import logging

from app.inference.config import InferenceConfig
from app.inference.results import ImageFailure
from dino_core.errors import ImageError
from dino_core.preprocess import ImageHeader, read_header

logger = logging.getLogger(__name__)


def header_of(data: bytes, config: InferenceConfig) -> ImageHeader | ImageFailure:
    """Reads a file's format and size, or says why the file is refused."""
    limit = config.max_image_bytes
    if len(data) > limit:
        return ImageFailure(
            "image_too_large",
            f"The image has {len(data):,} bytes, at most {limit:,} are accepted.",
            limit=limit,
            actual=len(data),
        )
    try:
        return read_header(data, limits=config.limits)
    except ImageError as error:
        return ImageFailure(error.code, error.title, limit=error.limit, actual=error.actual)
    except Exception:
        # One picture's harm must stay its own, also where a parser meets what its author didn't foresee.
        logger.exception("a header could not be read in an unforeseen way")
        return ImageFailure("undecodable_image", "The image could not be decoded.")
