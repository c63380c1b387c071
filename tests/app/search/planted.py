"""Vectors with a structure that is known, and real collections of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.search.collection import Collection, Item, Vector
from app.search.embedded.library import Collections
from app.search.reading.spool import Spool, open_spool, write_spool

MODEL = "sha256:model"


def directions(count: int, dimensions: int, *, seed: int = 0) -> Vector:
    """Unit vectors at random: in many dimensions all are about at right angles."""
    vectors = np.random.default_rng(seed).normal(size=(count, dimensions))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def at_cosine(vector: Vector, cosine: float, *, seed: int = 0) -> Vector:
    """A unit vector of a given cosine to another."""
    # A stream of numbers that `directions` never uses.
    other = np.random.default_rng([seed, 1]).normal(size=len(vector))
    across = other - vector * (other @ vector)
    across /= np.linalg.norm(across)
    return np.asarray(cosine * vector + np.sqrt(1 - cosine**2) * across, np.float32)


def clusters(
    count: int, *, each: int, dimensions: int = 32, spread: float = 0.3, seed: int = 0
) -> tuple[Vector, npt.NDArray[np.int64]]:
    """Unit vectors around random directions, and whose each is; `spread` 1 is as far as those are long."""
    labels = np.repeat(np.arange(count), each)
    noise = directions(len(labels), dimensions, seed=seed + 1)
    vectors = directions(count, dimensions, seed=seed)[labels] + spread * noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), labels


def fill(
    collection: Collection, vectors: Vector, *, hashes: Sequence[str] | None = None, first: int = 0
) -> list[str]:
    """Adds vectors with ids in their order.

    Returns:
        The ids.
    """
    ids = [f"item/{first + index:06}" for index in range(len(vectors))]
    hashes = hashes or [""] * len(vectors)
    items = [
        Item(id=item_id, vector=vector, metadata={}, sha256=sha256)
        for item_id, vector, sha256 in zip(ids, vectors, hashes, strict=True)
    ]
    for start in range(0, len(items), 1_000):
        collection.upsert(items[start : start + 1_000], fingerprint=MODEL)
    return ids


def spool_of(folder: Path, vectors: Vector, *, hashes: Sequence[str] | None = None) -> Spool:
    """A spool of a real collection on disk, whose rows are those of `vectors`."""
    number = sum(1 for _ in folder.glob("spool-*"))
    with Collections.open(folder / f"data-{number}") as collections:
        dimensions = vectors.shape[1]
        collection = collections.create("default", fingerprint=MODEL, dimensions=dimensions)
        fill(collection, vectors, hashes=hashes)
        spool = folder / f"spool-{number}"
        spool.mkdir()
        write_spool(collection, spool, report=ignore, is_cancelled=lambda: False)
    return open_spool(spool, dimensions=dimensions)


def ignore(share: float) -> None:
    """A report of progress that nobody reads; shares are shares."""
    assert 0 <= share <= 1
