"""The service with its collections on a real Milvus server, each in a process of its own."""

import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app.client import Client
from app.client.items import Added, Upload
from tests.app.running import ROOT, running_service, write_tiny_bundle

PHOTOS = sorted((ROOT / "examples" / "photos").rglob("*.jpg"))[::3]
UPLOADS = [
    Upload(
        id=f"{photo.parent.name}/{photo.name}",
        data=photo.read_bytes(),
        metadata={"album": photo.parent.name},
        source=str(photo.name),
    )
    for photo in PHOTOS
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def test_a_search_server_that_is_not_there_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        command = [
            sys.executable,
            "-m",
            "app",
            "run",
            "--model",
            str(bundle),
            "--port",
            "0",
            "--search-url",
            url,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"dino-serve: no Milvus server answers at {url}: start it")
    assert "Traceback" not in done.stderr


@pytest.fixture
def flags(milvus_url: str) -> list[str]:
    return ["--search-url", milvus_url, "--search-space", f"t{secrets.token_hex(8)}"]


def test_photos_are_found_by_the_service_that_took_them_and_after_a_restart(
    bundle: Path, flags: list[str], tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with running_service(bundle, data_dir, *flags) as service, Client(service.url) as client:
        added = client.add("default", UPLOADS)
        assert [one.status if isinstance(one, Added) else one for one in added] == ["added"] * len(UPLOADS)
        assert [(c.name, c.items) for c in client.collections()] == [("default", len(UPLOADS))]
    assert not data_dir.exists()
    with running_service(bundle, data_dir, *flags) as service, Client(service.url) as client:
        for upload in UPLOADS[:8]:
            found = client.similar(upload.data, k=3)
            assert isinstance(found, list)
            assert found[0].score == pytest.approx(1.0, abs=1e-5)
            assert found[0].metadata == upload.metadata
            album = {"field": "album", "eq": upload.metadata["album"]}
            inside = client.similar(upload.data, k=50, filter=album)
            assert isinstance(inside, list)
            assert {one.id for one in inside} == {u.id for u in UPLOADS if u.metadata == upload.metadata}


def test_two_services_share_their_collections(bundle: Path, flags: list[str], tmp_path: Path) -> None:
    with (
        running_service(bundle, tmp_path / "a", *flags) as first,
        running_service(bundle, tmp_path / "b", *flags) as second,
        Client(first.url) as writer,
        Client(second.url) as reader,
    ):
        writer.add("default", UPLOADS[:5])
        assert [item.id for item in reader.items("default")] == sorted(upload.id for upload in UPLOADS[:5])
        (status,) = reader.add("default", UPLOADS[:1])
        assert isinstance(status, Added)
        assert status.status == "unchanged"
