"""Acknowledged means kept: a child process writes and is killed at random moments, again and again.

After each kill the directory must open, hold exactly what was acknowledged, and search must find it. Of the
one operation in flight either all or nothing may have happened. Some kills come while the child still opens.
"""

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.search.library import Collections
from tests.app.search.durability_child import THUMBNAIL, vector_of

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Operation:
    """An upsert of names at a version, or, without one, their deletion."""

    names: list[str]
    version: int | None

    def applied_to(self, versions: dict[str, int]) -> dict[str, int]:
        if self.version is None:
            return {name: version for name, version in versions.items() if name not in self.names}
        return versions | dict.fromkeys(self.names, self.version)


@dataclass
class Said:
    """What a child said until it was killed."""

    acknowledged: list[Operation] = field(default_factory=list)
    in_flight: Operation | None = None


def run_and_kill(directory: Path, *, seed: int, after_s: float, once_open: bool) -> Said:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.app.search.durability_child", str(directory), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as child:
        assert child.stdout is not None
        if once_open:
            assert json.loads(child.stdout.readline()) == ["open", {}]
        time.sleep(after_s)
        child.kill()
        lines = child.stdout.readlines()
    said = Said()
    for line in lines:
        if line.endswith("\n"):  # the kill may cut the last line; what wasn't said whole wasn't acknowledged
            word, operation = json.loads(line)
            if word == "try":
                said.in_flight = Operation(**operation)
            elif word == "ack":
                said.acknowledged.append(Operation(**operation))
                said.in_flight = None
    return said


def check(directory: Path, versions: dict[str, int], in_flight: Operation | None) -> dict[str, int]:
    """Holds the directory against what must be there; returns what is."""
    with Collections.open(directory) as collections:
        if not collections.list():
            assert not versions
            return {}
        collection = collections.get("default")
        items = collection.scroll(cursor=None, limit=1_000).items
        stored: dict[str, int] = {}
        for item in items:
            version = item.metadata["version"]
            assert isinstance(version, int)
            stored[item.id] = version
        assert stored == versions or (in_flight is not None and stored == in_flight.applied_to(versions))
        assert collection.count() == len(stored)
        for name, version in stored.items():
            ((nearest,),) = collection.search(vector_of(name, version)[None], k=1)
            assert (nearest.id, nearest.score, nearest.metadata) == (name, 1.0, {"version": version})
            assert collection.thumbnail(name) == THUMBNAIL
    return stored


def kill_again_and_again(directory: Path, *, rounds: int) -> int:
    """Returns how many operations were acknowledged in all."""
    rng = random.Random(rounds)
    versions: dict[str, int] = {}
    acknowledged = 0
    for seed in range(1, rounds + 1):
        after_s = rng.uniform(0.0, 0.5)
        said = run_and_kill(directory, seed=seed, after_s=after_s, once_open=rng.random() < 0.7)
        for operation in said.acknowledged:
            versions = operation.applied_to(versions)
        acknowledged += len(said.acknowledged)
        versions = check(directory, versions, said.in_flight)
    return acknowledged


def test_no_acknowledged_write_is_lost_and_no_deleted_item_comes_back_in_10_kills(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path / "data", rounds=10) > 50


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_no_acknowledged_write_is_lost_and_no_deleted_item_comes_back_in_300_kills(tmp_path: Path) -> None:
    assert kill_again_and_again(tmp_path / "data", rounds=300) > 1_500
