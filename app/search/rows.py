"""Items and queries as callers give them, checked and made into what is kept and searched.

Dimension key: N items or queries · D embedding
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.errors import InvalidItem, InvalidVector
from app.search.collection import Item, Vector
from app.search.filters import is_storable_text

MAX_ID_BYTES = 256
MAX_METADATA_BYTES = 16_000
MAX_METADATA_DEPTH = 8
MAX_SOURCE_BYTES = 4_096
MAX_THUMBNAIL_BYTES = 256 * 1024
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SHA256 = re.compile("[0-9a-f]{64}")
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class CheckedItems:
    """Items that can be kept.

    Attributes:
        items: As they came.
        metadata: Their metadata as JSON text, keys sorted, so that equal objects are equal texts.
        vectors_ND: Normalised.
    """

    items: Sequence[Item]
    metadata: list[str]
    vectors_ND: Vector


def check_items(items: Sequence[Item], *, dimensions: int) -> CheckedItems:
    """Checks all items of a batch before any is written.

    Raises:
        InvalidItem: An id, metadata, hash, source or thumbnail can't be kept.
        InvalidVector: A vector is not [D], not finite, or zero.
    """
    metadata: list[str] = []
    for index, item in enumerate(items):
        where = f"item {index}"
        check_id(item.id, where=where)
        metadata.append(check_words(metadata=item.metadata, source=item.source, where=where))
        _check_bytes(item, where=where)
        if np.shape(item.vector) != (dimensions,):
            raise InvalidVector(_wrong_shape(np.shape(item.vector), dimensions=dimensions, where=where))
    if not items:
        return CheckedItems(items, metadata, np.empty((0, dimensions), dtype=np.float32))
    vectors_ND = np.stack([np.asarray(item.vector) for item in items])
    return CheckedItems(items, metadata, unit_vectors(vectors_ND, dimensions=dimensions, what="item"))


def unit_vectors(vectors_ND: npt.NDArray[np.floating], *, dimensions: int, what: str = "query") -> Vector:
    """Vectors of length 1, in the same directions: float32 [N, D].

    Args:
        vectors_ND: Any float dtype.
        dimensions: D that it must have.
        what: What a row is, for the message.

    Raises:
        InvalidVector: It is not [N, D] of numbers, or a row is not finite or zero.
    """
    if vectors_ND.ndim != 2 or vectors_ND.shape[1] != dimensions:
        raise InvalidVector(_wrong_shape(vectors_ND.shape[1:], dimensions=dimensions, where=what))
    if vectors_ND.dtype.kind not in "fiu":
        raise InvalidVector(f"a vector is a list of numbers, not of {vectors_ND.dtype}")
    wide_ND = vectors_ND.astype(np.float64)
    finite_N = np.isfinite(wide_ND).all(axis=1)
    if not finite_N.all():
        raise InvalidVector(f"the vector of {what} {int(np.argmin(finite_N))} has NaN or infinite numbers")
    # Divided by the largest number first: the squares of very small or large ones leave float64.
    largest_N = np.abs(wide_ND).max(axis=1, initial=0.0)
    if not largest_N.all():
        raise InvalidVector(
            f"the vector of {what} {int(np.argmin(largest_N))} is zero: it has no direction to compare"
        )
    wide_ND /= largest_N[:, None]
    wide_ND /= np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return wide_ND.astype(np.float32)


def _wrong_shape(shape: tuple[int, ...], *, dimensions: int, where: str) -> str:
    found = f"{shape[0]} dimensions" if len(shape) == 1 else f"the shape {list(shape)}"
    return f"the vector of {where} has {found}; this collection's have {dimensions}"


def check_id(item_id: str, *, where: str) -> None:
    """Refuses ids that can't be kept, shown and sorted everywhere.

    Raises:
        InvalidItem: It is empty, longer than 256 bytes, has control characters or half surrogate pairs, or is
            "." or "..", which clients take out of a URL, however it is encoded.
    """
    if not item_id or not is_storable_text(item_id) or _CONTROL.search(item_id):
        raise InvalidItem(f"the id of {where} must be text, not empty, without control characters")
    if item_id in {".", ".."}:
        raise InvalidItem(f"the id of {where} is {item_id!r}, which no URL can name: take another")
    size = len(item_id.encode())
    if size > MAX_ID_BYTES:
        raise InvalidItem(f"the id of {where} has {size} bytes of UTF-8; at most {MAX_ID_BYTES} can be kept")


def check_words(*, metadata: object, source: str | None, where: str) -> str:
    """Refuses what is said of an item and can't be kept.

    Returns:
        The metadata as JSON text.

    Raises:
        InvalidItem: The metadata or the source can't be kept.
    """
    if source is not None:
        if not is_storable_text(source):
            raise InvalidItem(f"the source of {where} must be Unicode text without NUL")
        if len(source.encode()) > MAX_SOURCE_BYTES:
            raise InvalidItem(f"the source of {where} is longer than {MAX_SOURCE_BYTES} bytes")
    return _metadata_text(metadata, where=where)


def _check_bytes(item: Item, *, where: str) -> None:
    if item.sha256 and not _SHA256.fullmatch(item.sha256):
        raise InvalidItem(f"the sha256 of {where} must be 64 lower-case hex digits, or empty")
    if item.thumbnail is not None and not 0 < len(item.thumbnail) <= MAX_THUMBNAIL_BYTES:
        size = len(item.thumbnail)
        raise InvalidItem(
            f"the thumbnail of {where} has {size} bytes; 1 to {MAX_THUMBNAIL_BYTES} can be kept"
        )


def _metadata_text(metadata: object, *, where: str) -> str:
    if not isinstance(metadata, dict):
        raise InvalidItem(f"the metadata of {where} must be a JSON object")
    _check_json(metadata, where=where, depth=1)
    text = _ENCODER.encode(metadata)
    size = len(text.encode())
    if size > MAX_METADATA_BYTES:
        raise InvalidItem(
            f"the metadata of {where} has {size:,} bytes of JSON; at most {MAX_METADATA_BYTES:,} can be kept"
        )
    return text


def _check_json(value: object, *, where: str, depth: int) -> None:
    if depth > MAX_METADATA_DEPTH:
        raise InvalidItem(f"the metadata of {where} is nested more than {MAX_METADATA_DEPTH} deep")
    match value:
        case list():
            for member in value:
                _check_json(member, where=where, depth=depth + 1)
        case dict():
            for key, member in value.items():
                if not isinstance(key, str) or not is_storable_text(key):
                    raise InvalidItem(
                        f"the metadata of {where} has a key that is not Unicode text without NUL"
                    )
                _check_json(member, where=where, depth=depth + 1)
        case _:
            if problem := _problem_with(value):
                raise InvalidItem(f"the metadata of {where} has {problem}")


def _problem_with(value: object) -> str | None:
    match value:
        case None | bool():
            return None
        case str():
            return None if is_storable_text(value) else "text with NUL or half a surrogate pair"
        case int():
            return None if -(2**63) <= value < 2**63 else "an integer beyond 64 bits; send it as text"
        case float():
            return None if np.isfinite(value) else "a number that is NaN or infinite"
        case _:
            return f"a {type(value).__name__}, which JSON has not"
