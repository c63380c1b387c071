"""Writes to a collection for ever, and says what it does: run it with a directory and a seed, and kill it.

A line before each operation (`["try", operation]`), and one when it has returned (`["ack", operation]`).
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.search.collection import Item
from app.search.library import Collections

DIMENSIONS = 24
NAMES = 400
THUMBNAIL = b"x" * 200


def vector_of(name: str, version: int) -> npt.NDArray[np.float32]:
    """The vector that an item of this name and version has."""
    return np.random.default_rng([int(name), version]).normal(size=DIMENSIONS).astype(np.float32)


def item_of(name: str, version: int) -> Item:
    """The item that is written."""
    return Item(id=name, vector=vector_of(name, version), metadata={"version": version}, thumbnail=THUMBNAIL)


def say(word: str, operation: dict[str, object]) -> None:
    """One line, out of this process before it goes on."""
    sys.stdout.write(json.dumps([word, operation]) + "\n")
    sys.stdout.flush()


def write_for_ever(directory: Path, *, seed: int) -> None:
    """Upserts and deletes until somebody kills the process."""
    rng = random.Random(seed)
    collections = Collections.open(directory)
    if not collections.list():
        collections.create("default", fingerprint="f", dimensions=DIMENSIONS)
    collection = collections.get("default")
    say("open", {})
    version = seed * 1_000_000
    while True:
        version += 1
        names = [f"{rng.randrange(NAMES):03}" for _ in range(rng.choice([1, 1, 8, 64]))]
        operation: dict[str, object] = {"names": names, "version": None if rng.random() < 0.25 else version}
        say("try", operation)
        if operation["version"] is None:
            collection.delete(names)
        else:
            collection.upsert([item_of(name, version) for name in names], fingerprint="f")
        say("ack", operation)


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]), seed=int(sys.argv[2]))
