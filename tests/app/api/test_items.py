import base64
import hashlib
import io
from collections.abc import Callable
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]
ITEMS = "/collections/default/items"


@pytest.fixture
def empty(start: StartApi) -> Api:
    return start()


def test_pictures_are_added_then_unchanged_then_updated(empty: Api) -> None:
    def add(file: bytes) -> dict[str, object]:
        answer = empty.http.post(ITEMS, files=multipart([file]), data={"ids": ["a"]}).json()
        item: dict[str, object] = answer["data"][0]
        return item

    assert add(photo(1)) == {"index": 0, "id": "a", "status": "added"}
    assert add(photo(1)) == {"index": 0, "id": "a", "status": "unchanged"}
    assert add(photo(2)) == {"index": 0, "id": "a", "status": "updated"}
    assert empty.http.get("/collections/default").json()["items"] == 1


def test_a_form_gives_each_picture_its_id_metadata_and_source(empty: Api) -> None:
    form = {
        "ids": ["x/1.jpg", "x/2.jpg"],
        "metadata": ['{"place": "Rome"}', '{"place": "Oslo", "year": 1999}'],
        "sources": ["/photos/1.jpg", "/photos/2.jpg"],
    }
    empty.http.post(ITEMS, files=multipart([photo(1), photo(2)]), data=form)
    item = empty.http.get(f"{ITEMS}/x%2F2.jpg").json()
    assert item["id"] == "x/2.jpg"
    assert item["metadata"] == {"place": "Oslo", "year": 1999}
    assert item["source"] == "/photos/2.jpg"
    assert item["sha256"] == hashlib.sha256(photo(2)).hexdigest()
    assert len(item["embedding"]) == 48


def test_json_gives_each_picture_its_id_metadata_and_source(empty: Api) -> None:
    sent = {
        "items": [
            {
                "image": base64.b64encode(photo(1)).decode(),
                "id": "one",
                "metadata": {"a": 1},
                "source": "here",
            },
            {"image": "not base64!", "id": "two"},
        ]
    }
    data = empty.http.post(ITEMS, json=sent).json()["data"]
    assert data[0] == {"index": 0, "id": "one", "status": "added"}
    assert data[1]["error"]["code"] == "invalid_base64"
    item = empty.http.get(f"{ITEMS}/one").json()
    assert (item["metadata"], item["source"]) == ({"a": 1}, "here")


def test_without_an_id_the_content_is_the_id_and_the_name_is_kept(empty: Api) -> None:
    files = [("images", ("C:\\photos\\cat.jpg", photo(1))), ("images", ("cat.jpg", photo(2)))]
    data = empty.http.post(ITEMS, files=files).json()["data"]
    assert [item["id"] for item in data] == [hashlib.sha256(photo(seed)).hexdigest() for seed in (1, 2)]
    assert empty.http.get(f"{ITEMS}/{data[0]['id']}").json()["metadata"] == {"filename": "cat.jpg"}
    raw = empty.http.post(ITEMS, content=photo(3), headers={"Content-Type": "image/jpeg"}).json()["data"]
    assert raw[0]["status"] == "added"


def test_bad_pictures_are_left_out_and_good_ones_added(empty: Api) -> None:
    data = empty.http.post(ITEMS, files=multipart([photo(1), b"text", photo(2)])).json()["data"]
    assert [item["index"] for item in data] == [0, 1, 2]
    assert [item.get("status") for item in data] == ["added", None, "added"]
    assert data[1]["error"]["code"] == "unsupported_format"
    refused = empty.http.post(f"{ITEMS}?on_error=fail", files=multipart([photo(3), b"text"]))
    assert refused.status_code == 415
    assert empty.http.get("/collections/default").json()["items"] == 2


def test_what_was_acknowledged_is_found_at_once(empty: Api) -> None:
    for seed in range(5):
        empty.http.post(ITEMS, files=multipart([photo(seed)]), data={"ids": [str(seed)]})
        found = empty.http.post("/similar?k=1", files=multipart([photo(seed)])).json()
        assert found["data"][0]["neighbours"][0]["id"] == str(seed)


@pytest.mark.parametrize(
    "item_id",
    ["a", "folder/a.jpg", "a/thumbnail", "thumbnail", "100%25/ä ö?#&.jpg", "a//b", "%2F", "日本/写真.jpg"],
)
def test_any_id_can_be_named_in_a_path(empty: Api, item_id: str) -> None:
    empty.http.post(ITEMS, files=multipart([photo(1)]), data={"ids": [item_id]})
    path = f"{ITEMS}/{quote(item_id, safe='')}"
    assert empty.http.get(path).json()["id"] == item_id
    thumbnail = empty.http.get(f"{path}/thumbnail")
    assert thumbnail.headers["Content-Type"] == "image/webp"
    assert empty.http.delete(path).status_code == 204
    assert empty.http.get(path).json()["code"] == "unknown_item"


