"""What can go wrong in the numerics, as a tree.

    DinoError
    ├── ImageError           one picture cannot become pixels; `code` says why
    ├── BackboneError        no such network, or it cannot give an embedding
    ├── ProjectionError      a projection cannot be fitted, or is none
    ├── BundleError          a bundle on disk is missing, damaged or foreign
    ├── ConversionError      a model cannot be had in another format
    └── CollapseError        training has lost its signal

Messages say what was found, what was expected and what to do. They never repeat a decoder's own text, which
has leaked memory addresses elsewhere (CVE-2026-22778).
"""

from typing import Literal

ImageErrorCode = Literal[
    "empty_image",  # no bytes at all
    "unsupported_format",  # not one of the formats that we read
    "truncated_image",  # begins as an image and ends too early
    "undecodable_image",  # an image by its first bytes, but damaged
    "image_too_large",  # more pixels or bytes than the limit
    "image_too_small",  # a side below the limit
    "aspect_ratio_too_extreme",  # one side many times the other
]


class DinoError(Exception):
    """Anything that dino_core refuses, with a sentence for the user."""


class ImageError(DinoError):
    """One picture cannot become pixels.

    Attributes:
        code: Stable and machine-readable.
        title: One sentence for people; names no path and no decoder text.
        limit: The bound that was broken, if there is one.
        actual: What the picture has, in the unit of the limit.
    """

    def __init__(
        self, code: ImageErrorCode, title: str, *, limit: int | None = None, actual: int | None = None
    ) -> None:
        super().__init__(title)
        self.code: ImageErrorCode = code
        self.title = title
        self.limit = limit
        self.actual = actual


class BackboneError(DinoError):
    """There is no such network, or it cannot give an embedding."""


class ProjectionError(DinoError):
    """A projection of embeddings cannot be fitted, or is none."""


class BundleError(DinoError):
    """A bundle on disk is missing, damaged or foreign."""


class ConversionError(DinoError):
    """A model cannot be had in another format."""


class CollapseError(DinoError):
    """Training has lost its signal, and going on would waste the time."""
