"""Whole collections over HTTP as Parquet, both ways."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from app.search.collection import Item
from app.search.parquet import MEDIA_TYPE, Export
from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]
PARQUET = {"Content-Type": MEDIA_TYPE}


def fill(api: Api, name: str, *, count: int = 300, thumbnail_bytes: int = 100) -> None:
    fingerprint = api.bundle.manifest.fingerprint
    collection = api.catalogue.create(name, fingerprint=fingerprint, dimensions=48)
    rng = np.random.default_rng(count)
    items = [
        Item(
            id=f"a/{number:05} ü",
            vector=rng.standard_normal(48).astype(np.float32),
            metadata={"number": number},
            thumbnail=rng.bytes(thumbnail_bytes),
        )
        for number in range(count)
    ]
    for start in range(0, count, 500):
        collection.upsert(items[start : start + 500], fingerprint=fingerprint)


def test_a_collection_goes_out_and_in_again_and_finds_the_same(start: StartApi) -> None:
    api = start()
    api.http.post("/collections/default/items", files=multipart([photo(seed) for seed in range(5)]))
    answer = api.http.get("/collections/default/export")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, MEDIA_TYPE)
    assert answer.headers["Content-Disposition"] == 'attachment; filename="default.parquet"'
    table = pq.read_table(io.BytesIO(answer.content))
    assert table.num_rows == 5
    assert all(webp[8:12] == b"WEBP" for webp in table.column("thumbnail").to_pylist())

    done = api.http.post("/collections/copy/import", content=answer.content, headers=PARQUET)
    expected = {"collection": "copy", "created": True, "added": 5, "updated": 0, "unchanged": 0}
    assert (done.status_code, done.json()) == (200, expected)
    again = api.http.post("/collections/copy/import", content=answer.content, headers=PARQUET)
    assert again.json() == expected | {"created": False, "added": 0, "unchanged": 5}

    first, second = (
        api.http.post(f"/similar?k=5&collection={name}", files=multipart([photo(3)])).json()["data"]
        for name in ("default", "copy")
    )
    assert first == second

    bare = api.http.get("/collections/default/export", params={"thumbnails": "false"})
    assert "thumbnail" not in pq.read_table(io.BytesIO(bare.content)).column_names


def test_an_export_by_an_alias_is_that_of_the_collection(start: StartApi) -> None:
    api = start()
    fill(api, "photos", count=3)
    api.catalogue.set_alias("best", "photos")
    assert pq.read_table(io.BytesIO(api.http.get("/collections/best/export").content)).num_rows == 3


def test_a_client_that_leaves_stops_the_export(start: StartApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start()
    fill(api, "big", count=3_000, thumbnail_bytes=50_000)
    chunks: list[int] = []
    next_chunk = Export.next_chunk

    def counted(export: Export) -> bytes | None:
        chunk = next_chunk(export)
        chunks.append(len(chunk or b""))
        return chunk

    monkeypatch.setattr(Export, "next_chunk", counted)
    with api.http.stream("GET", "/collections/big/export") as answer:
        stream = answer.iter_raw()
        next(stream)
        time.sleep(1.0)
        waiting = len(chunks)  # nobody reads, so nothing more is made: what is, is in buffers of the network
        time.sleep(0.5)
        assert len(chunks) == waiting
    assert sum(chunks) < 100e6
    time.sleep(0.5)
    assert len(chunks) <= waiting + 1
    assert api.http.get("/collections/big").status_code == 200


def test_a_collection_that_is_dropped_meanwhile_breaks_the_stream_and_never_looks_whole(
    start: StartApi,
) -> None:
    api = start()
    fill(api, "big", count=3_000, thumbnail_bytes=50_000)

    def read_and_drop() -> None:
        with api.http.stream("GET", "/collections/big/export") as answer:
            for number, _ in enumerate(answer.iter_raw()):
                if number == 0:
                    api.catalogue.drop("big")

    with pytest.raises(httpx.RemoteProtocolError):
        read_and_drop()


def bodies(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), 100_000):
        yield data[start : start + 100_000]


def test_a_file_above_the_limit_of_other_bodies_is_imported(start: StartApi, tmp_path: Path) -> None:
    api = start(max_request_bytes=100_000, max_image_bytes=50_000)
    fill(api, "photos", thumbnail_bytes=1_000)
    data = api.http.get("/collections/photos/export").content
    assert len(data) > 300_000
    before = {path.name for path in (tmp_path / "data").iterdir()}
    done = api.http.post("/collections/copy/import", content=bodies(data), headers=PARQUET)
    assert done.json()["added"] == 300
    assert {path.name for path in (tmp_path / "data").iterdir()} == before  # the spooled file had no name


def test_a_file_above_its_own_limit_is_refused(start: StartApi) -> None:
    api = start(max_import_bytes=10_000)
    fill(api, "photos")
    data = api.http.get("/collections/photos/export").content
    for content in (data, bodies(data)):  # with a length, and without
        answer = api.http.post("/collections/copy/import", content=content, headers=PARQUET)
        assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")
        assert answer.json()["limit"] == 10_000


def test_another_models_file_is_refused_with_both_fingerprints(start: StartApi, other_bundle: Bundle) -> None:
    api = start()
    theirs = other_bundle.manifest.fingerprint
    api.catalogue.create("theirs", fingerprint=theirs, dimensions=48)
    data = api.http.get("/collections/theirs/export").content
    answer = api.http.post("/collections/default/import", content=data, headers=PARQUET)
    assert (answer.status_code, answer.json()["code"]) == (409, "fingerprint_mismatch")
    assert (answer.json()["expected"], answer.json()["found"]) == (api.bundle.manifest.fingerprint, theirs)
    kept = api.http.post("/collections/new/import", content=data, headers=PARQUET)
    assert kept.json()["created"] is True
    assert api.http.get("/collections/new").json()["searchable"] is False


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "code"),
    [
        pytest.param("/collections/new/import", b"", PARQUET, 422, "invalid_import", id="nothing"),
        pytest.param("/collections/new/import", b"PAR1PAR1", PARQUET, 422, "invalid_import", id="not whole"),
        pytest.param("/collections/new/import", b"{}", {}, 415, "unsupported_media_type", id="no type"),
        pytest.param(
            "/collections/new/import",
            b"{}",
            {"Content-Type": "application/json"},
            415,
            "unsupported_media_type",
            id="JSON",
        ),
    ],
)
def test_what_can_not_be_imported_is_a_problem(
    api: Api, path: str, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = api.http.post(path, content=content, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert api.http.get("/collections/new").status_code == 404


def test_a_name_that_can_be_none_is_refused_after_the_file(api: Api) -> None:
    data = api.http.get("/collections/default/export").content
    answer = api.http.post("/collections/-a/import", content=data, headers=PARQUET)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_collection")


def test_an_unknown_collection_has_no_export(api: Api) -> None:
    answer = api.http.get("/collections/nowhere/export")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_collection")


def test_a_body_that_stops_coming_is_given_up(start: StartApi) -> None:
    api = start(upload_timeout_s=0.3)
    wait = threading.Event()

    def stalled() -> Iterator[bytes]:
        yield b"PAR1"
        wait.wait(5)

    try:
        answer = api.http.post("/collections/new/import", content=stalled(), headers=PARQUET)
        assert answer.json()["code"] == "upload_timeout"
    except httpx.TransportError:
        pass  # the service answers and closes while the client still sends
    finally:
        wait.set()
    assert api.http.get("/collections/new").status_code == 404


def test_searching_goes_on_while_a_file_is_imported(start: StartApi) -> None:
    api = start()
    fill(api, "photos", count=4_000)
    data = api.http.get("/collections/photos/export").content
    counts: list[int] = []
    importing = threading.Thread(
        target=lambda: api.http.post("/collections/copy/import", content=data, headers=PARQUET)
    )
    importing.start()
    with httpx.Client(base_url=api.url) as http:
        while importing.is_alive():
            answer = http.post("/similar?k=1&collection=photos", files=multipart([photo(1)]))
            assert answer.status_code == 200
            listed = http.get("/collections/copy")
            counts.append(listed.json()["items"] if listed.status_code == 200 else 0)
    importing.join()
    assert counts
    assert api.http.get("/collections/copy").json()["items"] == 4_000
