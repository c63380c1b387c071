"""Snapshots over HTTP, and collections restored from them while others search."""

from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import Unsupported
from app.search.collection import Catalogue
from app.search.embedded.library import Collections
from app.search.embedded.snapshot_files import SnapshotFile
from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]


def add(api: Api, *seeds: int) -> None:
    files, ids = multipart([photo(seed) for seed in seeds]), [str(seed) for seed in seeds]
    assert api.http.post("/collections/default/items", files=files, data={"ids": ids}).status_code == 200


def nearest(api: Api, seed: int, name: str = "default") -> str:
    answer = api.http.post(f"/similar?k=1&collection={name}", files=multipart([photo(seed)]))
    return str(answer.json()["data"][0]["neighbours"][0]["id"])


def test_snapshots_are_made_listed_fetched_restored_and_deleted(start: StartApi, tmp_path: Path) -> None:
    api = start()
    add(api, 1, 2, 3)
    made = api.http.post("/snapshots")
    assert made.status_code == 201
    snapshot = made.json()
    assert made.headers["Location"] == f"/snapshots/{snapshot['name']}"
    fingerprint = api.bundle.manifest.fingerprint
    assert snapshot["collections"] == [
        {"name": "default", "fingerprint": fingerprint, "dimensions": 48, "items": 3}
    ]
    assert snapshot["problem"] is None
    assert api.http.get("/snapshots").json() == {"data": [snapshot]}

    fetched = api.http.get(f"/snapshots/{snapshot['name']}")
    assert fetched.headers["Content-Type"] == "application/vnd.sqlite3"
    assert len(fetched.content) == snapshot["bytes"]
    (tmp_path / "fetched.sqlite").write_bytes(fetched.content)
    with SnapshotFile.open(tmp_path / "fetched.sqlite") as opened:
        opened.check()

    add(api, 4)
    api.http.delete("/collections/default/items/1")
    assert (nearest(api, 4), nearest(api, 1) != "1") == ("4", True)
    path = f"/snapshots/{snapshot['name']}/restore"
    beside = api.http.post(path, json={"collection": "default", "as": "yesterday"})
    assert beside.json() == {
        "collection": "yesterday",
        "fingerprint": fingerprint,
        "items": 3,
        "previous": None,
    }
    assert nearest(api, 1, "yesterday") == "1"
    restored = api.http.post(path, json={"collection": "default"}).json()
    assert (restored["collection"], restored["items"]) == ("default", 3)
    assert nearest(api, 1) == "1"
    assert nearest(api, 4) != "4"
    assert nearest(api, 4, restored["previous"]) == "4"

    assert api.http.delete(f"/snapshots/{snapshot['name']}").status_code == 204
    assert api.http.get("/snapshots").json() == {"data": []}


def test_a_dropped_collection_comes_back(start: StartApi) -> None:
    api = start()
    add(api, 1)
    name = api.http.post("/snapshots").json()["name"]
    api.http.delete("/collections/default")
    assert api.http.post(f"/snapshots/{name}/restore", json={"collection": "default"}).status_code == 200
    assert nearest(api, 1) == "1"


@pytest.mark.parametrize(
    "name", ["nowhere.sqlite", "..%2Fcollections.sqlite", "%2e%2e%2Flock", "a%00b.sqlite", "lock", "x" * 3000]
)
def test_a_name_that_is_none_leads_nowhere(api: Api, name: str) -> None:
    for answer in (
        api.http.get(f"/snapshots/{name}"),
        api.http.delete(f"/snapshots/{name}"),
        api.http.post(f"/snapshots/{name}/restore", json={"collection": "default"}),
    ):
        assert answer.status_code in {404, 405}
        assert answer.json()["code"] in {"unknown_snapshot", "unknown_route", "method_not_allowed"}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param({}, 400, "invalid_parameter", id="no collection"),
        pytest.param({"collection": 3}, 400, "invalid_parameter", id="a number"),
        pytest.param({"collection": "default", "at": "x"}, 400, "unknown_parameter", id="misspelled"),
        pytest.param({"collection": "nowhere"}, 404, "unknown_collection", id="not in it"),
        pytest.param({"collection": "default", "as": "default"}, 409, "collection_exists", id="taken"),
        pytest.param({"collection": "default", "as": "../up"}, 422, "invalid_collection", id="a path"),
        pytest.param([], 400, "invalid_json", id="an array"),
    ],
)
def test_what_can_not_be_restored_is_a_problem(start: StartApi, body: object, status: int, code: str) -> None:
    api = start()
    name = api.http.post("/snapshots").json()["name"]
    answer = api.http.post(f"/snapshots/{name}/restore", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert [one["name"] for one in api.http.get("/collections").json()["data"]] == ["default"]


def test_a_damaged_snapshot_is_listed_as_that_and_not_restored(start: StartApi, tmp_path: Path) -> None:
    api = start()
    add(api, 1)
    name = api.http.post("/snapshots").json()["name"]
    path = tmp_path / "data" / "snapshots" / name
    path.write_bytes(path.read_bytes()[:5_000])
    (listed,) = api.http.get("/snapshots").json()["data"]
    assert "damaged" in listed["problem"]
    answer = api.http.post(f"/snapshots/{name}/restore", json={"collection": "default"})
    assert (answer.status_code, answer.json()["code"]) == (507, "storage_error")
    assert nearest(api, 1) == "1"


def test_an_engine_without_snapshots_says_so(
    start: StartApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(catalogue: Catalogue, to: Path) -> None:
        raise Unsupported("Milvus has a tool of its own for that: milvus-backup")

    monkeypatch.setattr(Collections, "snapshot", refuse)
    answer = start().http.post("/snapshots")
    assert (answer.status_code, answer.json()["code"]) == (501, "unsupported")
    assert "milvus-backup" in answer.json()["detail"]


def test_a_snapshot_of_another_model_is_restored_and_refused_to_searches(
    start: StartApi, other_bundle: Bundle
) -> None:
    api = start()
    add(api, 1)
    api.catalogue.create("theirs", fingerprint=other_bundle.manifest.fingerprint, dimensions=48)
    name = api.http.post("/snapshots").json()["name"]
    assert api.http.post(f"/snapshots/{name}/restore", json={"collection": "theirs"}).status_code == 200
    answer = api.http.post("/similar?collection=theirs", files=multipart([photo(1)]))
    assert answer.json()["code"] == "fingerprint_mismatch"


def test_a_restore_that_was_killed_is_cancelled_and_begun_again(start: StartApi) -> None:
    api = start()
    add(api, 1)
    name = api.http.post("/snapshots").json()["name"]
    fingerprint = api.bundle.manifest.fingerprint
    api.catalogue.begin_successor("default", fingerprint=fingerprint, dimensions=48)  # as a kill leaves it
    refused = api.http.post(f"/snapshots/{name}/restore", json={"collection": "default"})
    assert (refused.status_code, refused.json()["code"]) == (409, "successor_exists")
    assert "DELETE /collections/default/reindex" in refused.json()["detail"]
    assert nearest(api, 1) == "1"
    assert api.http.get("/collections/default/reindex").json()["state"] == "interrupted"
    assert api.http.delete("/collections/default/reindex").json()["state"] == "cancelled"
    assert api.http.post(f"/snapshots/{name}/restore", json={"collection": "default"}).status_code == 200
    assert nearest(api, 1) == "1"
