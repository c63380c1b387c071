"""Two models in one service: requests choose by name, collections by fingerprint."""

import base64
from collections.abc import Iterator

import numpy as np
import pytest

from app.inference.config import InferenceConfig
from app.served_models import serve_bundle, share_of
from dino_core.bundle import Bundle
from dino_core.preprocess import ImageLimits, load_pixels
from tests.app.api.serving import Api, multipart, photo, serving


@pytest.fixture(scope="module")
def two(bundle: Bundle, other_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """`tiny`, the default, and `other`."""
    with serving(bundle, tmp_path_factory.mktemp("two") / "data", beside=[other_bundle]) as api:
        yield api


def expected(bundle: Bundle, image: bytes) -> np.ndarray:
    pixels_CHW = load_pixels(image, bundle.manifest.preprocessing, limits=ImageLimits())
    return np.asarray(bundle.model(pixels_CHW[None]).detach().numpy()[0])


@pytest.mark.parametrize("way", ["query", "form", "json", "nothing"])
def test_a_request_chooses_its_model_by_name(
    two: Api, bundle: Bundle, other_bundle: Bundle, way: str
) -> None:
    image = photo(1)
    match way:
        case "query":
            answer = two.http.post("/embed?model=other", files=multipart([image]))
        case "form":
            answer = two.http.post("/embed", files=multipart([image]), data={"model": "other"})
        case "json":
            sent = {"images": [_base64(image).decode()], "model": "other"}
            answer = two.http.post("/embed", json=sent)
        case _:
            answer = two.http.post("/embed", files=multipart([image]))
    chosen = bundle if way == "nothing" else other_bundle
    assert answer.json()["model"]["fingerprint"] == chosen.manifest.fingerprint
    assert answer.headers["X-Model-Fingerprint"] == chosen.manifest.fingerprint
    assert answer.headers["X-Model-Id"] == chosen.manifest.id
    row = np.array(answer.json()["data"][0]["embedding"])
    np.testing.assert_allclose(row, expected(chosen, image), atol=1e-5)  # batches sum in other orders


def test_an_unknown_model_is_answered_with_the_names_that_there_are(two: Api) -> None:
    answer = two.http.post("/embed?model=gpt", files=multipart([photo(1)]))
    problem = answer.json()
    assert (answer.status_code, problem["code"], problem["parameter"]) == (404, "model_not_found", "model")
    assert "'tiny', 'other'" in problem["detail"]


def test_info_lists_all_models_and_openais_clients_find_them(
    two: Api, bundle: Bundle, other_bundle: Bundle
) -> None:
    info = two.http.get("/info").json()
    assert [model["id"] for model in info["models"]] == ["tiny", "other"]
    assert info["model"] == info["models"][0]
    fingerprints = [model["fingerprint"] for model in info["models"]]
    assert fingerprints == [bundle.manifest.fingerprint, other_bundle.manifest.fingerprint]
    assert [model["id"] for model in two.http.get("/v1/models").json()["data"]] == ["tiny", "other"]
    lines = two.http.get("/metrics").text
    told = [line for line in lines.splitlines() if line.startswith("dino_serve_model_info{")]
    assert len(told) == 2
    assert all(f'fingerprint="{one}"' in line for one, line in zip(fingerprints, told, strict=True))


def test_a_collection_is_searched_and_filled_with_its_own_model(two: Api, other_bundle: Bundle) -> None:
    made = two.http.post("/collections", json={"name": "others", "model": "other"}).json()
    assert (made["fingerprint"], made["searchable"]) == (other_bundle.manifest.fingerprint, True)
    added = two.http.post("/collections/others/items", files=multipart([photo(1)]), data={"ids": ["one"]})
    assert added.json()["model"]["id"] == "other"
    line = two.http.post(
        "/collections/others/items",
        content=b'{"id": "two", "image": "%s"}\n' % _base64(photo(2)),
        headers={"Content-Type": "application/x-ndjson"},
    )
    assert line.json()["status"] == "added"
    found = two.http.post("/similar?collection=others", files=multipart([photo(2)])).json()
    assert found["model"]["id"] == "other"
    assert found["data"][0]["neighbours"][0]["id"] == "two"
    assert found["data"][0]["neighbours"][0]["score"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("path", ["/similar?model=other", "/collections/default/items?model=other"])
def test_a_model_does_not_meet_another_ones_collection(
    two: Api, bundle: Bundle, other_bundle: Bundle, path: str
) -> None:
    answer = two.http.post(path, files=multipart([photo(1)]))
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "fingerprint_mismatch")
    assert problem["expected"] == bundle.manifest.fingerprint
    assert problem["found"] == other_bundle.manifest.fingerprint


def test_a_body_may_not_choose_another_ones_model_either(two: Api) -> None:
    answer = two.http.post("/collections/default/items", files=multipart([photo(1)]), data={"model": "other"})
    assert answer.json()["code"] == "fingerprint_mismatch"


def test_a_pinned_fingerprint_must_be_the_chosen_models(
    two: Api, bundle: Bundle, other_bundle: Bundle
) -> None:
    def status(path: str, pinned: str) -> int:
        headers = {"X-Expect-Fingerprint": pinned}
        return two.http.post(path, files=multipart([photo(1)]), headers=headers).status_code

    assert status("/embed", bundle.manifest.fingerprint) == 200
    assert status("/embed?model=other", other_bundle.manifest.fingerprint) == 200
    assert status("/embed", other_bundle.manifest.fingerprint) == 409
    assert status("/embed?model=other", bundle.manifest.fingerprint) == 409
    assert status("/embed", "sha256:0") == 409


def test_a_collection_can_be_reindexed_with_a_model_of_ones_choice(two: Api, other_bundle: Bundle) -> None:
    two.http.post("/collections", json={"name": "moving"})
    two.http.post("/collections/moving/items", files=multipart([photo(1), photo(2)]))
    begun = two.http.post("/collections/moving/reindex", json={"model": "other"})
    assert begun.json()["to_fingerprint"] == other_bundle.manifest.fingerprint
    while (state := two.http.get("/collections/moving/reindex").json()["state"]) == "running":
        pass
    assert state == "done"
    found = two.http.post("/similar?collection=moving", files=multipart([photo(2)])).json()
    assert found["model"]["id"] == "other"


def test_many_models_take_no_more_than_one() -> None:
    whole = InferenceConfig(cores=8, max_images_in_flight=1024, max_images_per_request=256)
    shares = [share_of(whole, models=3, largest_request_bytes=100 * 2**20)] * 3
    assert sum(share.cores or 0 for share in shares) <= 8
    for budget in ("max_images_in_flight", "max_bytes_in_flight", "max_pixels_in_flight"):
        assert sum(getattr(share, budget) for share in shares) <= getattr(whole, budget)
    # Even a tenth of the service takes its largest request.
    share = share_of(whole, models=10, largest_request_bytes=100 * 2**20)
    assert share.cores == 1
    assert share.max_images_in_flight == 256
    assert share.max_bytes_in_flight == 100 * 2**20


def test_a_bundle_can_be_served_under_another_name(bundle: Bundle) -> None:
    served = serve_bundle(bundle, InferenceConfig(), name="mine")
    assert (served.name, served.info.id, served.manifest.id) == ("mine", "mine", "mine")
    assert served.info.fingerprint == bundle.manifest.fingerprint


def _base64(data: bytes) -> bytes:
    return base64.b64encode(data)
