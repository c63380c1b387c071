"""A collection's items as flat files, for a process that computes with them in bounded memory.

Dimension key: N items, in order of id · D embedding
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from app.search.collection import Collection, Vector
from app.search.reading.file import Array, Ids

PAGE_ITEMS: Final = 250  # a page is made under the interpreter's lock, in about 5 ms
_SHA256_BYTES: Final = 32
_NO_HASH: Final = bytes(_SHA256_BYTES)
_VECTORS, _IDS, _ENDS, _HASHES = "vectors.f32", "ids.utf8", "ends.i64", "sha256.u8"


@dataclass(frozen=True)
class Spool:
    """Items of one collection.

    Attributes:
        ids: Of the N items.
        vectors_ND: float32, of length 1, mapped.
        hashes: uint8 [N, 32], SHA-256 of the images' bytes, mapped; zeros where no image was given.
    """

    ids: Ids
    vectors_ND: Vector
    hashes: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.ids)


def write_spool(
    collection: Collection, folder: Path, *, report: Callable[[float], None], is_cancelled: Callable[[], bool]
) -> None:
    """Copies all items, page by page; others may read and write meanwhile.

    Between pages it rests as long as a page took, so that requests in this process wait for one page at most.

    Args:
        collection: To copy.
        folder: Empty.
        report: Told what share is done.
        is_cancelled: Asked after each page; once it says so, the copy stops where it is.

    Raises:
        UnknownCollection: The collection was dropped meanwhile.
        OSError: The files can't be written.
    """
    expected = max(1, collection.count())
    written = end = 0
    cursor: str | None = None
    with (
        (folder / _VECTORS).open("wb") as vectors,
        (folder / _IDS).open("wb") as ids,
        (folder / _ENDS).open("wb") as ends,
        (folder / _HASHES).open("wb") as hashes,
    ):
        while not is_cancelled():
            started_s = time.perf_counter()
            page = collection.scroll(cursor=cursor, limit=PAGE_ITEMS)
            texts = [item.id.encode() for item in page.items]
            if texts:
                lengths = np.array([len(text) for text in texts], dtype="<i8")
                ends.write((lengths.cumsum() + end).tobytes())
                end += int(lengths.sum())
                ids.write(b"".join(texts))
                vectors.write(np.stack([item.vector for item in page.items]).astype("<f4").tobytes())
                hashes.write(b"".join(bytes.fromhex(item.sha256) or _NO_HASH for item in page.items))
            written += len(texts)
            report(min(1.0, written / expected))
            cursor = page.next_cursor
            if cursor is None:
                return
            time.sleep(time.perf_counter() - started_s)


def open_spool(folder: Path, *, dimensions: int) -> Spool:
    """Maps what `write_spool` wrote."""
    ends = _mapped(folder / _ENDS, "<i8", ())
    return Spool(
        ids=Ids(_mapped(folder / _IDS, "u1", ()), ends),
        vectors_ND=_mapped(folder / _VECTORS, "<f4", (dimensions,)),
        hashes=_mapped(folder / _HASHES, "u1", (_SHA256_BYTES,)),
    )


def _mapped(path: Path, dtype: str, row: Sequence[int]) -> Array:
    if path.stat().st_size == 0:
        return np.empty((0, *row), dtype)
    return np.memmap(path, dtype, mode="r").reshape(-1, *row)
