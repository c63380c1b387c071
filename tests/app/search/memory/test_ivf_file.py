"""The file of an IVF: read as it was written, and never believed when anything about it is wrong."""

import logging
import random
import subprocess
import sys
import time
from pathlib import Path

import faiss
import numpy as np
import pytest

from app.search.memory.chunks import Rows
from app.search.memory.index import VectorIndex
from app.search.memory.ivf import Ivf, view_of
from app.search.memory.ivf_build import built
from app.search.memory.ivf_file import read_ivf, remove_file, write_ivf
from app.search.memory.ivf_tuning import tuned
from tests.app.search.clustered import Vectors, clustered

ROOT = Path(__file__).parents[4]
ROWS = 3_000
KEY = "1 sha256:abc 32 1790000000.5"
NOTHING: Rows = np.empty(0, dtype=np.int64)


def index_of(vectors: Vectors) -> VectorIndex:
    index = VectorIndex(vectors.shape[1])
    rids = np.arange(10, 10 + len(vectors), dtype=np.int64)
    index.publish(index.prepare(seq=1, rids=rids, vectors_ND=vectors, removed=NOTHING))
    return index


def ivf_of(index: VectorIndex) -> Ivf:
    faiss.omp_set_num_threads(1)
    views = index.snapshot.views
    ivf = built(views, index.rotation, stopped=lambda: False)
    view = view_of(ivf, views)
    assert view is not None
    return ivf.retuned(tuned(view, views, stopped=lambda: False), rows=len(ivf.rids))


@pytest.fixture
def vectors() -> Vectors:
    return clustered(ROWS + 20, seed=1, dimensions=32)[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "1.ivf"


def test_what_is_read_is_what_was_written(vectors: Vectors, path: Path) -> None:
    index = index_of(vectors[:ROWS])
    index.publish(index.prepare(seq=2, rids=NOTHING, vectors_ND=vectors[:0], removed=np.array([11, 500])))
    ivf = ivf_of(index)
    write_ivf(path, ivf, key=KEY)
    read = read_ivf(path, index.snapshot, key=KEY)
    assert read is not None
    assert read.settings == ivf.settings
    assert (read.trained_rows, read.tuned_rows) == (ROWS - 2, ROWS - 2)
    np.testing.assert_array_equal(read.rids, ivf.rids)
    other = index_of(vectors[:ROWS])
    other.publish(other.prepare(seq=2, rids=NOTHING, vectors_ND=vectors[:0], removed=np.array([11, 500])))
    other.publish(other.with_ivf(read))
    index.publish(index.with_ivf(ivf))
    for query in vectors[ROWS:]:
        (expected,) = index.snapshot.nearest(query[None], k=10)
        (found,) = other.snapshot.nearest(query[None], k=10)
        np.testing.assert_array_equal(found.rids, expected.rids)
    assert sorted(file.name for file in path.parent.iterdir()) == ["1.ivf"]


def test_a_file_stays_right_whatever_is_written_later(vectors: Vectors, path: Path) -> None:
    index = index_of(vectors[:ROWS])
    write_ivf(path, ivf_of(index), key=KEY)
    later = np.arange(10 + ROWS, 30 + ROWS, dtype=np.int64)
    index.publish(index.prepare(seq=2, rids=later, vectors_ND=vectors[ROWS:], removed=np.arange(10, 900)))
    read = read_ivf(path, index.snapshot, key=KEY)
    assert read is not None
    index.publish(index.with_ivf(read))
    assert index.snapshot.indexed == ROWS - 890
    (found,) = index.snapshot.nearest(vectors[:1], k=10)
    assert found.rids.min() >= 900
    (found,) = index.snapshot.nearest(vectors[-1:], k=1)
    assert found.rids.tolist() == [29 + ROWS]


def test_no_file_is_no_matter(vectors: Vectors, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_ivf(path, index_of(vectors).snapshot, key=KEY) is None
    assert caplog.records == []


def test_a_damaged_file_is_never_used(vectors: Vectors, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = index_of(vectors[:ROWS])
    write_ivf(path, ivf_of(index), key=KEY)
    whole = path.read_bytes()
    rng = random.Random(0)
    lengths = [0, 1, 7, 8, 15, 16, 31, 32, 40, 200, len(whole) - 1, *rng.sample(range(len(whole)), 20)]
    damaged = [whole[:length] for length in lengths]
    for place in [0, 8, 15, 16, 20, len(whole) - 1, *rng.sample(range(len(whole)), 20)]:
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
    damaged += [b"x" * 5_000, whole + b"x", bytes(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_ivf(path, index.snapshot, key=KEY) is None
        assert "it is made anew" in caplog.text
    path.write_bytes(whole)
    assert read_ivf(path, index.snapshot, key=KEY) is not None


def test_the_file_of_another_collection_is_never_used(
    vectors: Vectors, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = index_of(vectors[:ROWS])
    write_ivf(path, ivf_of(index), key=KEY)
    assert read_ivf(path, index.snapshot, key=KEY + "1") is None
    assert "another collection" in caplog.text


def test_a_database_put_back_to_an_older_state_is_noticed(
    vectors: Vectors, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rids may have been given to other vectors since, and its deleted rows may be back."""
    index = index_of(vectors[:ROWS])
    write_ivf(path, ivf_of(index), key=KEY)
    other = vectors[:ROWS].copy()
    other[-1] = vectors[ROWS]
    assert read_ivf(path, index_of(other).snapshot, key=KEY) is None
    assert "other vectors" in caplog.text
    caplog.clear()
    index.publish(index.prepare(seq=2, rids=NOTHING, vectors_ND=vectors[:0], removed=np.array([700])))
    write_ivf(path, ivf_of(index), key=KEY)
    assert read_ivf(path, index.snapshot, key=KEY) is not None
    assert read_ivf(path, index_of(vectors[:ROWS]).snapshot, key=KEY) is None
    assert "other vectors" in caplog.text


def test_what_faiss_does_not_know_is_not_used(
    vectors: Vectors, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(vectors[:ROWS])
    ivf = ivf_of(index)
    monkeypatch.setattr(faiss, "serialize_index", lambda _: np.frombuffer(b"XxXx" * 50, dtype=np.uint8))
    write_ivf(path, ivf, key=KEY)
    assert read_ivf(path, index.snapshot, key=KEY) is None


def test_a_directory_in_its_place_is_no_file(
    vectors: Vectors, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.mkdir()
    assert read_ivf(path, index_of(vectors).snapshot, key=KEY) is None
    assert "can't be read" in caplog.text
    remove_file(path)


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_file(vectors: Vectors, path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.app.search.memory import test_ivf_file as t\n"
        "vectors = t.clustered(t.ROWS + 20, seed=1, dimensions=32)[0]\n"
        "ivf = t.ivf_of(t.index_of(vectors[: t.ROWS]))\n"
        "print('ready', flush=True)\n"
        "while True: t.write_ivf(Path(sys.argv[1]), ivf, key=t.KEY)\n"
    )
    rng = random.Random(1)
    snapshot = index_of(vectors[:ROWS]).snapshot
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.05 + 0.1 * rng.random())
            child.kill()
        assert read_ivf(path, snapshot, key=KEY) is not None
    remove_file(path)
    remove_file(path.with_suffix(".new"))
    assert list(path.parent.iterdir()) == []
