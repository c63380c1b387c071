"""Files read by ranges: here, in fsspec's memory, from a web server that fails or lies."""

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from tests.training.data.conftest import FileServer
from training.data import files
from training.data.files import files_at, local_file
from training.errors import DataError

Serve = Callable[[Path], FileServer]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WAITS_S", (0.01, 0.01))


def test_a_range_is_read_from_a_web_server_and_a_failure_is_tried_again(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(range(100)))
    server = serve(tmp_path)
    (file,) = files_at(f"{server.address}/0.tar", (".tar",))
    assert file.size_bytes == 100
    server.failures_left = 2
    assert file.read(40, 3) == bytes([40, 41, 42])
    assert server.failures_left == 0
    assert server.ranges_sent > 0


def test_a_server_that_stays_away_is_named_after_a_bounded_number_of_tries(
    tmp_path: Path, serve: Serve
) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(100))
    server = serve(tmp_path)
    (file,) = files_at(f"{server.address}/0.tar", (".tar",))
    server.failures_left = 50
    with pytest.raises(DataError, match=rf"{server.address}/0.tar cannot be reached, 3 tries"):
        file.read(0, 5)
    assert server.failures_left == 47


def test_a_server_without_ranges_is_refused(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(100))
    server = serve(tmp_path)
    server.knows_ranges = False
    (file,) = files_at(f"{server.address}/0.tar", (".tar",))
    with pytest.raises(DataError, match="gives the whole file where a part is asked for"):
        file.read(0, 5)


@pytest.mark.parametrize("place", ["here", "memory"])
def test_a_file_that_shrinks_or_goes_is_an_error_that_names_it(tmp_path: Path, place: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/shrinks/0.tar", bytes(100))
    (tmp_path / "0.tar").write_bytes(bytes(100))
    where = tmp_path / "0.tar" if place == "here" else "memory://shrinks/0.tar"
    (file,) = files_at(where, (".tar",))
    assert file.read(90, 10) == bytes(10)

    memory.pipe_file("/shrinks/0.tar", bytes(95))
    (tmp_path / "0.tar").write_bytes(bytes(95))
    with pytest.raises(DataError, match=r"0\.tar has changed .* had 100 bytes and has 95"):
        file.read(90, 10)
    memory.rm("/shrinks/0.tar")
    (tmp_path / "0.tar").unlink()
    with pytest.raises(DataError, match=r"0\.tar is not there"):
        file.read(90, 10)


def test_a_file_here_that_is_another_of_the_same_size_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(bytes(100))
    file = local_file(tmp_path / "0.tar")
    (tmp_path / "new.tar").write_bytes(bytes(100))
    (tmp_path / "new.tar").rename(tmp_path / "0.tar")
    with pytest.raises(DataError, match="has changed since it was opened"):
        file.read(0, 1)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("s3://bucket/0.tar", r"pip install 's3fs'"),
        ("gs://bucket/0.tar", r"pip install 'gcsfs'"),
        ("nothing://bucket/0.tar", r"there is no protocol nothing://, .* s3://"),
        ("memory://nowhere/0.tar", r"memory://nowhere/0.tar is not there"),
        ("memory://nowhere/{0..3}.tar", r"memory://nowhere/0.tar is not there"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused_with_what_to_do(address: str, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        files_at(address, (".tar",))


def test_patterns_and_folders_find_their_files_sorted(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("1.tar", "0.tar", "notes.md"):
        memory.pipe_file(f"/found/{name}", b"x")
        (tmp_path / name).write_bytes(b"x")
    for where in (tmp_path, tmp_path / "*.tar", "memory://found", "memory://found/*.tar"):
        assert [file.name for file in files_at(where, (".tar",))] == ["0.tar", "1.tar"]
