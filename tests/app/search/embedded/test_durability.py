"""Acknowledged means kept: children write and are killed at random moments, again and again.

After each kill the directory must open, hold exactly what was acknowledged, and search must find it. Of the
one operation in flight either all or nothing may have happened. Some kills come while the child still opens.
"""

import copy
import json
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.search.collection import Collection
from app.search.embedded.directory import DATABASE_NAME
from app.search.embedded.library import Collections
from tests.app.search.durability_child import MAIN, THUMBNAIL, Operation, vector_of
from tests.app.search.schema_1 import fill_schema_1

ROOT = Path(__file__).parents[4]
Versions = dict[str, int]


@dataclass
class Kept:
    """What a collection must have: the versions of living and of deleted items."""

    living: Versions = field(default_factory=dict)
    deleted: Versions = field(default_factory=dict)
    successor: "tuple[str, Kept] | None" = None

    def upsert(self, names: list[str], version: int) -> None:
        for name in names:
            self.living[name] = version
            self.deleted.pop(name, None)

    def delete(self, names: list[str]) -> None:
        for name in set(names) & set(self.living):
            self.deleted[name] = self.living.pop(name)

    def undelete(self, names: list[str]) -> None:
        for name in set(names) & set(self.deleted):
            self.living[name] = self.deleted.pop(name)


@dataclass
class State:
    """What a directory must have; collections that were replaced go by their fingerprints."""

    main: Kept = field(default_factory=Kept)
    fingerprint: str = "f0"
    others: dict[str, Kept] = field(default_factory=dict)
    has_alias: bool = False

    def after(self, operation: Operation) -> "State":
        made = copy.deepcopy(self)
        made._apply(operation)
        return made

    def _apply(self, operation: Operation) -> None:
        names, version = operation["names"], operation["version"]
        match operation["kind"]:
            case "upsert":
                self.main.upsert(names, version)
            case "delete":
                self.main.delete(names)
            case "delete_where":
                tag = names[0][-1:]
                self.main.delete([name for name in self.main.living if tag in {name[:1], name[-1:]}])
            case "undelete":
                self.main.undelete(names)
            case "alias" | "drop_alias":
                self.has_alias = operation["kind"] == "alias"
            case "drop":
                del self.others[operation["fingerprint"]]
            case _:
                self._apply_to_successor(operation)

    def _apply_to_successor(self, operation: Operation) -> None:
        begun = self.main.successor
        match operation["kind"]:
            case "begin":
                self.main.successor = (f"f{operation['version']}", Kept())
            case "fill":
                assert begun is not None
                begun[1].upsert(operation["names"], operation["version"])
            case "finish":
                assert begun is not None
                self.others[self.fingerprint] = Kept(self.main.living, self.main.deleted)
                self.fingerprint, self.main = begun
            case "cancel":
                self.main.successor = None


@dataclass
class Said:
    """What a child said until it was killed."""

    acknowledged: list[Operation] = field(default_factory=list)
    in_flight: Operation | None = None


class Children:
    """One process that forks writers."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.app.search.durability_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run_and_kill(self, directory: Path, *, seed: int, after_s: float, once: str) -> Said:
        """Starts a writer, and kills it so long after it said a word."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{directory} {seed}\n")
        self._process.stdin.flush()
        said, pid, is_there = Said(), 0, False
        while not (pid and is_there):
            word, body = self._next()
            assert word != "dead", "it ended by itself"
            pid = body.get("pid", pid)
            is_there = is_there or word == once
            self._note(said, word, body)
        time.sleep(after_s)
        subprocess.run(["kill", "-9", str(pid)], check=True)
        while (line := self._next())[0] != "dead":
            self._note(said, *line)
        assert line[1]["status"] == 9, "it was killed, and had not failed before"
        return said

    def _next(self) -> tuple[str, dict[str, Any]]:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the children's parent is gone"
            try:
                word, body = json.loads(line)
            except ValueError:  # cut by the kill: what wasn't said whole wasn't acknowledged
                continue
            return word, body

    def _note(self, said: Said, word: str, operation: Operation) -> None:
        if word == "try":
            said.in_flight = operation
        elif word == "ack":
            said.acknowledged.append(operation)
            said.in_flight = None


@contextmanager
def children() -> Iterator[Children]:
    started = Children()
    try:
        yield started
    finally:
        started.close()


def versions_in(collection: Collection) -> Versions:
    stored: Versions = {}
    for item in collection.scroll(cursor=None, limit=1_000).items:
        version = item.metadata["version"]
        assert isinstance(version, int)
        stored[item.id] = version
    assert collection.count() == len(stored)
    assert collection.count({"field": "version", "gte": 0}) == len(stored)
    return stored


def state_of(collections: Collections) -> State:
    """What a directory has; deleted items can't be seen, and are taken from the model later."""
    state = State()
    for info in collections.list():
        kept = Kept(versions_in(collections.get(info.name)))
        if info.name != MAIN:
            assert info.successor is None
            state.others[info.fingerprint] = kept
            continue
        state.main, state.fingerprint, state.has_alias = kept, info.fingerprint, info.aliases == ("alias",)
        if info.successor is not None:
            successor = collections.begin_successor(
                MAIN, fingerprint=info.successor.fingerprint, dimensions=info.successor.dimensions
            )
            kept.successor = (info.successor.fingerprint, Kept(versions_in(successor)))
    return state


def seen(state: State) -> State:
    """Without the deleted items."""
    visible = copy.deepcopy(state)
    for kept in [visible.main, *visible.others.values()]:
        kept.deleted = {}
    return visible


