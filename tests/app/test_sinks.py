"""A folder into a collection for real: over HTTP to a process that serves, and through an engine here."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import sinks
from app.client import Client, Embedded, NoService, ServiceRefused
from app.errors import DirectoryInUse, FingerprintMismatch, StorageError
from app.index_command import index_add, index_stats
from app.search.embedded.library import Collections
from app.sinks import Place, open_sink
from tests.app.running import ROOT, Service, picture, running_service, write_tiny_bundle

SHARED = Path(os.environ.get("DINO_SHARED", ROOT.parent / "shared"))
ODD_IMAGES = SHARED / "data" / "odd-images"
NOBODY = "http://127.0.0.1:9"  # the port of a service that discards what it gets, and runs nowhere


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for number in range(40):
        folder = root / ("cats" if number % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        (folder / f"{number:02} ü.jpg").write_bytes(picture(number))
    (root / "cats" / "text.jpg").write_text("not a picture")
    (root / "cats" / "cut.jpg").write_bytes(picture(1)[:300])
    return root


@pytest.fixture(scope="module")
def service(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(bundle, tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture(autouse=True)
def nobody_at_the_default_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may really run a service on this machine."""
    monkeypatch.setattr(sinks, "DEFAULT_URL", NOBODY)


def codes_of(report: Path) -> dict[str, str]:
    return {line["id"]: line["code"] for line in map(json.loads, report.read_text().splitlines())}


FAILURES = {"cats/text.jpg": "unsupported_format", "cats/cut.jpg": "truncated_image"}


def test_a_folder_goes_to_a_service_once_and_each_failure_is_named(
    service: Service, photos: Path, tmp_path: Path
) -> None:
    place, report = Place(server=service.url), tmp_path / "report.jsonl"
    assert index_add([photos], collection="album", place=place, report=report) == 1
    assert codes_of(report) == FAILURES
    with Client(service.url) as client:
        stored = {item.id: item for item in client.items("album")}
        assert len(stored) == 40
        assert stored["dogs/00 ü.jpg"].metadata == {
            "path": "dogs/00 ü.jpg",
            "folder": "dogs",
            "class": "dogs",
        }
        found = client.similar(picture(7), collection="album", k=1, filter={"field": "class", "eq": "cats"})
        assert isinstance(found, list)
        assert [neighbour.id for neighbour in found] == ["cats/07 ü.jpg"]
    with open_sink(place, collection="album") as sink:
        there = sink.stored(["dogs/00 ü.jpg", "nobody"])
        assert [item is not None for item in there] == [True, False]
    assert index_add([photos], collection="album", place=place, report=report) == 1


def test_a_folder_goes_through_an_engine_here_to_the_same_neighbours(
    service: Service, bundle: Path, photos: Path, tmp_path: Path
) -> None:
    place, report = Place(data_dir=tmp_path / "data", model=bundle), tmp_path / "report.jsonl"
    assert index_add([photos], place=place, report=report) == 1
    assert codes_of(report) == FAILURES
    with Collections.open(tmp_path / "data") as catalogue, Client(service.url) as client:
        collection = catalogue.get("default")
        assert collection.count() == 40
        (item,) = collection.get(["cats/07 ü.jpg"])
        assert item is not None
        assert (item.source, len(item.sha256)) == (str(photos / "cats" / "07 ü.jpg"), 64)
        thumbnail = collection.thumbnail(item.id)
        assert thumbnail is not None
        assert thumbnail[8:12] == b"WEBP"
        (embedded,) = client.embed([picture(7)])
        assert isinstance(embedded, Embedded)
        assert float(item.vector @ embedded.embedding) > 0.9999
    assert index_add([photos], place=place, report=report) == 1  # and the directory was let go


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for number in range(600):
        (root / f"{number:03}.jpg").write_bytes(picture(1_000 + number))
    return root


