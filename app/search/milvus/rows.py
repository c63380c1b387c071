"""Items as rows of a Milvus collection, and what a batch of items means to the rows that are there."""

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from app.errors import InvalidItem
from app.search.collection import Item, Json, UpsertStatus, Vector
from app.search.milvus.filters import TERMS, terms_of
from app.search.milvus.table import MAX_TEXT_BYTES, Row
from app.search.rows import CheckedItems

MAX_THUMBNAIL_BYTES = MAX_TEXT_BYTES // 4 * 3  # as base64
ITEM_FIELDS = ("vector", "metadata", "sha256", "source")
EVERY_FIELD = (*ITEM_FIELDS, TERMS, "thumbnail", "has_thumbnail")
COMPARED_FIELDS = ("metadata", "sha256", "source", "has_thumbnail")

logger = logging.getLogger(__name__)


def _new_row(checked: CheckedItems, i: int) -> Row:
    """An item of a batch as it shall be kept."""
    item = checked.items[i]
    terms = terms_of(item.metadata)
    terms_bytes = len(json.dumps(terms, ensure_ascii=False, separators=(",", ":")).encode())
    if terms_bytes > MAX_TEXT_BYTES:
        raise InvalidItem(
            f"the metadata of item {i} takes {terms_bytes:,} bytes in the form that Milvus filters; at most "
            f"{MAX_TEXT_BYTES:,} can be kept. Keys with many signs and lists of short values take most"
        )
    thumbnail = _kept_thumbnail(item)
    if thumbnail is not item.thumbnail:
        logger.warning(
            "the thumbnail of %r is larger than the %d bytes that Milvus keeps: it has none there",
            item.id,
            MAX_THUMBNAIL_BYTES,
        )
    return {
        "id": item.id,
        "vector": checked.vectors_ND[i],
        TERMS: terms,
        "metadata": checked.metadata[i],
        "sha256": item.sha256,
        "source": _stored_source(item.source),
        "thumbnail": base64.b64encode(thumbnail or b"").decode("ascii"),
        "has_thumbnail": thumbnail is not None,
        "deleted_ms": 0,
    }


def plan(checked: CheckedItems, known: Mapping[str, Row]) -> tuple[list[UpsertStatus], list[Row]]:
    """What each item means, and what must be written: of each id the last, if it isn't there already.

    Args:
        checked: The batch.
        known: The rows that are there and not deleted, with `COMPARED_FIELDS`, and the vectors of those whose
            items have no hash.

    Raises:
        InvalidItem: The copy of an item's metadata for filters is more than Milvus keeps.
    """
    statuses: list[UpsertStatus] = []
    written: dict[str, Row] = {}
    for i, item in enumerate(checked.items):
        row = written.get(item.id) or known.get(item.id)
        if row is not None and _says_the_same(row, checked, i):
            statuses.append("unchanged")
            continue
        statuses.append("added" if row is None else "updated")
        written[item.id] = _new_row(checked, i)
    return statuses, list(written.values())


def _says_the_same(row: Row, checked: CheckedItems, i: int) -> bool:
    """Whether writing the item would change nothing. The same image has the same vector, but for rounding."""
    item = checked.items[i]
    return (
        row["sha256"] == item.sha256
        and row["metadata"] == checked.metadata[i]
        and row["source"] == _stored_source(item.source)
        and (row["has_thumbnail"] or _kept_thumbnail(item) is None)
        and (item.sha256 != "" or vector_of(row).tobytes() == checked.vectors_ND[i].tobytes())
    )


def item_of(row: Row) -> Item:
    """A row as the item that it keeps, without its thumbnail."""
    return Item(
        id=row["id"],
        vector=vector_of(row),
        metadata=metadata_of(row),
        sha256=row["sha256"],
        source=row["source"][1:] if row["source"] else None,
    )


def metadata_of(row: Row) -> dict[str, Json]:
    """The metadata of a row."""
    return cast("dict[str, Json]", json.loads(row["metadata"]))


def vector_of(row: Row) -> Vector:
    """The vector of a row: float32 [D]."""
    return np.asarray(row["vector"], dtype=np.float32)


def vectors_of(rows: Sequence[Row], *, dimensions: int) -> Vector:
    """The vectors of rows: float32 [N, D]."""
    return np.array([row["vector"] for row in rows], dtype=np.float32).reshape(-1, dimensions)


def thumbnail_of(row: Row) -> bytes | None:
    """The thumbnail of a row, or None."""
    return base64.b64decode(row["thumbnail"]) if row["has_thumbnail"] else None


def _stored_source(source: str | None) -> str:
    """None and an empty source are two things, and every text of Milvus's is a text."""
    return "" if source is None else f"={source}"


def _kept_thumbnail(item: Item) -> bytes | None:
    fits = item.thumbnail is not None and len(item.thumbnail) <= MAX_THUMBNAIL_BYTES
    return item.thumbnail if fits else None
