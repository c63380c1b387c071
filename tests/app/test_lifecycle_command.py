"""`dino-serve index export|import|snapshot|restore|reindex`, of a process that serves and of a directory."""

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from app import sinks
from app.cli import main
from app.client import Client, NoService, ServiceRefused
from app.client.lifecycle import LifecycleClient
from app.search.collection import Item
from app.search.embedded.library import Collections
from tests.app.api.serving import multipart, photo
from tests.app.running import Service, running_service, write_tiny_bundle

NOBODY = "http://127.0.0.1:9"  # the port of a service that discards what it gets, and runs nowhere


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_tiny_bundle(folder / "old"), write_tiny_bundle(folder / "new", seed=1)


@pytest.fixture(scope="module")
def service(bundles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(bundles[0], tmp_path_factory.mktemp("service") / "data") as running:
        answer = httpx.post(
            running.url + "/collections/default/items",
            files=multipart([photo(seed) for seed in range(5)]),
            data={"ids": [str(seed) for seed in range(5)]},
        )
        assert answer.status_code == 200
        yield running


@pytest.fixture(autouse=True)
def nobody_at_the_default_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sinks, "DEFAULT_URL", NOBODY)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers = handlers
    root.setLevel(level)


DinoServe = Callable[..., tuple[int, str]]


@pytest.fixture
def dino_serve(capsys: pytest.CaptureFixture[str]) -> DinoServe:
    """Runs `dino-serve index` here: its exit status, and what it said."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        status: object = 0
        try:
            main(["index", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        assert isinstance(status, int)
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory with a collection of ten items of a model that nobody has."""
    with Collections.open(tmp_path / "data") as catalogue:
        collection = catalogue.create("default", fingerprint="sha256:f", dimensions=6)
        rng = np.random.default_rng(0)
        collection.upsert(
            [
                Item(id=f"{number}", vector=rng.random(6).astype(np.float32), metadata={"number": number})
                for number in range(10)
            ],
            fingerprint="sha256:f",
        )
    return tmp_path / "data"