@pytest.mark.parametrize(
    ("stop", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)], ids=["kill -9", "Ctrl-C"]
)
def test_a_run_that_was_stopped_goes_on_where_it_was(
    service: Service, many: Path, tmp_path: Path, stop: signal.Signals, status: int
) -> None:
    name = f"stopped-{stop.name}"
    program = (
        "import sys, pathlib\n"
        "from app.index_command import index_add\n"
        "from app.sinks import Place\n"
        "folder, name, server, report = sys.argv[1:]\n"
        "place, report = Place(server=server), pathlib.Path(report)\n"
        "sys.exit(index_add([pathlib.Path(folder)], collection=name, place=place, report=report))\n"
    )
    with Client(service.url) as client:
        client.create_collection(name)
        command = [sys.executable, "-c", program, str(many), name, service.url, str(tmp_path / "r")]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as child:
            deadline_s = time.monotonic() + 60
            while not any(c.items for c in client.collections() if c.name == name):
                assert time.monotonic() < deadline_s
                time.sleep(0.005)
            child.send_signal(stop)
            _, said = child.communicate()
        assert child.returncode == status
        assert "Traceback" not in said
        before = len(list(client.items(name)))
        assert 0 < before < 600
        assert index_add([many], collection=name, place=Place(server=service.url), report=tmp_path / "r") == 0
        assert len(list(client.items(name))) == 600


@pytest.mark.skipif(not ODD_IMAGES.is_dir(), reason="needs ../shared/data/odd-images (or DINO_SHARED)")
def test_pictures_that_were_made_to_crash_decoders_fail_alone_and_are_named(
    service: Service, tmp_path: Path
) -> None:
    files = sorted(path for path in ODD_IMAGES.rglob("*") if path.is_file() and path.suffix != ".jsonl")[::9]
    listed, report = tmp_path / "list.txt", tmp_path / "report.jsonl"
    listed.write_text("".join(f"{file}\n" for file in files))
    status = index_add([listed], collection="odd", place=Place(server=service.url), report=report)
    assert status == 1
    failed = codes_of(report)
    assert "internal_error" not in failed.values()
    with Client(service.url) as client:
        kept = {item.id for item in client.items("odd")}
    assert len(kept) + len(failed) == len(files)
    assert not kept & set(failed)


def test_an_address_that_was_named_must_answer(bundle: Path, tmp_path: Path) -> None:
    place = Place(server=NOBODY, data_dir=tmp_path / "data", model=bundle)
    with pytest.raises(NoService, match="no service answers"), open_sink(place, collection="default"):
        pass
    assert not (tmp_path / "data").exists()


def test_a_directory_that_a_service_holds_is_refused_with_its_process(bundle: Path, tmp_path: Path) -> None:
    with running_service(bundle, tmp_path / "data") as holder:
        place = Place(data_dir=tmp_path / "data", model=bundle)
        with pytest.raises(DirectoryInUse) as refused, open_sink(place, collection="default"):
            pass
        assert refused.value.pid == holder.process.pid


def test_a_collection_of_another_model_is_refused_at_once(
    bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    place = Place(data_dir=tmp_path / "data", model=bundle)
    with open_sink(place, collection="default"):
        pass
    other = Place(data_dir=tmp_path / "data", model=other_bundle)
    with (
        pytest.raises(FingerprintMismatch, match="name another collection"),
        open_sink(other, collection="default"),
    ):
        pass
    with running_service(other_bundle, tmp_path / "data") as other_service:
        served = Place(server=other_service.url)
        with (
            pytest.raises(ServiceRefused, match="fingerprint_mismatch"),
            open_sink(served, collection="default"),
        ):
            pass


def test_a_service_that_wants_a_key_gets_it(bundle: Path, photos: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-many-characters\n")
    with running_service(bundle, tmp_path / "data", "--api-key-file", str(keys)) as guarded:
        with (
            pytest.raises(ServiceRefused, match="401"),
            open_sink(Place(server=guarded.url), collection="default"),
        ):
            pass
        place = Place(server=guarded.url, api_key="a-key-of-many-characters")
        assert index_add([photos / "dogs"], place=place, report=tmp_path / "report") == 0


def test_stats_show_the_collections_of_a_service_and_of_a_directory(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index_stats(Place(server=service.url)) == 0
    assert "default" in capsys.readouterr().out
    with Collections.open(tmp_path) as catalogue:
        catalogue.create("album", fingerprint="sha256:f", dimensions=48)
    assert index_stats(Place(data_dir=tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "album" in shown
    assert "48" in shown
    with pytest.raises(StorageError, match="there is no directory"):
        index_stats(Place(data_dir=tmp_path / "nowhere"))
