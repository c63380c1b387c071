from collections.abc import Callable

import pytest

from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]


def test_an_alias_stands_wherever_a_name_can_and_is_led_elsewhere_at_once(start: StartApi) -> None:
    api = start()
    api.http.post("/collections", json={"name": "photos-2"})
    assert api.http.put("/aliases/photos", json={"collection": "default"}).json() == {
        "alias": "photos",
        "collection": "default",
    }
    api.http.put("/aliases/art", json={"collection": "photos-2"})
    added = api.http.post("/collections/photos/items", files=multipart([photo(1)]), data={"ids": ["one"]})
    assert added.status_code == 200
    assert api.http.get("/collections/default").json()["items"] == 1
    assert api.http.get("/collections/photos/items/one").status_code == 200
    found = api.http.post("/similar?collection=photos&k=1", files=multipart([photo(1)])).json()
    assert found["data"][0]["neighbours"][0]["id"] == "one"
    assert api.http.get("/aliases").json() == {
        "data": [{"alias": "art", "collection": "photos-2"}, {"alias": "photos", "collection": "default"}]
    }
    api.http.put("/aliases/photos", json={"collection": "photos-2"})
    assert api.http.get("/collections/photos/items/one").status_code == 404
    assert api.http.delete("/aliases/photos").status_code == 204
    assert api.http.get("/collections/photos").status_code == 404
    assert api.http.get("/collections/photos-2").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        pytest.param("PUT", "/aliases/a", {"collection": "nowhere"}, 404, "unknown_collection", id="nowhere"),
        pytest.param(
            "PUT", "/aliases/default", {"collection": "default"}, 409, "collection_exists", id="taken"
        ),
        pytest.param(
            "PUT", "/aliases/a%20b", {"collection": "default"}, 422, "invalid_collection", id="name"
        ),
        pytest.param(
            "PUT", "/aliases/" + "a" * 65, {"collection": "default"}, 422, "invalid_collection", id="long"
        ),
        pytest.param("PUT", "/aliases/a", {}, 400, "invalid_parameter", id="no collection"),
        pytest.param(
            "PUT", "/aliases/a", {"collection": "default", "x": 1}, 400, "unknown_parameter", id="x"
        ),
        pytest.param("DELETE", "/aliases/nowhere", None, 404, "unknown_collection", id="no alias"),
        pytest.param("DELETE", "/aliases/default", None, 404, "unknown_collection", id="no alias but a name"),
    ],
)
def test_what_can_not_be_is_a_problem(
    api: Api, method: str, path: str, body: object, status: int, code: str
) -> None:
    answer = api.http.request(method, path, json=body) if body is not None else api.http.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert api.http.get("/aliases").json() == {"data": []}


def test_an_alias_is_not_enough_to_delete_a_collection(start: StartApi) -> None:
    api = start()
    api.http.put("/aliases/photos", json={"collection": "default"})
    assert api.http.delete("/collections/photos").status_code == 404
    assert api.http.get("/collections/default").status_code == 200