def check(directory: Path, state: State, in_flight: Operation | None, *, rng: random.Random) -> State:
    """Holds the directory against what must be there; returns what is."""
    with Collections.open(directory) as collections:
        if not collections.list():
            assert state == State()
            return state
        stored = state_of(collections)
        if stored != seen(state):
            assert in_flight is not None
            state = state.after(in_flight)
            assert stored == seen(state)
        main = collections.get(MAIN)
        check_searches(main, state.main.living, rng=rng)
        if rng.random() < 0.2:  # what was deleted can still be brought back, and nothing else
            assert main.undelete(list(state.main.deleted)) == len(state.main.deleted)
            assert versions_in(main) == state.main.living | state.main.deleted
            main.delete(list(state.main.deleted))
        assert collections.settle(timeout_s=60)
        check_searches(main, state.main.living, rng=rng)
    check_tables(directory / DATABASE_NAME)
    return state


def check_searches(main: Collection, living: Versions, *, rng: random.Random) -> None:
    for name in rng.sample(sorted(living), min(12, len(living))):
        version = living[name]
        ((nearest,),) = main.search(vector_of(name, version)[None], k=1, exact=rng.random() < 0.5)
        assert (nearest.id, nearest.score, nearest.metadata["version"]) == (name, 1.0, version)
        assert main.thumbnail(name) == THUMBNAIL
        only = {"field": "name", "eq": name}
        assert [n.id for n in main.search(vector_of("0", 0)[None], k=9, filter=only)[0]] == [name]


def check_tables(database: Path) -> None:
    """No item without its vector, and nothing that belongs to no item, but for what is yet to be erased."""
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        known = "(SELECT rid FROM items UNION SELECT rid FROM garbage)"
        dropped = "path IN (SELECT path FROM paths WHERE cid IN (SELECT cid FROM dropped))"
        for table, but in (("vectors", "FALSE"), ("thumbnails", "FALSE"), ("fields", dropped)):
            found = connection.execute(
                f"SELECT rid FROM {table} WHERE rid NOT IN {known} AND NOT ({but})"
            ).fetchall()
            assert found == [], table
        without = connection.execute("SELECT rid FROM items WHERE rid NOT IN (SELECT rid FROM vectors)")
        assert without.fetchall() == []
        unindexed = connection.execute(
            "SELECT rid FROM items WHERE rid <= (SELECT value FROM state WHERE name = 'indexed')"
            " AND rid NOT IN (SELECT rid FROM fields) AND cid NOT IN (SELECT cid FROM dropped)"
        )
        assert unindexed.fetchall() == []


def check_snapshots(directory: Path, snapshots: dict[int, State]) -> None:
    """Those that were acknowledged hold what there was; others aren't there, or are whole, too."""
    for path in directory.parent.glob("*.snapshot"):
        copied = directory.parent / "copy"
        copied.mkdir()
        path.rename(copied / DATABASE_NAME)
        with Collections.open(copied) as collections:
            stored = state_of(collections)
            if int(path.stem) in snapshots:
                assert stored == seen(snapshots.pop(int(path.stem)))
        for file in copied.rglob("*"):
            if file.is_file():
                file.unlink()
        for folder in [*copied.glob("*/"), copied]:
            folder.rmdir()
    assert snapshots == {}, "a snapshot that was acknowledged is not there"
    for part in directory.parent.glob(".*.part*"):
        part.unlink()


def kill_again_and_again(directory: Path, *, rounds: int) -> dict[str, int]:
    """Returns how many operations of each kind were acknowledged."""
    rng = random.Random(rounds)
    state = State()
    counts: dict[str, int] = {}
    with children() as writers:
        for seed in range(1, rounds + 1):
            once = "open" if rng.random() < 0.8 else "start"
            said = writers.run_and_kill(directory, seed=seed, after_s=rng.uniform(0.0, 0.3), once=once)
            snapshots: dict[int, State] = {}
            for operation in said.acknowledged:
                state = state.after(operation)
                counts[operation["kind"]] = counts.get(operation["kind"], 0) + 1
                if operation["kind"] == "snapshot":
                    snapshots[operation["version"]] = state
            state = check(directory, state, said.in_flight, rng=rng)
            check_snapshots(directory, snapshots)
    return counts


def test_no_acknowledged_write_is_lost_and_no_deleted_item_comes_back_in_50_kills(tmp_path: Path) -> None:
    counts = kill_again_and_again(tmp_path / "data", rounds=50)
    assert sum(counts.values()) > 200
    assert {"upsert", "delete", "undelete", "begin", "fill", "finish", "alias"} <= counts.keys()


@pytest.mark.slow
@pytest.mark.timeout(5_400)
def test_no_acknowledged_write_is_lost_and_no_deleted_item_comes_back_in_1000_kills(tmp_path: Path) -> None:
    assert sum(kill_again_and_again(tmp_path / "data", rounds=1_000).values()) > 5_000


def test_a_kill_during_the_migration_of_an_older_database_leaves_it_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    migrated = 0
    with children() as writers:
        for number in range(25):
            directory = tmp_path / f"{number}"
            expected = fill_schema_1(directory, count=300, deleted_at=time.time())
            writers.run_and_kill(directory, seed=-1, after_s=rng.uniform(0.0, 0.03), once="start")
            with closing(sqlite3.connect(directory / DATABASE_NAME)) as connection:
                migrated += connection.execute("PRAGMA user_version").fetchone() == (2,)
            with Collections.open(directory) as collections:
                found = collections.get("old").scroll(cursor=None, limit=1_000).items
                assert {item.id: item.metadata for item in found} == expected
                assert collections.get("old").count({"field": "number", "gte": 150}) == 150
    assert migrated > 0
