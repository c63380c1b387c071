from pathlib import Path

import pytest

from dino_core.bundle import Bundle, load_bundle
from tests.app.api.serving import multipart, photo, serving
from tests.app.running import write_tiny_bundle


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return tuple(load_bundle(write_tiny_bundle(folder / name, seed=seed)) for seed, name in enumerate("ab"))  # type: ignore[return-value]


def test_the_default_collection_is_there_from_the_start(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    with serving(bundles[0], tmp_path) as api:
        collection = api.http.get("/collections/default").json()
    assert collection["fingerprint"] == bundles[0].manifest.fingerprint
    assert (collection["items"], collection["searchable"]) == (0, True)


def test_items_outlive_the_service(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    with serving(bundles[0], tmp_path) as api:
        api.http.post("/collections/default/items", files=multipart([photo(1)]), data={"ids": ["a"]})
    with serving(bundles[0], tmp_path) as api:
        found = api.http.post("/similar", files=multipart([photo(1)])).json()
    assert found["data"][0]["neighbours"][0]["id"] == "a"


def test_with_another_model_the_service_starts_and_guards_the_old_collection(
    bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    old, new = bundles
    with serving(old, tmp_path) as api:
        api.http.post("/collections/default/items", files=multipart([photo(1)]))
    with serving(new, tmp_path) as api:
        assert api.http.post("/embed", files=multipart([photo(1)])).status_code == 200
        assert api.http.get("/collections/default").json()["searchable"] is False
        for path in ("/similar", "/collections/default/items"):
            answer = api.http.post(path, files=multipart([photo(1)]))
            assert (answer.status_code, answer.json()["code"]) == (409, "fingerprint_mismatch")
            assert answer.json()["expected"] == old.manifest.fingerprint
            assert answer.json()["found"] == new.manifest.fingerprint
            assert "POST /collections" in answer.json()["detail"]
        assert api.http.get("/collections/default/items").json()["data"]  # looking is not comparing

        # What the answer says to do, done:
        assert api.http.delete("/collections/default").status_code == 204
        assert api.http.post("/collections", json={"name": "default"}).status_code == 201
        added = api.http.post("/collections/default/items", files=multipart([photo(1)])).json()
        assert added["data"][0]["status"] == "added"
    with serving(old, tmp_path) as api:
        assert api.http.get("/collections/default").json()["searchable"] is False
