from collections.abc import Callable
from pathlib import Path

import pytest

from tests.app.api.serving import Api, multipart, photo

StartApi = Callable[..., Api]
KEY = "correct-horse-battery"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of the team\n\nanother-key-of-ours\n{KEY}\n")
    return path


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"],
)
def test_this_machine_may_be_called_by_its_names(api: Api, host: str) -> None:
    assert api.http.get("/info", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]", ""],
)
def test_a_name_of_another_machine_is_refused(api: Api, host: str) -> None:
    answer = api.http.get("/info", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (400, "untrusted_host")


def test_other_names_can_be_allowed(start: StartApi) -> None:
    api = start(allowed_hosts=("photos.example",))
    assert api.http.get("/info", headers={"Host": "photos.example:80"}).status_code == 200
    assert api.http.get("/info", headers={"Host": "evil.example"}).status_code == 400


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"])
def test_pages_of_other_sites_can_not_change_anything(api: Api, origin: str) -> None:
    answer = api.http.post(
        "/collections/default/items", files=multipart([photo(1)]), headers={"Origin": origin}
    )
    assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin")


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("path", ["/info", "/embed", "/v1/embeddings", "/collections"])
def test_no_answer_lets_another_sites_page_read_it(api: Api, method: str, path: str) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = api.http.request(method, path, headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_our_own_page_and_allowed_sites_may_call(start: StartApi) -> None:
    api = start(allowed_origins=("https://photos.example",))
    for origin in (api.url, "https://photos.example"):
        answer = api.http.post("/embed", files=multipart([photo(1)]), headers={"Origin": origin})
        assert answer.status_code == 200


def test_with_keys_only_their_holders_get_data(start: StartApi, key_file: Path) -> None:
    api = start(api_key_file=key_file)

    def status(**headers: str) -> int:
        return api.http.post("/embed", files=multipart([photo(1)]), headers=headers).status_code

    assert status() == 401
    assert status(Authorization="Bearer wrong") == 401
    assert status(Authorization=f"Basic {KEY}") == 401
    assert status(Authorization=f"Bearer {KEY}") == 200
    assert status(Authorization=f"bearer {KEY}") == 200
    assert status(**{"X-Api-Key": KEY}) == 200
    assert status(**{"X-Api-Key": "another-key-of-ours"}) == 200
    refused = api.http.get("/collections")
    assert refused.json()["code"] == "unauthorized"
    assert refused.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/page/app.js", "/openapi.json", "/health/live", "/health/ready"]
)
def test_what_tells_nothing_needs_no_key(start: StartApi, key_file: Path, path: str) -> None:
    assert start(api_key_file=key_file).http.get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/info", "/metrics", "/collections", "/collections/default/items", "/nowhere"]
)
def test_what_tells_something_needs_a_key(start: StartApi, key_file: Path, path: str) -> None:
    assert start(api_key_file=key_file).http.get(path).status_code == 401
