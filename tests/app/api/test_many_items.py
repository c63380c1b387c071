from collections.abc import Callable

import pytest

from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]
ITEMS = "/collections/default/items"


@pytest.fixture
def filled(start: StartApi) -> Api:
    api = start()
    form = {
        "ids": ["a", "b/1", "b/2"],
        "metadata": ['{"kind": "cat"}', '{"kind": "dog"}', '{"kind": "dog"}'],
    }
    api.http.post(ITEMS, files=multipart([photo(1), photo(2), photo(3)]), data=form)
    return api


def items(api: Api) -> list[str]:
    return [item["id"] for item in api.http.get(ITEMS).json()["data"]]


def test_items_are_found_in_the_order_of_their_ids(filled: Api) -> None:
    data = filled.http.post(f"{ITEMS}/get", json={"ids": ["b/2", "nobody", "a", "b/2"]}).json()["data"]
    assert [item and item["id"] for item in data] == ["b/2", None, "a", "b/2"]
    assert data[0]["metadata"] == {"kind": "dog"}
    assert len(data[0]["sha256"]) == 64


def test_items_are_deleted_by_id_and_come_back(filled: Api) -> None:
    delete, ids = f"{ITEMS}/delete", ["a", "b/1", "nobody", "a"]
    assert filled.http.post(delete, json={"ids": ids, "dry_run": True}).json() == {"deleted": 2}
    assert len(items(filled)) == 3
    assert filled.http.post(delete, json={"ids": ids}).json() == {"deleted": 2}
    assert items(filled) == ["b/2"]
    assert filled.http.post(delete, json={"ids": ids}).json() == {"deleted": 0}
    found = filled.http.post("/similar?k=3", files=multipart([photo(1)])).json()["data"][0]["neighbours"]
    assert [neighbour["id"] for neighbour in found] == ["b/2"]
    undeleted = filled.http.post(f"{ITEMS}/undelete", json={"ids": ids}).json()
    assert undeleted == {"undeleted": 2}
    assert items(filled) == ["a", "b/1", "b/2"]
    found = filled.http.post("/similar?k=1", files=multipart([photo(1)])).json()["data"][0]["neighbours"]
    assert found[0]["id"] == "a"
    assert filled.http.get(f"{ITEMS}/a/thumbnail").status_code == 200


def test_items_are_deleted_by_what_their_metadata_say(filled: Api) -> None:
    dogs = {"filter": {"field": "kind", "eq": "dog"}}
    assert filled.http.post(f"{ITEMS}/delete", json=dogs | {"dry_run": True}).json() == {"deleted": 2}
    assert filled.http.post(f"{ITEMS}/delete", json=dogs).json() == {"deleted": 2}
    assert items(filled) == ["a"]


@pytest.mark.parametrize(
    ("path", "said", "status", "code"),
    [
        ("delete", {}, 400, "invalid_parameter"),
        ("delete", {"ids": ["a"], "filter": {"field": "x", "eq": 1}}, 400, "invalid_parameter"),
        ("delete", {"ids": ["a"] * 10_001}, 400, "invalid_parameter"),
        ("delete", {"ids": "a"}, 400, "invalid_parameter"),
        ("delete", {"filter": {"field": "x", "like": 1}}, 422, "invalid_filter"),
        ("delete", {"filter": {}}, 422, "invalid_filter"),
        ("delete", {"ids": ["a"], "force": True}, 400, "unknown_parameter"),
        ("undelete", {"ids": ["a"] * 10_001}, 400, "invalid_parameter"),
        ("undelete", {}, 400, "invalid_parameter"),
        ("get", {"ids": [1]}, 400, "invalid_parameter"),
    ],
)
def test_what_can_not_be_done_is_refused(
    api: Api, path: str, said: dict[str, object], status: int, code: str
) -> None:
    answer = api.http.post(f"{ITEMS}/{path}", json=said)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_there_must_be_a_collection(api: Api) -> None:
    for path in ("get", "delete", "undelete"):
        answer = api.http.post(f"/collections/none/items/{path}", json={"ids": ["a"]})
        assert answer.json()["code"] == "unknown_collection"


def test_ids_of_any_kind_are_passed_over_or_found(filled: Api) -> None:
    strange = ["\0", "x" * 10_000, "", "..", "a\nb", "b/1"]
    for path in ("get", "delete", "undelete"):
        assert filled.http.post(f"{ITEMS}/{path}", json={"ids": strange}).status_code == 200
    assert items(filled) == ["a", "b/1", "b/2"]
