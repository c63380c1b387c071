"""Batches, likes, diversity, groups and explanations over a real service with the example photographs."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from app.search.collection import Item
from dino_core.bundle import Bundle
from tests.app.api.album import IDS, PHOTOS, D, as_text, ask
from tests.app.api.serving import Api, multipart

StartApi = Callable[..., Api]


@pytest.fixture(scope="module")
def rows(album: Api) -> dict[str, npt.NDArray[np.float32]]:
    items = album.catalogue.get("default").get(IDS)
    return {item.id: item.vector for item in items if item is not None}


def neighbours(api: Api, **body: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    (one,) = ask(api, **body)["data"]
    found: list[dict[str, Any]] = one["neighbours"]
    return found


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [neighbour["id"] for neighbour in found]


def ranking(
    rows: dict[str, npt.NDArray[np.float32]], query: npt.NDArray[np.floating], *without: str
) -> list[str]:
    return sorted((i for i in rows if i not in without), key=lambda i: -float(rows[i] @ query))


def test_a_batch_of_ids_answers_in_order_and_each_as_if_it_were_alone(album: Api) -> None:
    asked = [IDS[3], "nobody", IDS[4], IDS[3]]
    answer = ask(album, id=asked, k=4)
    assert [one["index"] for one in answer["data"]] == [0, 1, 2, 3]
    unknown = answer["data"].pop(1)
    assert unknown["error"]["code"] == "unknown_item"
    assert "'nobody'" in unknown["error"]["title"]
    alone = [neighbours(album, id=item_id, k=4) for item_id in (IDS[3], IDS[4], IDS[3])]
    assert [one["neighbours"] for one in answer["data"]] == alone


def test_a_batch_can_be_made_to_fail_as_a_whole(album: Api) -> None:
    answer = album.http.post("/similar", json={"id": [IDS[0], "nobody"], "on_error": "fail"})
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_item")
    only_unknown = ask(album, id=["nobody", "no one"])
    assert [one["error"]["code"] for one in only_unknown["data"]] == ["unknown_item"] * 2


def test_embeddings_may_be_one_or_several_as_numbers_or_as_text(
    album: Api, rows: dict[str, npt.NDArray[np.float32]]
) -> None:
    several = np.stack([rows[IDS[7]], rows[IDS[20]]])
    as_numbers = ask(album, embedding=several.tolist())["data"]
    assert [one["neighbours"][0]["id"] for one in as_numbers] == [IDS[7], IDS[20]]
    assert ask(album, embedding=as_text(several.astype("<f4").tobytes()))["data"] == as_numbers
    assert ask(album, embedding=several[0].tolist())["data"][0]["neighbours"] == as_numbers[0]["neighbours"]
    in_query = album.http.post(
        "/similar", params={"embedding": json.dumps(several.tolist())}, files=no_images()
    )
    assert in_query.json()["data"] == as_numbers
    integers = (1000 * rows[IDS[7]]).round().astype(int).tolist()
    assert neighbours(album, embedding=integers)[0]["id"] == IDS[7]


def no_images() -> dict[str, tuple[None, bytes]]:
    """A form without files, which is multipart all the same."""
    return {"k": (None, b"10")}


def test_likes_and_dislikes_move_the_query_as_the_formula_says(
    album: Api, rows: dict[str, npt.NDArray[np.float32]]
) -> None:
    likes, dislikes = [IDS[0], IDS[30]], [IDS[12]]
    mean = (rows[IDS[0]] + rows[IDS[30]]) / 2
    expected = ranking(rows, 2 * mean - rows[IDS[12]], *likes, *dislikes)
    found = neighbours(album, positive=likes, negative=dislikes, k=60)
    assert ids(found) == expected
    query = 2 * mean - rows[IDS[12]]
    cosines = [rows[i] @ query / np.linalg.norm(query) for i in expected]
    np.testing.assert_allclose([one["score"] for one in found], cosines, atol=2e-6)


def test_examples_may_be_ids_embeddings_and_images_and_mean_the_same(
    album: Api, rows: dict[str, npt.NDArray[np.float32]]
) -> None:
    exclude = [IDS[0], IDS[30], IDS[12]]
    by_id = neighbours(album, positive=exclude[:2], negative=exclude[2:])
    by_object = neighbours(album, positive=[{"id": IDS[0]}, {"id": IDS[30]}], negative=[{"id": IDS[12]}])
    assert by_object == by_id
    mixed = neighbours(
        album,
        positive=[{"image": as_text(PHOTOS[0].read_bytes())}, rows[IDS[30]].tolist()],
        negative=[{"embedding": as_text(rows[IDS[12]].tobytes())}],
        exclude=exclude,
    )
    assert ids(mixed) == ids(by_id)
    data_uri = {"image": f"data:image/jpeg;base64,{as_text(PHOTOS[30].read_bytes())}"}
    negative_image = {"image": as_text(PHOTOS[12].read_bytes())}
    others = neighbours(album, positive=[IDS[0], data_uri], negative=[negative_image], exclude=exclude)
    assert ids(others) == ids(by_id)
    form = {"positive": json.dumps(exclude[:2]), "negative": json.dumps(exclude[2:])}
    in_form = album.http.post("/similar", files={name: (None, text.encode()) for name, text in form.items()})
    assert in_form.json()["data"][0]["neighbours"] == by_id


def test_a_heavier_like_draws_the_query_to_it(album: Api, rows: dict[str, npt.NDArray[np.float32]]) -> None:
    heavy = neighbours(album, positive=[{"id": IDS[0], "weight": 50}, IDS[30]], k=60)
    assert ids(heavy) == ranking(rows, 50 * rows[IDS[0]] + rows[IDS[30]], IDS[0], IDS[30])


def test_best_score_answers_with_the_cosine_to_the_nearest_like(
    album: Api, rows: dict[str, npt.NDArray[np.float32]]
) -> None:
    found = neighbours(album, positive=[IDS[0], IDS[30]], negative=[IDS[12]], strategy="best_score", k=60)
    likes = {i: max(float(rows[i] @ rows[like]) for like in (IDS[0], IDS[30])) for i in rows}
    expected = [i for i in likes if likes[i] > float(rows[i] @ rows[IDS[12]]) and i not in (IDS[0], IDS[30])]
    assert ids(found) == sorted(expected, key=lambda i: -likes[i])
    np.testing.assert_allclose(
        [one["score"] for one in found], [likes[one["id"]] for one in found], atol=2e-6
    )


def test_diversity_shows_fewer_of_the_same_kind(album: Api) -> None:
    plain = neighbours(album, id=IDS[0], k=12)
    assert neighbours(album, id=IDS[0], k=12, diversify=0) == plain
    diverse = neighbours(album, id=IDS[0], k=12, diversify=0.7)
    assert diverse[0] == plain[0]
    assert len({one["metadata"]["class"] for one in diverse}) > len(
        {one["metadata"]["class"] for one in plain}
    )
    batch = ask(album, id=[IDS[0], IDS[5]], k=12, diversify=0.7)["data"]
    assert batch[0]["neighbours"] == diverse
    by_picture = album.http.post(
        "/similar?diversify=0.7&k=12", files=multipart([PHOTOS[0].read_bytes()])
    ).json()
    assert by_picture["data"][0]["neighbours"][0]["id"] == IDS[0]


def test_groups_have_the_best_of_each_value(album: Api) -> None:
    plain = neighbours(album, id=IDS[0], k=60)
    (answer,) = ask(album, id=IDS[0], group_by="class", group_size=2, k=4, offset=1)["data"]
    assert set(answer) == {"index", "groups"}
    order = list(dict.fromkeys(one["metadata"]["class"] for one in plain))
    expected = [
        {"value": value, "neighbours": [one for one in plain if one["metadata"]["class"] == value][:2]}
        for value in order[1:5]
    ]
    assert answer["groups"] == expected
    (by_number,) = ask(album, positive=[IDS[0]], group_by=["shot", "number"], k=3)["data"]
    assert [type(group["value"]) for group in by_number["groups"]] == [int] * 3
    assert [len(group["neighbours"]) for group in by_number["groups"]] == [1] * 3
    batch = ask(album, id=[IDS[0], "nobody", IDS[0]], group_by="class", group_size=2, k=4, offset=1)["data"]
    assert [one.get("groups") for one in batch] == [expected, None, expected]
    assert ask(album, id=IDS[0], group_by="tags")["data"] == [{"index": 0, "groups": []}]


def test_a_range_and_exclusions_narrow_what_is_found(album: Api) -> None:
    plain = neighbours(album, id=IDS[0], k=60)
    middle = plain[10]["score"], plain[20]["score"]
    found = neighbours(album, id=IDS[0], k=60, max_score=middle[0] + 1e-6, threshold=middle[1] - 1e-6)
    assert found == plain[10:21]
    without = neighbours(album, id=IDS[0], k=5, exclude=ids(plain[:3]))
    assert without == plain[3:8]
    assert neighbours(album, id=IDS[0], k=5, offset=3, exact=True) == plain[3:8]


def test_an_explanation_says_how_among_how_many_and_how_long(album: Api) -> None:
    assert "explain" not in ask(album, id=IDS[0])
    plain = ask(album, id=IDS[0], explain=True)["explain"]
    assert (plain["method"], plain["items"]) == ("exact", len(IDS))
    assert 0 < plain["took_ms"] < 10_000
    assert "matched" not in plain
    narrowed = ask(album, id=IDS[0], explain=True, filter={"field": "class", "eq": "cat"})["explain"]
    assert narrowed["matched"] == sum(i.startswith("cat/") for i in IDS)


def test_vectors_and_metadata_are_said_where_they_are_asked_for(
    album: Api, rows: dict[str, npt.NDArray[np.float32]]
) -> None:
    for choice in ({"id": IDS[0]}, {"positive": [IDS[0]]}, {"id": IDS[0], "diversify": 0.5}):
        (nearest, *_) = neighbours(album, include=["embedding"], **choice)
        assert set(nearest) == {"id", "score", "embedding"}
        np.testing.assert_allclose(nearest["embedding"], rows[nearest["id"]], atol=1e-6)
    (answer,) = ask(album, id=IDS[0], include=["embedding"], group_by="class", k=1)["data"]
    assert len(answer["groups"][0]["neighbours"][0]["embedding"]) == D


def test_an_alias_leads_to_its_collection(album: Api) -> None:
    answer = ask(album, id=IDS[0], collection="photos")
    assert answer["collection"]["name"] == "default"
    assert answer["data"] == ask(album, id=IDS[0])["data"]
    described = album.http.get("/collections/photos").json()
    assert (described["name"], described["aliases"]) == ("default", ["photos"])
    assert album.http.post("/collections/photos/count", json={}).json() == {"count": len(IDS)}


def test_items_are_counted_and_listed_by_filter(album: Api) -> None:
    cats = {"field": "class", "eq": "cat"}
    expected = [i for i in IDS if i.startswith("cat/")]
    assert album.http.post("/collections/default/count", json={"filter": cats}).json() == {
        "count": len(expected)
    }
    listed: list[str] = []
    cursor = None
    while True:
        params = {"filter": json.dumps(cats), "limit": "4"} | ({"cursor": cursor} if cursor else {})
        page = album.http.get("/collections/default/items", params=params).json()
        listed += ids(page["data"])
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert listed == expected


def test_a_collection_says_what_it_takes(album: Api) -> None:
    stats = album.http.get("/collections/default").json()["stats"]
    assert stats["memory_bytes"] >= len(IDS) * D * 4
    assert (stats["method"], stats["recall"], stats["deleted"]) == ("exact", 1.0, 0)


def test_a_successor_is_told_of_and_not_searched(start: StartApi, bundle: Bundle) -> None:
    api = start()
    successor = api.catalogue.begin_successor("default", fingerprint="sha256:next", dimensions=7)
    successor.upsert([Item(id="a", vector=np.ones(7, np.float32), metadata={})], fingerprint="sha256:next")
    described = api.http.get("/collections/default").json()
    assert described["successor"] == {"fingerprint": "sha256:next", "dimensions": 7, "items": 1}
    assert (described["items"], described["fingerprint"]) == (0, bundle.manifest.fingerprint)
    assert api.http.post("/similar", json={"id": "a"}).json()["code"] == "unknown_item"


def test_embeddings_of_another_model_are_refused_with_both_fingerprints(album: Api) -> None:
    own = album.bundle.manifest.fingerprint
    body = {"embedding": [1.0] * D}
    for answer in (
        album.http.post("/similar", json=body | {"fingerprint": "sha256:other"}),
        album.http.post("/similar", json=body, headers={"X-Fingerprint": "sha256:other"}),
        album.http.post(
            "/similar", json=body | {"fingerprint": own}, headers={"X-Fingerprint": "sha256:other"}
        ),
    ):
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (409, "fingerprint_mismatch")
        assert (problem["expected"], problem["found"]) == (own, "sha256:other")
    agreed = album.http.post("/similar", json=body | {"fingerprint": own}, headers={"X-Fingerprint": own})
    assert agreed.status_code == 200


def test_the_description_says_all_of_it(album: Api) -> None:
    operation = album.http.get("/openapi.json").json()["paths"]["/similar"]["post"]
    members = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    for name in (
        "positive",
        "negative",
        "strategy",
        "diversify",
        "group_by",
        "max_score",
        "exclude",
        "explain",
    ):
        assert members[name]["description"], name
    assert len(operation["x-codeSamples"]) >= 4
    assert "/collections/{name}/count" in album.http.get("/openapi.json").json()["paths"]


def test_the_examples_of_the_description_work(album: Api) -> None:
    for sample in album.http.get("/openapi.json").json()["paths"]["/similar"]["post"]["x-codeSamples"][1:]:
        body = json.loads(sample["source"].partition("--json '")[2].removesuffix("'"))
        answer = album.http.post("/similar", json=body)
        # The ids are not in this collection; everything else of the example is understood.
        assert answer.status_code in {200, 404}, answer.text
