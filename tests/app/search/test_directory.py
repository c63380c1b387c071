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
from app.search.directory import DATABASE_NAME, LOCK_NAME
from app.search.library import Collections

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
        "from app.search.library import Collections\n"
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
        (cut_in_half, "damaged"),
        (cut_within_the_header, "cut short"),
        (empty, "cut short"),
        (another_programs_file, "not a SQLite database"),
        (another_programs_database, "another program"),
        (from_the_future, "newer dinoserve.*upgrade"),
        (overwritten_in_the_middle, "damaged"),
        (vectors_gone, "damaged"),
        (vectors_overwritten, "damaged"),
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