def test_a_directorys_collection_goes_to_a_file_and_into_another_directory(
    dino_serve: DinoServe, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out.parquet"
    status, said = dino_serve("export", file, "--data-dir", data)
    assert (status, "'default'" in said) == (0, True)
    assert pq.read_metadata(file).num_rows == 10
    status, said = dino_serve("import", file, "--data-dir", tmp_path / "new", "--collection", "copy")
    assert (status, said) == (0, "collection 'copy': 10 added, 0 updated, 0 unchanged\n")
    status, said = dino_serve("import", file, "--data-dir", tmp_path / "new", "--collection", "copy")
    assert "10 unchanged" in said


def test_a_services_collection_goes_to_a_file_and_back(
    dino_serve: DinoServe, service: Service, tmp_path: Path
) -> None:
    file = tmp_path / "out.parquet"
    assert dino_serve("export", file, "--server", service.url, "--no-thumbnails")[0] == 0
    table = pq.read_table(file)
    assert (table.num_rows, "thumbnail" in table.column_names) == (5, False)
    status, said = dino_serve("import", file, "--server", service.url, "--collection", "copy")
    assert status == 0
    assert "collection 'copy': 5 added" in said
    httpx.delete(service.url + "/collections/copy")


def test_a_snapshot_of_a_directory_becomes_a_directory_or_a_collection(
    dino_serve: DinoServe, data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "copy.sqlite"
    assert dino_serve("snapshot", "--data-dir", data, "--to", file)[0] == 0
    status, said = dino_serve("snapshot", "--data-dir", data)
    assert status == 0
    (kept,) = (data / "snapshots").iterdir()
    assert str(kept) in said
    status, said = dino_serve("restore", file, "--data-dir", tmp_path / "new")
    assert (status, said) == (0, "collection 'default': 10 items\n")
    status, said = dino_serve("restore", file, "--data-dir", data, "--collection", "default", "--as", "old")
    assert (status, said) == (0, "collection 'old' has 10 items of the snapshot\n")
    with Collections.open(data) as catalogue:
        catalogue.get("default").delete(["1", "2"])
    status, said = dino_serve("restore", kept.name, "--data-dir", data, "--collection", "default")
    assert status == 0
    assert "had the name before" in said
    with Collections.open(data) as catalogue:
        assert [catalogue.get(name).count() for name in ("default", "old")] == [10, 10]
    status, said = dino_serve("restore", file, "--data-dir", data)
    assert status == 2
    assert "is not empty" in said


def test_a_snapshot_of_a_service_is_fetched_and_restored_there(
    dino_serve: DinoServe, service: Service, tmp_path: Path
) -> None:
    file = tmp_path / "copy.sqlite"
    status, said = dino_serve("snapshot", "--server", service.url, "--to", file)
    assert (status, file.is_file()) == (0, True)
    with Client(service.url) as client:
        lifecycle = LifecycleClient(client)
        (kept,) = lifecycle.snapshots()
        assert (kept.name in said, kept.collections, kept.problem) == (True, {"default": 5}, None)
        assert kept.size_bytes == file.stat().st_size
    where = ["--server", service.url, "--collection", "default"]
    assert dino_serve("restore", kept.name, *where, "--as", "old")[0] == 0
    assert httpx.get(service.url + "/collections/old").json()["items"] == 5
    httpx.delete(service.url + "/collections/old")
    status, said = dino_serve("restore", file, *where)
    assert status == 2
    assert f"has no snapshot copy.sqlite; it has: {kept.name}" in said
    status, said = dino_serve("restore", kept.name, "--server", service.url)
    assert status == 2
    assert "name it with --collection" in said
    with Client(service.url) as client:
        LifecycleClient(client).delete_snapshot(kept.name)
        assert LifecycleClient(client).snapshots() == []


def test_what_can_be_saved_of_a_damaged_directory_is_saved_and_the_rest_named(
    dino_serve: DinoServe, data: Path, tmp_path: Path
) -> None:
    status, said = dino_serve("rescue", data, "--to", tmp_path / "whole")
    assert (status, said) == (0, "collection 'default': 10 items saved, 0 lost\n")
    database = sqlite3.connect(data / "collections.sqlite")
    database.execute("UPDATE vectors SET vector = x'00' WHERE rid = 3")
    database.commit()
    database.close()
    status, said = dino_serve("rescue", data, "--to", tmp_path / "new")
    assert status == 1
    assert "9 items saved, 1 lost\n  lost: 2\n" in said
    status, said = dino_serve("rescue", data, "--to", tmp_path / "new")
    assert status == 2


def test_the_client_leads_aliases(service: Service) -> None:
    with Client(service.url) as client:
        lifecycle = LifecycleClient(client)
        lifecycle.set_alias("best", "default")
        assert lifecycle.aliases() == {"best": "default"}
        lifecycle.drop_alias("best")
        assert lifecycle.aliases() == {}
        with pytest.raises(ServiceRefused, match="unknown_collection"):
            lifecycle.set_alias("best", "nowhere")


def test_a_file_that_could_not_be_fetched_whole_is_not_there(service: Service, tmp_path: Path) -> None:
    with Client(service.url) as client, pytest.raises(ServiceRefused, match="unknown_collection"):
        LifecycleClient(client).export("nowhere", tmp_path / "out.parquet")
    with Client(NOBODY) as client, pytest.raises(NoService, match="did not answer"):
        LifecycleClient(client).export("default", tmp_path / "out.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{seed}.jpg" for seed in range(12)]
    for seed, path in enumerate(paths):
        path.write_bytes(photo(seed))
    return paths


@pytest.fixture
def indexed(
    dino_serve: DinoServe, bundles: tuple[Path, Path], photos: list[Path], tmp_path: Path
) -> list[str | Path]:
    """A directory of collections of the old model, and the flags that name it."""
    place: list[str | Path] = ["--data-dir", tmp_path / "photo-data", "--device", "cpu"]
    report = ["--report", tmp_path / "report.jsonl"]
    assert dino_serve("add", photos[0].parent, *place, "--model", bundles[0], *report)[0] == 0
    return place


def test_a_directory_is_reindexed_with_the_model_that_is_named(
    dino_serve: DinoServe, bundles: tuple[Path, Path], indexed: list[str | Path], photos: list[Path]
) -> None:
    status, said = dino_serve("reindex", *indexed, "--model", bundles[0])
    assert status == 2
    assert "already" in said
    photos[3].unlink()
    status, said = dino_serve("reindex", *indexed, "--model", bundles[1])
    assert status == 0, said
    assert "made from thumbnails: 1, " in said
    assert "the old ones are the collection 'default-" in said
    with running_service(bundles[1], Path(indexed[1])) as service:
        found = httpx.post(service.url + "/similar?k=1", files=multipart([photo(7)])).json()
        assert found["data"][0]["neighbours"][0]["id"] == "7.jpg"


def test_items_without_a_picture_are_shown_and_skipped_if_that_is_said(
    dino_serve: DinoServe, bundles: tuple[Path, Path], indexed: list[str | Path]
) -> None:
    with Collections.open(Path(indexed[1])) as catalogue:
        collection = catalogue.get("default")
        bare = Item(id="bare", vector=np.ones(48, np.float32), metadata={})
        collection.upsert([bare], fingerprint=collection.fingerprint)
    status, said = dino_serve("reindex", *indexed, "--model", bundles[1])
    assert status == 1
    assert "  bare: its source is no file" in said
    assert "--skip-failed" in said
    status, said = dino_serve("reindex", *indexed, "--model", bundles[1], "--skip-failed")
    assert status == 0
    with Collections.open(Path(indexed[1])) as catalogue:
        assert catalogue.get("default").count() == 12


def test_a_service_is_told_to_reindex_and_followed_to_the_end(
    dino_serve: DinoServe, bundles: tuple[Path, Path], indexed: list[str | Path]
) -> None:
    with running_service(bundles[1], Path(indexed[1])) as service:
        status, said = dino_serve("reindex", "--server", service.url)
        assert status == 0, said
        assert "has the embeddings of the new model" in said
        status, said = dino_serve("reindex", "--server", service.url)
        assert status == 2
        assert "nothing_to_reindex" in said
        with Client(service.url) as client:
            done = LifecycleClient(client).reindexing("default")
            assert (done.state, done.done, done.from_source) == ("done", 12, 12)
            with pytest.raises(ServiceRefused, match="unknown_collection"):
                LifecycleClient(client).cancel_reindex("default")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["export", "x.parquet"], "there is no directory", id="export from nowhere"),
        pytest.param(["snapshot"], "there is no directory", id="snapshot of nowhere"),
        pytest.param(["reindex"], "there is no directory", id="reindex nowhere"),
        pytest.param(["import", "nowhere.parquet"], "can't be opened: No such file", id="import nothing"),
        pytest.param(["restore", "nowhere.sqlite"], "can't be read: No such file", id="restore nothing"),
        pytest.param(
            ["rescue", "nowhere", "--to", "x"], "there is no collections.sqlite", id="rescue nothing"
        ),
        pytest.param(["fly"], "no command 'index'", id="no command"),
    ],
)
def test_what_can_not_be_done_is_said_and_exits_with_2(
    dino_serve: DinoServe, tmp_path: Path, arguments: list[str], says: str
) -> None:
    place: list[str | Path] = [] if arguments == ["fly"] else ["--data-dir", tmp_path / "none"]
    status, said = dino_serve(*arguments, *place)
    assert status == 2
    assert says in said
