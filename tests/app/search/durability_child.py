"""Writes to collections until it is killed, and says what it does: each line of stdin starts one that does.

It imports once and forks for each, so that a thousand kills take minutes. A line is `DIRECTORY SEED`; a line
goes out before each operation (`["try", operation]`) and one when it has returned (`["ack", operation]`).
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.search.collection import Item, Json
from app.search.embedded import upkeep
from app.search.embedded.library import Collections
from app.search.memory import index, maintenance

DIMENSIONS = 24
NAMES = 400
THUMBNAIL = b"x" * 200
MAIN = "main"

Operation = dict[str, Any]


def vector_of(name: str, version: int) -> npt.NDArray[np.float32]:
    """The vector that an item of this name and version has."""
    return np.random.default_rng([int(name), version]).normal(size=DIMENSIONS).astype(np.float32)


def item_of(name: str, version: int) -> Item:
    """The item that is written."""
    metadata: dict[str, Json] = {"version": version, "name": name, "tags": [name[:1], name[-1:]]}
    return Item(id=name, vector=vector_of(name, version), metadata=metadata, thumbnail=THUMBNAIL)


def next_operation(rng: random.Random, collections: Collections, *, version: int) -> Operation:
    """What to do next."""
    names = [f"{rng.randrange(NAMES):03}" for _ in range(rng.choice([1, 1, 8, 64]))]
    main = next(info for info in collections.list() if info.name == MAIN)
    others = [info.fingerprint for info in collections.list() if info.name != MAIN]
    kind = rng.choices(
        ["upsert", "delete", "delete_where", "undelete", "alias", "drop_alias", "snapshot", "successor"],
        weights=[40, 10, 3, 6, 4, 2, 2, 20],
    )[0]
    if kind == "successor" and main.successor is None:
        kind = "drop" if others and rng.random() < 0.5 else "begin"
    elif kind == "successor":
        kind = rng.choices(["fill", "finish", "cancel"], weights=[6, 2, 1])[0]
    operation: Operation = {"kind": kind, "names": names, "version": version}
    if kind == "drop_alias" and not main.aliases:
        operation["kind"] = "alias"
    if kind == "drop":
        operation["fingerprint"] = rng.choice(others)
    return operation


def perform(collections: Collections, directory: Path, operation: Operation) -> None:
    """Does it."""
    main, names, version = collections.get(MAIN), operation["names"], operation["version"]
    match operation["kind"]:
        case "upsert":
            main.upsert([item_of(name, version) for name in names], fingerprint=main.fingerprint)
        case "delete":
            main.delete(names)
        case "delete_where":
            main.delete_where({"field": "tags", "contains": names[0][-1:]})
        case "undelete":
            main.undelete(names)
        case "alias":
            collections.set_alias("alias", MAIN)
        case "drop_alias":
            collections.drop_alias("alias")
        case "snapshot":
            collections.snapshot(directory.parent / f"{version}.snapshot")
        case _:
            perform_on_generations(collections, operation)


def perform_on_generations(collections: Collections, operation: Operation) -> None:
    """Successors, and what they replaced."""
    infos = collections.list()
    (begun,) = [info.successor for info in infos if info.name == MAIN]
    match operation["kind"]:
        case "begin":
            fingerprint = f"f{operation['version']}"
            collections.begin_successor(MAIN, fingerprint=fingerprint, dimensions=DIMENSIONS)
        case "fill":
            assert begun is not None
            successor = collections.begin_successor(
                MAIN, fingerprint=begun.fingerprint, dimensions=DIMENSIONS
            )
            batch = [item_of(name, operation["version"]) for name in operation["names"]]
            successor.upsert(batch, fingerprint=begun.fingerprint)
        case "finish":
            collections.finish_successor(MAIN, expected_seq=collections.get(MAIN).seq)
        case "cancel":
            collections.cancel_successor(MAIN)
        case "drop":
            names = {info.fingerprint: info.name for info in infos if info.name != MAIN}
            collections.drop(names[operation["fingerprint"]])


def say(word: str, operation: Operation) -> None:
    """One line, out of this process before it goes on."""
    os.write(1, (json.dumps([word, operation]) + "\n").encode())


def write_for_ever(directory: Path, *, seed: int) -> None:
    """Until somebody kills the process; with a negative seed it only opens them."""
    rng = random.Random(seed)
    say("start", {})
    collections = Collections.open(directory)
    if seed < 0:
        time.sleep(60.0)
    if not collections.list():
        collections.create(MAIN, fingerprint="f0", dimensions=DIMENSIONS)
    say("open", {})
    version = seed * 1_000_000
    while True:
        version += 1
        operation = next_operation(rng, collections, version=version)
        say("try", operation)
        perform(collections, directory, operation)
        say("ack", operation)


def make_small() -> None:
    """So that what happens at thousands of items happens at hundreds: IVFs, compaction, upkeep."""
    maintenance.IVF_MIN_ROWS = 100
    index.MIN_DEAD_TO_COMPACT = 32
    upkeep.INDEX_AT_ONCE = 40
    upkeep.MAX_BEHIND = 200
    upkeep.ERASE_AT_ONCE = 20
    upkeep.JOURNAL_PAGES = 64
    upkeep.LOOK_EVERY_S = 0.01


def serve() -> None:
    """Forks a writer for each line."""
    make_small()
    for line in sys.stdin:
        directory, seed = line.split()
        pid = os.fork()
        if pid == 0:
            write_for_ever(Path(directory), seed=int(seed))
        say("pid", {"pid": pid})
        _, status = os.waitpid(pid, 0)
        os.write(1, b"\n")  # the killed one's last line may be half
        say("dead", {"status": status})


if __name__ == "__main__":
    serve()
