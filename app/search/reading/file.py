"""What was computed about a collection, as a file: arrays that are mapped into memory, not read.

The format is safetensors, with a checksum over everything. These files are derived: one that is damaged, or
of another version of this program, is as good as none, and is computed again.
"""

import json
import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from app.search.collection import Json

Array: TypeAlias = npt.NDArray[Any]

VERSION: Final = 1  # of the meaning of all arrays; a file of another version is computed again
_DTYPES: Final = {
    "F32": "<f4",
    "F64": "<f8",
    "I32": "<i4",
    "I64": "<i8",
    "U64": "<u8",
    "U8": "u1",
    "BOOL": "?",
}
_LENGTH_BYTES: Final = 8  # a safetensors file begins with the length of its header, little-endian
_CHECKED_AT_ONCE: Final = 1 << 24


class DamagedReading(Exception):
    """The file is cut short, changed, or not one of ours; it is to be computed again."""


@dataclass(frozen=True)
class Kept:
    """One file.

    Attributes:
        facts: JSON, of whoever wrote it.
        arrays: By name, mapped; not to be written.
    """

    facts: Mapping[str, Any]
    arrays: Mapping[str, Array]


class Ids:
    """Many texts in two arrays: a million ids as Python strings would take 100 MB.

    Attributes:
        text: uint8, the UTF-8 of all, without separators.
        ends: int64 [N], where each ends.
    """

    def __init__(self, text: Array, ends: npt.NDArray[np.int64]) -> None:
        self.text = text
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> list[str]:
        """The ids of some rows, in their order."""
        rows = np.asarray(rows, dtype=np.int64)
        ends = self.ends[rows]
        starts = np.where(rows > 0, self.ends[np.maximum(rows - 1, 0)], 0)
        return [
            self.text[start:end].tobytes().decode()
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]


def write_kept(path: Path, facts: Mapping[str, Json], arrays: Mapping[str, Array]) -> None:
    """Writes a file, whole or not at all.

    It is not synced: a power cut may damage it, which its checksum tells.

    Args:
        path: Replaced if it is there.
        facts: What the arrays are of.
        arrays: By name.
    """
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps({**facts, "version": VERSION}, sort_keys=True)
    beside = path.with_name(f"{path.name}.part")
    save_file(plain, beside, metadata={"facts": text, "checksum": str(_checksum(text, plain))})
    os.replace(beside, path)


def read_kept(path: Path) -> Kept | None:
    """Maps a file into memory, and checks all of it once.

    Returns:
        None if there is no file.

    Raises:
        DamagedReading: It is not whole, or not of this version.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise DamagedReading(str(error)) from None
    try:
        kept, text, checksum = _parsed(mapped)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedReading(f"its header can't be read: {error!r}") from None
    if _checksum(text, kept.arrays) != checksum:
        raise DamagedReading("its checksum is another")
    if kept.facts.get("version") != VERSION:
        raise DamagedReading(f"it is of version {kept.facts.get('version')}, this program writes {VERSION}")
    return kept


def _parsed(mapped: mmap.mmap) -> tuple[Kept, str, int]:
    header_bytes = int.from_bytes(mapped[:_LENGTH_BYTES], "little")
    first = _LENGTH_BYTES + header_bytes
    header = json.loads(mapped[_LENGTH_BYTES:first])
    metadata = header.pop("__metadata__")
    arrays: dict[str, Array] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        count = (stop - start) // dtype.itemsize
        flat = np.empty(0, dtype)
        if count:  # numpy takes no empty piece of a buffer
            flat = np.frombuffer(mapped, dtype, count=count, offset=first + start)
        arrays[name] = flat.reshape(entry["shape"])
    text = metadata["facts"]
    return Kept(json.loads(text), arrays), text, int(metadata["checksum"])


def _checksum(text: str, arrays: Mapping[str, Array]) -> int:
    value = zlib.crc32(text.encode())
    for name, array in sorted(arrays.items()):
        value = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), value)
        flat = array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
        for start in range(0, len(flat), _CHECKED_AT_ONCE):
            value = zlib.crc32(flat[start : start + _CHECKED_AT_ONCE].data, value)
    return value
