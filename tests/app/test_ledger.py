import sqlite3
import time
from pathlib import Path

from app.ledger import Ledger, SeenIds
from app.sources.picture import Picture, Stamp

HASH = "ab" * 32
LONG_AGO_NS = 10**18


def picture(name: str, stamp: Stamp | None) -> Picture:
    return Picture(id=name, where=name, source=f"/{name}", metadata={}, size_bytes=1, read=bytes, stamp=stamp)


def test_a_hash_is_known_as_long_as_the_stamp_is_the_same_and_is_kept_on_disk(tmp_path: Path) -> None:
    stamp = Stamp(10, LONG_AGO_NS, LONG_AGO_NS)
    with Ledger(tmp_path / "deep" / "ledger") as ledger:
        ledger.remember([(picture("a", stamp), HASH)])
    with Ledger(tmp_path / "deep" / "ledger") as ledger:
        asked = [
            picture("a", stamp),
            picture("b", stamp),
            picture("a", Stamp(11, LONG_AGO_NS, LONG_AGO_NS)),
            picture("a", Stamp(10, LONG_AGO_NS + 1, LONG_AGO_NS)),
            picture("a", Stamp(10, LONG_AGO_NS, LONG_AGO_NS + 1)),
            picture("a", Stamp(10, LONG_AGO_NS, LONG_AGO_NS, "512+10")),
            picture("a", None),
        ]
        assert ledger.hashes(asked) == [HASH] + [None] * 6


def test_a_file_that_changes_takes_no_more_room(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        for time_ns in range(100):
            ledger.remember([(picture("a", Stamp(1, time_ns, time_ns)), HASH)])
    connection = sqlite3.connect(tmp_path / "ledger")
    assert connection.execute("SELECT count(*) FROM files").fetchone() == (1,)
    connection.close()


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    now = Stamp(1, LONG_AGO_NS, time.time_ns())
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.remember([(picture("a", now), HASH)])
        assert ledger.hashes([picture("a", now)]) == [None]


def test_what_is_no_ledger_is_made_one(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"no database" * 500)
    stamp = Stamp(1, 2, 3)
    with Ledger(path) as ledger:
        assert ledger.problem is None
        ledger.remember([(picture("a", stamp), HASH)])
        assert ledger.hashes([picture("a", stamp)]) == [HASH]


def test_a_ledger_that_fails_is_given_up_and_says_so(tmp_path: Path) -> None:
    stamp = Stamp(1, 2, 3)
    with Ledger(tmp_path / "ledger") as ledger:
        other = sqlite3.connect(tmp_path / "ledger")
        other.execute("DROP TABLE files")
        other.close()
        assert ledger.hashes([picture("a", stamp)]) == [None]
        assert ledger.problem is not None
        ledger.remember([(picture("a", stamp), HASH)])
        assert ledger.hashes([picture("a", stamp)]) == [None]


def test_two_runs_share_a_ledger(tmp_path: Path) -> None:
    stamp = Stamp(1, 2, 3)
    with Ledger(tmp_path / "ledger") as one, Ledger(tmp_path / "ledger") as other:
        one.remember([(picture("a", stamp), HASH)])
        other.remember([(picture("b", stamp), HASH)])
        assert one.hashes([picture("b", stamp)]) == other.hashes([picture("a", stamp)]) == [HASH]


def test_an_id_is_met_once() -> None:
    seen = SeenIds()
    assert seen.first_place("a", "here") is None
    assert seen.first_place("b", "there") is None
    assert seen.first_place("a", "elsewhere") == "here"
    seen.close()
