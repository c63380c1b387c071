"""Reindexing over HTTP: a service of another model takes a collection over, killed and begun again."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.inference.blocking import BlockingEngine
from app.inference.results import ImageEmbedding, ImageFailure
from app.search.embedded.library import Collections
from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo, serving
from tests.app.running import running_service, write_tiny_bundle

StartApi = Callable[..., Api]


def write_photos(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{seed:04}.jpg" for seed in range(count)]
    for seed, path in enumerate(paths):
        path.write_bytes(photo(seed))
    return paths


def add(http: httpx.Client, paths: Sequence[Path]) -> None:
    for start in range(0, len(paths), 200):
        some = paths[start : start + 200]
        answer = http.post(
            "/collections/default/items",
            files=multipart([path.read_bytes() for path in some]),
            data={"ids": [path.stem for path in some], "sources": [str(path) for path in some]},
            timeout=120,
        )
        assert answer.status_code == 200, answer.text


def ended(http: httpx.Client, *, timeout_s: float = 60) -> dict[str, Any]:
    deadline_s = time.monotonic() + timeout_s
    while True:
        state: dict[str, Any] = http.get("/collections/default/reindex").json()
        if state["state"] != "running":
            return state
        assert time.monotonic() < deadline_s, state
        time.sleep(0.02)


@pytest.fixture
def filled(bundle: Bundle, tmp_path: Path) -> list[Path]:
    """The directory `data` has a collection of the first model."""
    paths = write_photos(tmp_path / "photos", 60)
    with serving(bundle, tmp_path / "data") as api:
        add(api.http, paths)
        nothing = api.http.post("/collections/default/reindex")
        assert (nothing.status_code, nothing.json()["code"]) == (409, "nothing_to_reindex")
        assert api.http.get("/collections/default/reindex").json()["state"] == "none"
    return paths


@pytest.fixture
def new(start: StartApi, other_bundle: Bundle, filled: list[Path]) -> Api:
    """A service of the other model on that directory."""
    return start(other_bundle)


def slow_down(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Bulk work waits before each batch until the event is set."""
    go_on = threading.Event()
    embed = BlockingEngine.embed

    def held(
        engine: BlockingEngine, images: Sequence[bytes], stop: threading.Event
    ) -> list[ImageEmbedding | ImageFailure]:
        while not (go_on.is_set() or stop.is_set()):
            time.sleep(0.005)
        return embed(engine, images, stop)

    monkeypatch.setattr(BlockingEngine, "embed", held)
    return go_on


def test_a_collection_of_another_model_says_the_way_out_which_leads_there(
    new: Api, bundle: Bundle, other_bundle: Bundle
) -> None:
    files = multipart([photo(7)])
    refused = new.http.post("/similar?k=1", files=files)
    assert refused.status_code == 409
    assert "POST /collections/default/reindex" in refused.json()["detail"]

    begun = new.http.post("/collections/default/reindex")
    assert begun.status_code == 202
    assert begun.headers["Location"] == "/collections/default/reindex"
    state = ended(new.http)
    assert (state["state"], state["done"], state["of"], state["failed"]) == ("done", 60, 60, 0)
    assert (state["from_source"], state["warnings"], state["error"]) == (60, [], None)
    assert state["from_fingerprint"] == bundle.manifest.fingerprint
    assert state["to_fingerprint"] == other_bundle.manifest.fingerprint
    found = new.http.post("/similar?k=1", files=files).json()
    assert found["data"][0]["neighbours"][0]["id"] == "0007"
    assert new.http.get(f"/collections/{state['previous']}").json()["items"] == 60
    assert new.http.get("/collections/default/items/0007/thumbnail").status_code == 200
    again = new.http.post("/collections/default/reindex")
    assert again.json()["code"] == "nothing_to_reindex"


