"""Items and questions that the contract tests share."""

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from app.search.collection import Collection, Item
from app.search.milvus.library import MilvusCollections

D = 8
MODEL = "sha256:model"


def vectors(count: int, *, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)


def items(count: int, *, seed: int = 0) -> list[Item]:
    return [
        Item(
            id=f"album/{i:04}", vector=vector, metadata={"number": i, "even": i % 2 == 0}, sha256=f"{i:064x}"
        )
        for i, vector in enumerate(vectors(count, seed=seed))
    ]


def ids_found(collection: Collection, query: npt.NDArray[np.floating], **asked: Any) -> list[str]:  # noqa: ANN401
    (neighbours,) = collection.search(query[None], **({"k": 10} | asked))
    return [neighbour.id for neighbour in neighbours]


@contextlib.contextmanager
def milvus_collections(url: str) -> Iterator[MilvusCollections]:
    """The collections of a space that no other test has; they are dropped at the end."""
    with MilvusCollections.open(url, space=f"t{secrets.token_hex(8)}") as collections:
        try:
            yield collections
        finally:
            for info in collections.list():
                collections.drop(info.name)
