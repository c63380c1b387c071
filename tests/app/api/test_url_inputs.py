"""Images by URL, through every route that takes images as JSON, of a service that really fetches them."""

import ipaddress
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, photo, serving
from tests.app.test_fetching import Site, answering

LOOPBACK = ipaddress.ip_address("127.0.0.1")
PHOTO = photo(1)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site()
    site.serve = answering(PHOTO, Content_Type="text/html")  # what its server says of it counts for nothing
    yield site
    site.close()


@pytest.fixture(scope="module")
def fetching(bundle: Bundle, site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(
        bundle,
        tmp_path_factory.mktemp("fetching") / "data",
        allow_url_inputs=True,
        url_hosts=(site.place, "localhost"),
        fetches_from=lambda address: address == LOOPBACK,
    ) as api:
        yield api


Ask = Callable[[Api, str], Any]


def embed(api: Api, url: str) -> Any:  # noqa: ANN401
    return api.http.post("/embed", json={"images": [{"url": url}]}).json()["data"][0]


def embed_stream(api: Api, url: str) -> Any:  # noqa: ANN401
    return _lines(api, "/embed/stream", {"image": {"url": url}})


def openai(api: Api, url: str) -> Any:  # noqa: ANN401
    answer = api.http.post("/v1/embeddings", json={"model": "tiny", "input": url}).json()
    return answer["data"][0] if "data" in answer else answer


def similar(api: Api, url: str) -> Any:  # noqa: ANN401
    return api.http.post("/similar", json={"images": [{"url": url}]}).json()["data"][0]


def likes(api: Api, url: str) -> Any:  # noqa: ANN401
    answer = api.http.post("/similar", json={"positive": [{"image": {"url": url}}]}).json()
    return answer["data"][0] if "data" in answer else {"error": answer}


def items(api: Api, url: str) -> Any:  # noqa: ANN401
    sent = {"items": [{"id": "x", "image": {"url": url}}]}
    return api.http.post("/collections/default/items", json=sent).json()["data"][0]


def item_stream(api: Api, url: str) -> Any:  # noqa: ANN401
    return _lines(api, "/collections/default/items", {"id": "x", "image": {"url": url}})


def _lines(api: Api, path: str, line: dict[str, Any]) -> Any:  # noqa: ANN401
    headers = {"Content-Type": "application/x-ndjson"}
    answer = api.http.post(path, content=orjson.dumps(line) + b"\n", headers=headers)
    return orjson.loads(answer.content.splitlines()[0])


ROUTES = [embed, embed_stream, openai, similar, likes, items, item_stream]


@pytest.mark.parametrize("ask", ROUTES)
def test_every_route_fetches(fetching: Api, site: Site, ask: Ask) -> None:
    before = len(site.heads)
    assert "error" not in ask(fetching, f"http://{site.place}/a.jpg")
    assert len(site.heads) == before + 1


@pytest.mark.parametrize("ask", ROUTES)
@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "http://[::1]/", "http://169.254.169.254/"])
def test_every_route_refuses_addresses_of_its_network(fetching: Api, ask: Ask, url: str) -> None:
    assert ask(fetching, url)["error"]["code"] == "url_refused"


@pytest.mark.parametrize("ask", ROUTES)
def test_images_by_url_are_off_unless_told(api: Api, site: Site, ask: Ask) -> None:
    before = len(site.heads)
    try:
        found = ask(api, f"http://{site.place}/a.jpg")
    except KeyError:
        pass  # the whole request was refused
    else:
        assert found["error"]["code"] in {"invalid_json", "url_refused"}
    assert len(site.heads) == before


def test_a_fetched_image_has_the_embedding_of_its_bytes(fetching: Api, site: Site) -> None:
    fetched = embed(fetching, f"http://{site.place}/b.jpg")
    sent = fetching.http.post("/embed", content=PHOTO, headers={"Content-Type": "image/jpeg"}).json()["data"][
        0
    ]
    assert (fetched["sha256"], fetched["embedding"]) == (sent["sha256"], sent["embedding"])


def test_one_url_that_fails_does_not_fail_its_neighbours(fetching: Api, site: Site) -> None:
    sent = [{"url": "ftp://x/"}, {"url": f"http://{site.place}/"}]
    first, second = fetching.http.post("/embed", json={"images": sent}).json()["data"]
    assert (first["error"]["code"], "embedding" in second) == ("url_refused", True)


def test_this_machine_can_not_be_allowed_by_naming_it(bundle: Bundle, site: Site, tmp_path: Any) -> None:  # noqa: ANN401
    with serving(bundle, tmp_path / "data", allow_url_inputs=True, url_hosts=(site.place,)) as api:
        assert embed(api, f"http://{site.place}/")["error"]["code"] == "url_refused"