def test_a_slash_may_also_stand_as_it_is(empty: Api) -> None:
    empty.http.post(ITEMS, files=multipart([photo(1)]), data={"ids": ["folder/a.jpg"]})
    assert empty.http.get(f"{ITEMS}/folder/a.jpg").json()["id"] == "folder/a.jpg"
    assert empty.http.get(f"{ITEMS}/folder/a.jpg/thumbnail").status_code == 200


def test_a_thumbnail_is_the_picture_made_small_and_upright(empty: Api) -> None:
    file = io.BytesIO()
    left_red = Image.new("RGB", (800, 400), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 400, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: what is stored at the left is shown at the top
    left_red.save(file, "JPEG", exif=exif)
    empty.http.post(ITEMS, files=multipart([file.getvalue()]), data={"ids": ["turned"]})
    answer = empty.http.get(f"{ITEMS}/turned/thumbnail")
    thumbnail = Image.open(io.BytesIO(answer.content)).convert("RGB")
    assert (thumbnail.format, thumbnail.size) == (None, (160, 320))
    top, bottom = (np.asarray(thumbnail)[row, 80] for row in (40, 280))
    np.testing.assert_allclose(top, (255, 0, 0), atol=40)  # JPEG and WebP
    np.testing.assert_allclose(bottom, (0, 0, 255), atol=40)
    again = empty.http.get(f"{ITEMS}/turned/thumbnail", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_listing_goes_page_by_page_in_order_of_id(empty: Api) -> None:
    names = [f"{number:02}" for number in range(7)]
    empty.http.post(ITEMS, files=multipart([photo(seed) for seed in range(7)]), data={"ids": names})
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = empty.http.get(ITEMS, params={"limit": "3", **cursor}).json()
        found += [item["id"] for item in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert found == names


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        pytest.param("GET", f"{ITEMS}?limit=0", {}, 400, "invalid_parameter", id="no items"),
        pytest.param("GET", f"{ITEMS}?page=2", {}, 400, "unknown_parameter", id="unknown"),
        pytest.param("GET", f"{ITEMS}?cursor=!", {}, 422, "invalid_query", id="no cursor of ours"),
        pytest.param("GET", "/collections/none/items", {}, 404, "unknown_collection", id="no collection"),
        pytest.param("GET", f"{ITEMS}/nobody", {}, 404, "unknown_item", id="no item"),
        pytest.param("GET", f"{ITEMS}/nobody/thumbnail", {}, 404, "unknown_item", id="no thumbnail"),
        pytest.param("DELETE", f"{ITEMS}/nobody", {}, 404, "unknown_item", id="nothing to delete"),
        pytest.param("POST", ITEMS, {"json": {"items": []}}, 400, "no_images", id="no pictures"),
        pytest.param("POST", ITEMS, {"json": {"items": [{}]}}, 400, "invalid_parameter", id="no image"),
        pytest.param(
            "POST",
            ITEMS,
            {"files": multipart([photo(1)]), "data": {"ids": ["a", "b"]}},
            400,
            "invalid_parameter",
            id="more ids than images",
        ),
        pytest.param(
            "POST",
            ITEMS,
            {"files": multipart([photo(1)]), "data": {"metadata": ["3"]}},
            400,
            "invalid_parameter",
            id="metadata no object",
        ),
        pytest.param(
            "POST",
            ITEMS,
            {"files": multipart([photo(1)]), "data": {"ids": ["a\x07"]}},
            422,
            "invalid_item",
            id="an id with a bell",
        ),
        pytest.param(
            "POST",
            "/collections/none/items",
            {"files": multipart([photo(1)])},
            404,
            "unknown_collection",
            id="nowhere to add",
        ),
    ],
)
def test_what_can_not_be_done_is_refused(
    api: Api, method: str, path: str, options: dict[str, object], status: int, code: str
) -> None:
    answer = api.http.request(method, path, **options)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"ids": ["a", "b\0"]}, "the id of item 1"),
        ({"sources": ["a", "b\0"]}, "the source of item 1"),
        ({"metadata": ["{}", '{"a": "\\u0000"}']}, "the metadata of item 1"),
    ],
)
def test_what_can_not_be_kept_is_named_by_its_place_in_the_request(
    empty: Api, said: dict[str, list[str]], what: str
) -> None:
    answer = empty.http.post(ITEMS, files=multipart([b"no picture", photo(1)]), data=said)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_item")
    assert what in answer.json()["detail"]


def test_pictures_do_not_join_another_models_collection(start: StartApi, other_bundle: Bundle) -> None:
    api = start()
    api.catalogue.create("theirs", fingerprint=other_bundle.manifest.fingerprint, dimensions=48)
    answer = api.http.post("/collections/theirs/items", files=multipart([photo(1)]))
    assert (answer.status_code, answer.json()["code"]) == (409, "fingerprint_mismatch")
    assert api.http.get("/collections/theirs").json()["items"] == 0
