import base64
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from app.main import DEFAULT_COLLECTION
from app.search.collection import Item
from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo, serving

StartApi = Callable[..., Api]
READINGS = ["map", "duplicates", "clusters"]
PATIENCE_S = 120


def fill(api: Api, seeds: list[int], *, prefix: str = "photos") -> None:
    ids = [f"{prefix}/{i:03}.jpg" for i in range(len(seeds))]
    answer = api.http.post(
        "/collections/default/items", files=multipart([photo(seed) for seed in seeds]), data={"ids": ids}
    )
    assert answer.status_code == 200


def read(api: Api, path: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    """The fresh result, asked for until it is there, as a client would."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        answer = api.http.get(f"/collections/default/{path}", params=parameters)
        assert answer.status_code in {200, 202}, answer.text
        body: dict[str, Any] = answer.json()
        if body["state"] == "ready" and not body["stale"]:
            return body
        assert int(answer.headers["Retry-After"]) >= 1
        assert time.monotonic() < deadline_s, f"it takes too long: {body}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def filled(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """Twelve pictures, of which two are there twice and one three times."""
    with serving(bundle, tmp_path_factory.mktemp("filled")) as api:
        fill(api, [*range(12), 3, 5, 5, 7])
        yield api


@pytest.mark.parametrize("reading", READINGS)
def test_the_first_answer_is_that_it_is_being_computed(start: StartApi, reading: str) -> None:
    api = start()
    fill(api, [1, 2, 3])
    answer = api.http.get(f"/collections/default/{reading}")
    assert answer.status_code == 202
    assert answer.json() == {"collection": "default", "state": "computing", "progress": 0.0}
    assert int(answer.headers["Retry-After"]) >= 1
    body = read(api, reading)
    assert (body["collection"], body["items"], body["progress"]) == ("default", 3, None)
    assert abs(body["computed_at"] - time.time()) < PATIENCE_S


def test_a_map_places_every_item_and_equal_pictures_at_one_place(filled: Api) -> None:
    body = read(filled, "map")
    assert (body["items"], body["total"]) == (16, 16)
    assert body["ids"] == [f"photos/{i:03}.jpg" for i in range(16)]
    places = list(zip(body["x"], body["y"], strict=True))
    assert all(-1 <= value <= 1 for place in places for value in place)
    assert places[3] == places[12]
    assert places[5] == places[13] == places[14]
    assert len(set(places)) == 12


def test_a_map_comes_as_numbers_base64_or_messagepack(filled: Api) -> None:
    body = read(filled, "map")
    packed = read(filled, "map", encoding="base64")
    url = "/collections/default/map"
    bytes_ = msgpack.unpackb(filled.http.get(url, headers={"Accept": "application/msgpack"}).content)
    for axis in "xy":
        expected = np.array(body[axis], np.float32)
        np.testing.assert_array_equal(np.frombuffer(base64.b64decode(packed[axis]), "<f4"), expected)
        np.testing.assert_array_equal(np.frombuffer(bytes_[axis], "<f4"), expected)
    assert bytes_["ids"] == packed["ids"] == body["ids"]
    assert np.frombuffer(bytes_["rows"], "<i4").tolist() == packed["rows"] == body["rows"] == list(range(16))
    refused = filled.http.get(url, headers={"Accept": "text/html"})
    assert (refused.status_code, refused.json()["code"]) == (406, "not_acceptable")


def test_a_map_is_asked_for_in_parts(filled: Api) -> None:
    body = read(filled, "map")
    few = read(filled, "map", limit=5)
    assert (len(few["ids"]), few["total"]) == (5, 16)
    assert set(few["ids"]) < set(body["ids"])
    right = read(filled, "map", box="0,-1,1,1")
    expected = [item for item, x in zip(body["ids"], body["x"], strict=True) if x >= 0]
    assert (right["ids"], right["total"]) == (expected, len(expected))
    assert [body["ids"][row] for row in right["rows"]] == expected


def test_duplicates_are_in_groups_with_the_one_to_keep(filled: Api) -> None:
    assert read(filled, "duplicates")["threshold"] == 0.95
    body = read(filled, "duplicates", threshold=0.99)
    assert (body["threshold"], body["total_groups"], body["total_items"]) == (0.99, 3, 7)
    first = body["data"][0]
    assert first["ids"] == ["photos/005.jpg", "photos/013.jpg", "photos/014.jpg"]
    assert (first["size"], first["exact"], first["keep"]) == (3, True, "photos/005.jpg")
    assert first["same_bytes"] == [first["ids"]]
    assert first["scores"] == [1.0, 1.0, 1.0]
    assert (first["mean_score"], first["min_score"]) == (1.0, 1.0)
    assert [group["ids"] for group in body["data"][1:]] == [
        ["photos/003.jpg", "photos/012.jpg"],
        ["photos/007.jpg", "photos/015.jpg"],
    ]
    page = read(filled, "duplicates", threshold=0.99, limit=2)
    rest = read(filled, "duplicates", threshold=0.99, limit=2, cursor=page["next_cursor"])
    assert page["data"] + rest["data"] == body["data"]
    assert rest["next_cursor"] is None


def test_another_threshold_is_answered_at_once(filled: Api) -> None:
    exact = read(filled, "duplicates", threshold=1)
    loose = filled.http.get("/collections/default/duplicates", params={"threshold": 0.5})
    assert loose.status_code == 200
    assert loose.json()["computed_at"] == exact["computed_at"]
    assert loose.json()["total_items"] >= exact["total_items"] == 7


def test_clusters_show_what_a_collection_is_made_of(filled: Api) -> None:
    body = read(filled, "clusters")
    assert len(body["data"]) == 3  # the root of half of 16 items
    sizes = [cluster["size"] for cluster in body["data"]]
    assert sum(sizes) == 16
    assert sizes == sorted(sizes, reverse=True)
    assert "labels" not in body
    five = read(filled, "clusters", k=5, labels=True)
    assert len(five["data"]) == 5
    ids = [f"photos/{i:03}.jpg" for i in range(16)]
    for place, cluster in enumerate(five["data"]):
        members = {item for item, label in zip(ids, five["labels"], strict=True) if label == place}
        assert len(members) == cluster["size"]
        assert set(cluster["representatives"]) <= members
        assert set(cluster["outliers"]) <= members
        assert -1 <= cluster["cohesion"] <= 1


def test_results_of_one_seq_are_of_the_same_items(filled: Api) -> None:
    assert len({read(filled, reading)["seq"] for reading in READINGS}) == 1


def test_after_a_change_the_result_is_stale_and_then_new(start: StartApi) -> None:
    api = start()
    fill(api, [1, 2, 3, 4])
    before = read(api, "duplicates")
    assert before["data"] == []
    fill(api, [4], prefix="again")
    body = api.http.get("/collections/default/duplicates").json()
    assert (body["state"], body["stale"], body["seq"]) == ("ready", True, before["seq"])
    after = read(api, "duplicates")
    assert after["items"] == 5
    assert after["data"][0]["ids"] == ["again/000.jpg", "photos/003.jpg"]


def test_a_restart_answers_at_once(bundle: Bundle, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "kept") as api:
        fill(api, [1, 2, 3])
        before = read(api, "map")
    with serving(bundle, tmp_path / "kept") as api:
        answer = api.http.get("/collections/default/map")
        assert answer.status_code == 200
        assert answer.json() == before


def test_the_service_stops_at_once_in_the_middle_of_a_computation(bundle: Bundle, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "data") as api:
        vectors = np.random.default_rng(0).normal(size=(3_000, 48)).astype(np.float32)
        items = [Item(id=str(i), vector=vector, metadata={}) for i, vector in enumerate(vectors)]
        api.catalogue.get(DEFAULT_COLLECTION).upsert(items, fingerprint=bundle.manifest.fingerprint)
        deadline_s = time.monotonic() + PATIENCE_S
        while (body := api.http.get("/collections/default/map").json())["progress"] < 0.3:
            assert body["state"] == "computing"
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/collections/none/map", 404, "unknown_collection"),
        ("/collections/none/duplicates", 404, "unknown_collection"),
        ("/collections/none/clusters", 404, "unknown_collection"),
        ("/collections/default/map?limit=0", 400, "invalid_parameter"),
        ("/collections/default/map?limit=1000000", 400, "invalid_parameter"),
        ("/collections/default/map?box=1,2,3", 400, "invalid_parameter"),
        ("/collections/default/map?box=1,0,-1,1", 400, "invalid_parameter"),
        ("/collections/default/map?box=nan,0,1,1", 400, "invalid_parameter"),
        ("/collections/default/map?encoding=hex", 400, "invalid_parameter"),
        ("/collections/default/map?k=3", 400, "unknown_parameter"),
        ("/collections/default/duplicates?threshold=0.2", 400, "invalid_parameter"),
        ("/collections/default/duplicates?threshold=1.01", 400, "invalid_parameter"),
        ("/collections/default/duplicates?threshold=nan", 400, "invalid_parameter"),
        ("/collections/default/duplicates?limit=101", 400, "invalid_parameter"),
        ("/collections/default/duplicates?cursor=x", 422, "invalid_query"),
        ("/collections/default/clusters?k=0", 400, "invalid_parameter"),
        ("/collections/default/clusters?k=1001", 400, "invalid_parameter"),
        ("/collections/default/clusters?k=many", 400, "invalid_parameter"),
    ],
)
def test_what_can_not_be_asked_is_refused(filled: Api, path: str, status: int, code: str) -> None:
    read(filled, "duplicates")  # a cursor is looked at once there is something to page through
    answer = filled.http.get(path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
