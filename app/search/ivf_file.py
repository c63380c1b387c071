"""An IVF on disk, so that a big collection need not be cut into lists again at each start.

It is derived: whatever is wrong with the file, it is read as if it weren't there, and made anew. A file is
written beside and renamed, so that it is whole or not there, whenever the process is killed.

    "DINOIVF1" · length of the header · header (JSON) · arrays, in the header's order · BLAKE2b of all that

As a rid never changes its vector, a file stays right whatever is written to the collection later. It is wrong
where the database was put back to an older state, or another's file was copied here. So it carries a number
of each row's vector, and is refused if one of them differs or a living row is missing.

Dimension key: N slots · D embedding · E turned embedding
"""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import numpy.typing as npt

from app.search.codes import Rotation
from app.search.ivf import Ivf, Setting, marks_of
from app.search.snapshot import Snapshot

logger = logging.getLogger(__name__)

_MAGIC = b"DINOIVF1"
_DIGEST_BYTES = 32


def write_ivf(path: Path, ivf: Ivf, *, key: str) -> None:
    """Puts a file in place of the one that is there, at once.

    Args:
        path: In a directory that is there.
        ivf: What to write.
        key: Names the collection.

    Raises:
        OSError: It can't be written.
    """
    arrays: list[npt.NDArray[Any]] = [
        ivf.rids,
        ivf.marks,
        ivf.rotation.matrix_ED,
        faiss.serialize_index(ivf.index),
    ]
    header = {
        "key": key,
        "trained_rows": ivf.trained_rows,
        "tuned_rows": ivf.tuned_rows,
        "settings": [[s.k, s.probes, s.depth, s.recall] for s in ivf.settings],
        "arrays": [[array.dtype.str, list(array.shape)] for array in arrays],
    }
    words = json.dumps(header).encode()
    new = path.with_suffix(".new")
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    parts: list[bytes | memoryview] = [_MAGIC, len(words).to_bytes(8, "little"), words]
    parts += [array.data for array in arrays]
    with new.open("wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read_ivf(path: Path, snapshot: Snapshot, *, key: str) -> Ivf | None:
    """The IVF of a file, if it is whole and of these rows; else None, and a line in the log that says why."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s can't be read (%s): it is made anew", path.name, error.strerror)
        return None
    try:
        return _parsed(memoryview(content), snapshot, key=key)
    except _Unusable as error:
        logger.warning("%s is not used (%s): it is made anew", path.name, error)
        return None


class _Unusable(Exception):
    """Why a file is not used."""


def _parsed(content: memoryview, snapshot: Snapshot, *, key: str) -> Ivf:
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if bytes(body[: len(_MAGIC)]) != _MAGIC:
        raise _Unusable("it is of another kind or version")
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        raise _Unusable("it is damaged")
    # What comes now was written by us: the digest says so.
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(body[len(_MAGIC) : start], "little")
    header = json.loads(bytes(body[start:end]))
    if header["key"] != key:
        raise _Unusable("it is another collection's")
    arrays: list[npt.NDArray[Any]] = []
    for dtype, shape in header["arrays"]:
        count = int(np.prod(shape))
        arrays.append(np.frombuffer(body, dtype=dtype, count=count, offset=end).reshape(shape))
        end += arrays[-1].nbytes
    rids, marks, matrix, index = arrays
    try:
        loaded = cast(faiss.IndexIVFRaBitQFastScan, faiss.deserialize_index(index))
    except RuntimeError as error:  # another version of faiss may not know it
        raise _Unusable("faiss can't read it") from error
    ivf = Ivf(
        index=loaded,
        rids=rids.copy(),  # a copy, as all others: or the whole file would stay in memory
        marks=marks.copy(),
        rotation=Rotation(matrix.copy()),
        trained_rows=header["trained_rows"],
        settings=tuple(Setting(*words) for words in header["settings"]),
        tuned_rows=header["tuned_rows"],
    )
    if not _is_of(ivf, snapshot):
        raise _Unusable("it is of other vectors")
    return ivf


def _is_of(ivf: Ivf, snapshot: Snapshot) -> bool:
    """Whether the IVF has all living rows that are older than its newest, with the vectors that they have."""
    for view in snapshot.views:
        rows = view.living_rows()
        rows = rows[view.chunk.rids[rows] <= ivf.covered_rid]
        rids = view.chunk.rids[rows]
        slots = ivf.slots_of(rids)
        if len(slots) != len(rids):
            return False
        if not np.array_equal(marks_of(rids, view.chunk.vectors, rows), ivf.marks[slots]):
            return False
    return True


def remove_file(path: Path) -> None:
    """Removes a file; where that can't be, it stays, and the next start tries again."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