def test_nothing_is_searched_before_all_is_there_and_deleting_goes_on(
    new: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = slow_down(monkeypatch)
    first = new.http.post("/collections/default/reindex", json={"skip_failed": False}).json()
    assert (first["state"], first["of"]) == ("running", 60)
    assert new.http.post("/collections/default/reindex").json()["state"] == "running"
    assert new.http.post("/similar?k=1", files=multipart([photo(7)])).status_code == 409
    assert new.http.delete("/collections/default/items/0007").status_code == 204
    assert new.http.post("/embed", files=multipart([photo(7)])).status_code == 200
    go_on.set()
    state = ended(new.http)
    assert (state["state"], state["done"], state["of"]) == ("done", 59, 59)
    assert new.http.get("/collections/default/items/0007").status_code == 404


def test_one_that_is_cancelled_leaves_nothing_behind(new: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = slow_down(monkeypatch)
    new.http.post("/collections/default/reindex")
    cancelled = new.http.delete("/collections/default/reindex")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert new.http.get("/collections/default/reindex").json()["state"] == "cancelled"
    assert [info.successor for info in new.catalogue.list()] == [None]
    nothing = new.http.delete("/collections/default/reindex")
    assert (nothing.status_code, nothing.json()["code"]) == (404, "unknown_collection")
    go_on.set()
    new.http.post("/collections/default/reindex")
    assert ended(new.http)["state"] == "done"


def test_items_without_a_picture_are_named_until_they_are_skipped(new: Api, filled: list[Path]) -> None:
    filled[3].unlink()
    new.catalogue.get("default")
    lost = new.catalogue.get("default").get(["0004"])[0]
    assert lost is not None
    fingerprint = new.catalogue.get("default").fingerprint
    new.catalogue.get("default").delete(["0004"])
    bare = type(lost)(id="bare", vector=lost.vector, metadata={})
    new.catalogue.get("default").upsert([bare], fingerprint=fingerprint)
    new.http.post("/collections/default/reindex")
    state = ended(new.http)
    assert (state["state"], state["failed"], state["from_thumbnails"]) == ("failed", 1, 1)
    assert [failed["id"] for failed in state["failures"]] == ["bare"]
    assert len(state["warnings"]) == 2
    assert new.http.get("/collections/default").json()["fingerprint"] == fingerprint
    new.http.post("/collections/default/reindex", json={"skip_failed": True})
    assert ended(new.http)["state"] == "done"
    assert new.http.get("/collections/default").json()["items"] == 59


def test_a_restore_and_a_reindexing_keep_out_of_each_others_way(
    new: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = slow_down(monkeypatch)
    name = new.http.post("/snapshots").json()["name"]
    new.http.post("/collections/default/reindex")
    refused = new.http.post(f"/snapshots/{name}/restore", json={"collection": "default"})
    assert (refused.status_code, refused.json()["code"]) == (409, "successor_exists")
    go_on.set()
    assert ended(new.http)["state"] == "done"
    assert new.http.post(f"/snapshots/{name}/restore", json={"collection": "default"}).status_code == 200
    assert new.http.get("/collections/default/reindex").json()["state"] == "none"
    new.http.post("/collections/default/reindex")
    assert ended(new.http)["state"] == "done"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        pytest.param("POST", "nowhere", None, 404, "unknown_collection", id="begin nowhere"),
        pytest.param("GET", "nowhere", None, 404, "unknown_collection", id="look nowhere"),
        pytest.param("DELETE", "nowhere", None, 404, "unknown_collection", id="cancel nowhere"),
        pytest.param("DELETE", "default", None, 404, "unknown_collection", id="cancel nothing"),
        pytest.param("POST", "default", {"skip": True}, 400, "unknown_parameter", id="misspelled"),
        pytest.param("POST", "default", {"skip_failed": "maybe"}, 400, "invalid_parameter", id="maybe"),
        pytest.param("POST", "default", [], 400, "invalid_json", id="an array"),
        pytest.param("POST", "default", {}, 409, "nothing_to_reindex", id="the same model"),
    ],
)
def test_what_can_not_be_is_a_problem(
    api: Api, method: str, path: str, body: object, status: int, code: str
) -> None:
    request: dict[str, Any] = {} if body is None else {"json": body}
    answer = api.http.request(method, f"/collections/{path}/reindex", **request)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_stop_of_the_service_stops_it_and_the_next_one_goes_on(
    other_bundle: Bundle, filled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = slow_down(monkeypatch)
    with serving(other_bundle, tmp_path / "data") as api:
        api.http.post("/collections/default/reindex")
        stopped_s = time.monotonic()
    assert time.monotonic() - stopped_s < 10
    go_on.set()
    with serving(other_bundle, tmp_path / "data") as api:
        state = api.http.get("/collections/default/reindex").json()
        assert (state["state"], state["of"]) == ("interrupted", 60)
        api.http.post("/collections/default/reindex")
        assert ended(api.http)["state"] == "done"


def test_kill_9_in_the_middle_loses_nothing_and_it_goes_on(tmp_path: Path) -> None:
    old, new = (write_tiny_bundle(tmp_path / name, seed=seed) for seed, name in enumerate(("old", "new")))
    paths = write_photos(tmp_path / "photos", 600)
    with running_service(old, tmp_path / "data") as service:
        with httpx.Client(base_url=service.url, timeout=120) as http:
            add(http, paths)
        service.process.kill()
    made = 0
    for kill_at in (50, 250):
        with running_service(new, tmp_path / "data") as service, httpx.Client(base_url=service.url) as http:
            state = http.get("/collections/default/reindex").json()
            expected = ("interrupted", 599) if made else ("none", 600)
            assert (state["state"], state["of"]) == expected
            assert state["done"] >= made
            begun = http.post("/collections/default/reindex")
            assert begun.status_code == 202
            http.delete(f"/collections/default/items/{kill_at:04}")
            deadline_s = time.monotonic() + 60
            while (state := http.get("/collections/default/reindex").json())["done"] < kill_at:
                assert time.monotonic() < deadline_s
                assert state["state"] == "running"
            service.process.kill()
            made = state["done"]
    with running_service(new, tmp_path / "data") as service, httpx.Client(base_url=service.url) as http:
        refused = http.post("/similar?k=1", files=multipart([photo(7)]))
        assert refused.json()["code"] == "fingerprint_mismatch"
        http.post("/collections/default/reindex")
        state = ended(http)
        assert (state["state"], state["done"], state["failed"]) == ("done", 598, 0)
        assert 0 < state["from_source"] <= 600 - 200
        for seed in (0, 49, 51, 300, 599):
            found = http.post("/similar?k=1", files=multipart([photo(seed)])).json()
            assert found["data"][0]["neighbours"][0]["id"] == f"{seed:04}"
        service.process.kill()
    with Collections.open(tmp_path / "data") as catalogue:
        collection = catalogue.get("default")
        assert collection.count() == 598
        assert collection.get(["0050", "0250"]) == [None, None]
        assert all(info.successor is None for info in catalogue.list())
