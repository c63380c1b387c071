import base64
from collections.abc import Callable

import msgpack
import numpy as np
import pytest

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]


@pytest.fixture
def filled(start: StartApi) -> Api:
    """Eight photos in the collection, of two colours by metadata."""
    api = start()
    items = [
        {
            "image": base64.b64encode(photo(seed)).decode(),
            "id": f"photos/{seed}.jpg",
            "metadata": {"parity": "odd" if seed % 2 else "even"},
        }
        for seed in range(8)
    ]
    answer = api.http.post("/collections/default/items", json={"items": items})
    assert [item["status"] for item in answer.json()["data"]] == ["added"] * 8
    return api


def ids(answer: dict[str, object], index: int = 0) -> list[str]:
    data = answer["data"]
    assert isinstance(data, list)
    return [neighbour["id"] for neighbour in data[index]["neighbours"]]


def test_a_pictures_nearest_neighbour_is_itself_and_the_rest_is_in_order(filled: Api) -> None:
    answer = filled.http.post("/similar?k=5", files=multipart([photo(3), photo(6)])).json()
    assert ids(answer, 0)[0] == "photos/3.jpg"
    assert ids(answer, 1)[0] == "photos/6.jpg"
    first = answer["data"][0]["neighbours"]
    assert first[0]["score"] == pytest.approx(1, abs=1e-5)
    scores = [neighbour["score"] for neighbour in first]
    assert scores == sorted(scores, reverse=True)
    assert first[0]["metadata"] == {"parity": "odd"}
    assert answer["collection"] == {
        "name": "default",
        "fingerprint": filled.bundle.manifest.fingerprint,
        "items": 8,
        "metric": "cosine",
    }


def test_scores_are_the_cosines_of_the_embeddings(filled: Api) -> None:
    embedded = filled.http.post("/embed", files=multipart([photo(seed) for seed in range(8)])).json()
    rows = np.array([item["embedding"] for item in embedded["data"]])
    answer = filled.http.post("/similar?k=8", files=multipart([photo(2)])).json()
    for neighbour in answer["data"][0]["neighbours"]:
        seed = int(neighbour["id"].removeprefix("photos/").removesuffix(".jpg"))
        assert neighbour["score"] == pytest.approx(float(rows[seed] @ rows[2]), abs=1e-4)


def test_a_raw_body_an_embedding_and_an_id_search_for_the_same(filled: Api) -> None:
    row = filled.http.post("/embed", files=multipart([photo(4)])).json()["data"][0]["embedding"]
    as_text = base64.b64encode(np.array(row, "<f4").tobytes()).decode()
    raw = filled.http.post("/similar", content=photo(4), headers={"Content-Type": "image/jpeg"}).json()
    expected = ids(raw)
    assert ids(filled.http.post("/similar", json={"embedding": row}).json()) == expected
    assert ids(filled.http.post("/similar", json={"embedding": as_text}).json()) == expected
    by_id = ids(filled.http.post("/similar", json={"id": "photos/4.jpg"}).json())
    assert by_id == expected[1:]  # an item is not its own neighbour


def test_offset_threshold_and_filter_narrow_what_is_found(filled: Api) -> None:
    sent = multipart([photo(5)])
    every = filled.http.post("/similar?k=8", files=sent).json()
    assert ids(filled.http.post("/similar?k=3&offset=2", files=sent).json()) == ids(every)[2:5]
    threshold = every["data"][0]["neighbours"][3]["score"] - 1e-5
    assert ids(filled.http.post(f"/similar?threshold={threshold}", files=sent).json()) == ids(every)[:4]
    odd = filled.http.post("/similar", files=sent, data={"filter": '{"field": "parity", "eq": "odd"}'}).json()
    found = odd["data"][0]["neighbours"]
    assert found
    assert {neighbour["metadata"]["parity"] for neighbour in found} == {"odd"}


