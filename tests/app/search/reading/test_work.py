import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from app.errors import ComputationFailed
from app.search.reading.file import read_kept
from app.search.reading.process import carry_out
from app.search.reading.work import Cancelled, Kind, Order, Work
from tests.app.search.planted import clusters, directions, ignore, spool_of


def order(tmp_path: Path, kind: Kind, *, dimensions: int = 16, spool: str = "spool-0") -> Order:
    return Order(
        kind=kind,
        clusters=None,
        dimensions=dimensions,
        spool=str(tmp_path / spool),
        previous=None,
        result=str(tmp_path / "result"),
        facts={"seq": 5},
        threads=1,
    )


@pytest.mark.parametrize("kind", ["map", "duplicates", "clusters"])
def test_a_process_computes_what_this_one_would(tmp_path: Path, kind: Kind) -> None:
    spool_of(tmp_path, clusters(4, each=15, dimensions=16)[0])
    shares: list[float] = []
    Work(order(tmp_path, kind)).run(report=shares.append)
    theirs = read_kept(tmp_path / "result")
    carry_out(order(tmp_path, kind), report=ignore)
    ours = read_kept(tmp_path / "result")
    assert theirs is not None
    assert ours is not None
    assert theirs.facts == ours.facts
    assert (theirs.facts["seq"], theirs.facts["items"]) == (5, 60)
    assert {name: array.tobytes() for name, array in theirs.arrays.items()} == {
        name: array.tobytes() for name, array in ours.arrays.items()
    }
    assert shares == sorted(shares)
    assert shares[-1] > 0.4


def test_an_order_survives_its_way_to_the_process(tmp_path: Path) -> None:
    some = order(tmp_path, "map")
    assert Order.from_json(some.as_json()) == some


def test_a_process_that_fails_is_told_of_and_the_log_has_its_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool-0").mkdir()
    with pytest.raises(ComputationFailed, match="status 1; the service's log"):
        Work(order(tmp_path, "map")).run(report=ignore)
    assert "FileNotFoundError" in caplog.text
    assert not (tmp_path / "result").exists()


def test_a_process_that_the_system_ends_is_said_to_be(tmp_path: Path) -> None:
    spool_of(tmp_path, directions(3_000, 16))
    work = Work(order(tmp_path, "map"))

    def kill(_: float) -> None:
        assert work._process is not None
        work._process.kill()  # as the kernel does where memory is short

    with pytest.raises(ComputationFailed, match="signal 9.*memory"):
        work.run(report=kill)


def test_work_is_cancelled_in_the_middle_of_a_native_call(tmp_path: Path) -> None:
    spool_of(tmp_path, directions(4_000, 16))
    work = Work(order(tmp_path, "map"))
    cancelled_s: list[float] = []

    def cancel(_: float) -> None:
        threading.Thread(target=work.cancel).start()
        cancelled_s.append(time.monotonic())

    with pytest.raises(Cancelled):
        work.run(report=cancel)
    assert time.monotonic() - cancelled_s[0] < 1
    assert not (tmp_path / "result").exists()


def test_work_that_was_cancelled_before_it_began_does_not_begin(tmp_path: Path) -> None:
    spool_of(tmp_path, directions(10, 16))
    work = Work(order(tmp_path, "map"))
    work.cancel()
    with pytest.raises(Cancelled):
        work.run(report=ignore)


def test_the_process_ends_with_the_service_however_that_ends(tmp_path: Path) -> None:
    spool_of(tmp_path, directions(4_000, 16))
    command = [sys.executable, "-m", "app.search.reading.process", order(tmp_path, "map").as_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it computes
        assert process.stdin is not None
        process.stdin.close()  # as when the service is killed
        assert process.wait(timeout=10) == 1
    assert not (tmp_path / "result").exists()
