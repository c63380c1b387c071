"""Whose data directory it is, and what is refused because it is damaged, foreign or from the future."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.errors import DirectoryInUse, StorageError
from app.search.collection import Item
from app.search.embedded.directory import DATABASE_NAME, LOCK_NAME
from app.search.embedded.library import Collections

D = 64


def fill(directory: Path, *, count: int = 300) -> Path:
    """A directory with a collection; returns the database's path."""
    vectors = np.random.default_rng(0).normal(size=(count, D)).astype(np.float32)
    with Collections.open(directory) as collections:
        collection = collections.create("default", fingerprint="f", dimensions=D)
        collection.upsert(
            [Item(id=f"{i:04}", vector=vector, metadata={"i": i}) for i, vector in enumerate(vectors)],
            fingerprint="f",
        )
    return directory / DATABASE_NAME


def test_a_second_owner_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    with Collections.open(tmp_path), pytest.raises(DirectoryInUse, match=f"process {os.getpid()}") as refused:
        Collections.open(tmp_path)
    assert refused.value.pid == os.getpid()
    Collections.open(tmp_path).close()


def test_a_second_process_is_told_who_holds_the_directory_and_may_have_it_after(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from app.search.embedded.library import Collections\n"
        "collections = Collections.open(pathlib.Path(sys.argv[1]))\n"
        "sys.stdout.write('open\\n'); sys.stdout.flush(); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        with pytest.raises(DirectoryInUse, match=f"in use by process {owner.pid}") as refused:
            Collections.open(tmp_path)
        assert refused.value.pid == owner.pid
        owner.kill()
        owner.wait()
        Collections.open(tmp_path).close()


def test_a_holder_that_wrote_no_pid_is_still_a_holder(tmp_path: Path) -> None:
    with Collections.open(tmp_path):
        (tmp_path / LOCK_NAME).write_text("")
        with pytest.raises(DirectoryInUse, match="another process") as refused:
            Collections.open(tmp_path)
    assert refused.value.pid is None


def cut_in_half(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def cut_within_the_header(database: Path) -> None:
    os.truncate(database, 50)


def empty(database: Path) -> None:
    os.truncate(database, 0)


def another_programs_file(database: Path) -> None:
    database.write_bytes(b"\xff\xd8\xff\xe0 a photograph, say" * 100)


def another_programs_database(database: Path) -> None:
    database.unlink()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()


def from_the_future(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA user_version = 7")
    connection.close()


def overwritten_in_the_middle(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(8_192)
        file.write(b"\x5a" * 65_536)


def overwritten_at_the_beginning(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(100)
        file.write(b"\x5a" * 8_000)


def vectors_gone(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("DELETE FROM vectors WHERE rid = 7")
    connection.commit()
    connection.close()


def vectors_overwritten(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("UPDATE vectors SET vector = ? WHERE rid = 7", (b"\xff" * 4 * D,))
    connection.commit()
    connection.close()


def only_the_journal_was_copied(database: Path) -> None:
    database.rename(database.with_name(f"{DATABASE_NAME}-wal"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (cut_in_half, r"damaged.*what can be read.*'default': \d+ items, and .* not.*index rescue"),
        (cut_within_the_header, "cut short: it has 50 bytes"),
        (empty, "cut short: it has 0 bytes"),
        (another_programs_file, "not a SQLite database"),
        (another_programs_database, "another program"),
        (from_the_future, "newer dinoserve.*upgrade"),
        (overwritten_in_the_middle, "damaged.*can be read"),
        (overwritten_at_the_beginning, "damaged.*nothing of it can be read"),
        (vectors_gone, "damaged: vectors of the collection 'default'.*299 items, and 1 not.*index rescue"),
        (vectors_overwritten, "damaged: vectors of the collection 'default'.*299 items, and 1 not"),
        (only_the_journal_was_copied, "copied in part"),
    ],
)
def test_a_damaged_or_foreign_database_is_refused_with_a_sentence_and_let_go(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    database = fill(tmp_path)
    damage(database)
    before = {
        path.name: path.read_bytes() for path in tmp_path.glob(f"{DATABASE_NAME}*") if path.stat().st_size
    }
    with pytest.raises(StorageError, match=says):
        Collections.open(tmp_path)
    with pytest.raises(StorageError, match=says):  # and not DirectoryInUse
        Collections.open(tmp_path)
    for name, content in before.items():
        assert len((tmp_path / name).read_bytes()) == len(content), (
            "nothing is written over what may be saved"
        )


def crash(directory: Path, *, batches: int = 5) -> Path:
    """A process writes and ends without closing, as by `kill -9`; returns the database's path."""
    program = (
        "import os, pathlib, sys\n"
        "import numpy as np\n"
        "from app.search.collection import Item\n"
        "from app.search.embedded.library import Collections\n"
        "from app.search.embedded import upkeep\n"
        "upkeep.LOOK_EVERY_S = 60.0\n"  # the journal isn't moved meanwhile
        "collection = Collections.open(pathlib.Path(sys.argv[1])).get('default')\n"
        "rng = np.random.default_rng(1)\n"
        "for batch in range(int(sys.argv[2])):\n"
        "    vectors = rng.normal(size=(20, 64))\n"
        "    items = [Item(id=f'late/{batch}/{i}', vector=v, metadata={}) for i, v in enumerate(vectors)]\n"
        "    collection.upsert(items, fingerprint='f')\n"
        "os._exit(9)\n"
    )
    database = fill(directory)
    done = subprocess.run([sys.executable, "-c", program, str(directory), str(batches)], check=False)
    assert done.returncode == 9
    return database


def test_after_a_crash_everything_that_was_acknowledged_is_there(tmp_path: Path) -> None:
    crash(tmp_path)
    with Collections.open(tmp_path) as collections:
        assert collections.get("default").count() == 400
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [DATABASE_NAME, LOCK_NAME]


@pytest.mark.parametrize("bytes_left", [None, 0, 1_000, 200_000])
def test_a_journal_that_was_removed_or_cut_is_missed(tmp_path: Path, bytes_left: int | None) -> None:
    journal = crash(tmp_path).with_name(f"{DATABASE_NAME}-wal")
    assert journal.stat().st_size > 200_000
    if bytes_left is None:
        journal.unlink()
    else:
        os.truncate(journal, bytes_left)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"\d writes that this directory acknowledged are not in"):
            Collections.open(tmp_path)
    (tmp_path / "acknowledged").unlink()
    with Collections.open(tmp_path) as collections:
        assert 300 <= collections.get("default").count() < 400


def test_the_database_alone_is_a_whole_copy_while_nobody_writes_to_it(tmp_path: Path) -> None:
    """The journal was moved into it; that it was open is on it, and so it is looked at closely."""
    (tmp_path / "copy").mkdir()
    database = crash(tmp_path / "data")
    connection = sqlite3.connect(database)  # takes the journal in when it closes
    connection.execute("SELECT count(*) FROM items").fetchone()
    connection.close()
    (tmp_path / "copy" / DATABASE_NAME).write_bytes(database.read_bytes())
    with Collections.open(tmp_path / "copy") as collections:
        assert collections.get("default").count() == 400


def test_a_file_that_was_copied_while_it_was_written_is_looked_at_closely(tmp_path: Path) -> None:
    """Every second page is from before: none is damaged, but they don't fit together."""
    database = fill(tmp_path / "data", count=3_000)
    before = database.read_bytes()
    with Collections.open(tmp_path / "data") as collections:
        collection = collections.get("default")
        collection.delete([f"{i:04}" for i in range(3_000)])
        other = np.random.default_rng(5).normal(size=(3_000, D)).astype(np.float32)
        collection.upsert(
            [Item(id=f"x{i:04}", vector=vector, metadata={"i": -i}) for i, vector in enumerate(other)],
            fingerprint="f",
        )
        while collections._store.checkpoint() and not is_marked_open(database):
            pass
        after = database.read_bytes()
    (tmp_path / "copy").mkdir()
    torn = bytearray(after)
    for start in range(8_192, len(before), 2 * 8_192):
        torn[start : start + 8_192] = before[start : start + 8_192]
    (tmp_path / "copy" / DATABASE_NAME).write_bytes(torn)
    with pytest.raises(StorageError, match=r"damaged.*what can be read.*'default': [\d,]+ items"):
        Collections.open(tmp_path / "copy")


def is_marked_open(database: Path) -> bool:
    connection = sqlite3.connect(f"{database.as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        (value,) = connection.execute("SELECT value FROM state WHERE name = 'open'").fetchone()
    finally:
        connection.close()
    return bool(value)


def test_a_limit_of_file_size_refuses_a_write_and_harms_nothing(tmp_path: Path) -> None:
    fill(tmp_path)
    program = (
        "import pathlib, resource, sys\n"
        "import numpy as np\n"
        "from app.errors import StorageError\n"
        "from app.search.collection import Item\n"
        "from app.search.embedded.library import Collections\n"
        "collections = Collections.open(pathlib.Path(sys.argv[1]))\n"
        "collection = collections.get('default')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))\n"
        "rng = np.random.default_rng(1)\n"
        "for batch in range(100):\n"
        "    items = [Item(id=f'{batch}/{i}', vector=rng.normal(size=64), metadata={}) for i in range(100)]\n"
        "    try:\n"
        "        collection.upsert(items, fingerprint='f')\n"
        "    except StorageError as error:\n"
        "        print(error)\n"
        "        break\n"
        "print(collection.count() - 100 * batch, len(collection.search(rng.normal(size=(1, 64)), k=5)[0]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "print(collection.upsert(items, fingerprint='f').count('added'))\n"
        "collections.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    )
    sentence, counts, added = done.stdout.splitlines()
    assert sentence == "the disk failed, is full, or allows no larger files; nothing was changed"
    assert counts == "300 5"
    assert added == "100"


def test_a_data_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.touch()
    with pytest.raises(StorageError, match="is a file"):
        Collections.open(file)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_data_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(StorageError, match="Permission denied"):
        Collections.open(tmp_path / "data")


def test_a_creation_that_was_cut_off_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "collections.new").write_bytes(b"half a database")
    with Collections.open(tmp_path) as collections:
        assert collections.list() == []


def test_a_closed_directory_is_one_file_that_can_be_copied(tmp_path: Path) -> None:
    database = fill(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / DATABASE_NAME).write_bytes(database.read_bytes())
    with Collections.open(tmp_path / "b") as collections:
        assert collections.get("default").count() == 300
        assert len(collections.get("default").scroll(cursor=None, limit=1_000).items) == 300