def test_the_caller_chooses_what_is_said_of_a_neighbour(filled: Api) -> None:
    sent = multipart([photo(5)])
    bare = filled.http.post("/similar?k=1&include=", files=sent).json()["data"][0]["neighbours"][0]
    assert set(bare) == {"id", "score"}
    full = filled.http.post("/similar?k=1&include=embedding,metadata", files=sent).json()
    neighbour = full["data"][0]["neighbours"][0]
    row = filled.http.post("/embed", files=sent).json()["data"][0]["embedding"]
    np.testing.assert_allclose(neighbour["embedding"], row, atol=1e-5)
    packed = filled.http.post("/similar", files=sent, headers={"Accept": "application/msgpack"})
    assert msgpack.unpackb(packed.content)["data"][0]["neighbours"][0]["id"] == "photos/5.jpg"


def test_each_picture_of_a_search_succeeds_or_fails_for_itself(filled: Api) -> None:
    answer = filled.http.post("/similar", files=multipart([b"text", photo(1), photo(2)[:-400]])).json()
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert answer["data"][0]["error"]["code"] == "unsupported_format"
    assert ids(answer, 1)[0] == "photos/1.jpg"
    assert answer["data"][2]["error"]["code"] == "truncated_image"


def test_a_search_in_nothing_finds_nothing(start: StartApi) -> None:
    assert ids(start().http.post("/similar", files=multipart([photo(1)])).json()) == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param({}, 400, "no_images", id="nothing to search by"),
        pytest.param({"id": "a", "embedding": [1.0]}, 400, "invalid_parameter", id="two queries"),
        pytest.param({"id": ""}, 404, "unknown_item", id="an empty id"),
        pytest.param({"embedding": []}, 422, "invalid_vector", id="no numbers"),
        pytest.param({"id": "nobody"}, 404, "unknown_item", id="no such item"),
        pytest.param({"id": "a", "collection": "none"}, 404, "unknown_collection", id="no such collection"),
        pytest.param({"id": "a", "k": 0}, 400, "invalid_parameter", id="k of 0"),
        pytest.param({"embedding": [1.0] * 48, "k": 900, "offset": 900}, 422, "invalid_query", id="too deep"),
        pytest.param({"embedding": [1.0, 2.0]}, 422, "invalid_vector", id="other dimensions"),
        pytest.param({"embedding": [0.0] * 48}, 422, "invalid_vector", id="no direction"),
        pytest.param({"embedding": "not base64!"}, 400, "invalid_parameter", id="a text"),
        pytest.param(
            {"embedding": [1.0] * 48, "filter": {"parity": {"$near": 1}}},
            422,
            "invalid_filter",
            id="a filter",
        ),
        pytest.param({"embedding": [1.0] * 48, "filter": "{"}, 400, "invalid_parameter", id="no JSON"),
        pytest.param({"embedding": [1.0] * 48, "q": 1}, 400, "unknown_parameter", id="unknown"),
    ],
)
def test_a_query_that_can_not_be_is_refused(
    filled: Api, body: dict[str, object], status: int, code: str
) -> None:
    answer = filled.http.post("/similar", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("other", ["id=photos/1.jpg", "id=", "embedding=AAAA"])
def test_images_and_something_else_are_two_queries(filled: Api, other: str) -> None:
    answer = filled.http.post(f"/similar?{other}", files=multipart([photo(1)]))
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")


def test_two_queries_in_a_form_are_named(filled: Api) -> None:
    form = {"id": (None, b"a"), "embedding": (None, b"AACAPw==")}
    problem = filled.http.post("/similar", files=form).json()
    assert (problem["code"], problem["parameter"]) == ("invalid_parameter", "embedding")


def test_a_collection_of_another_model_can_not_be_searched(
    start: StartApi, bundle: Bundle, other_bundle: Bundle
) -> None:
    api = start()
    api.catalogue.create("theirs", fingerprint=other_bundle.manifest.fingerprint, dimensions=48)
    answer = api.http.post("/similar?collection=theirs", files=multipart([photo(1)]))
    assert (answer.status_code, answer.json()["code"]) == (409, "fingerprint_mismatch")
    assert answer.json()["expected"] == other_bundle.manifest.fingerprint
    assert answer.json()["found"] == bundle.manifest.fingerprint
    assert answer.headers["X-Should-Retry"] == "false"
    assert "POST /collections/theirs/reindex" in answer.json()["detail"]
