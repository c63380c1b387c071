"""What /openapi.json says of every form of answer, against real answers; and no input makes a 500."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dino_core.bundle import Bundle
from tests.app.api.contract import violations
from tests.app.api.serving import photo
from tests.app.api.test_embed import damaged_png, text_of
from tests.app.running import Service, running_service

ONE = {"images": [text_of(photo(1))]}
MIXED = {"images": [text_of(photo(1)), text_of(damaged_png()), "***"]}
LINES = {"content": json.dumps({"id": 1, "image": ONE["images"][0]}) + '\n{"id": "x"}\n[\n'}
ITEMS = {"items": [{"id": "a", "image": ONE["images"][0], "metadata": {"n": 1}}, {"image": "***"}]}
INPUT = {"model": "tiny", "input": ONE["images"]}


@pytest.fixture(scope="module")
def service(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(bundle.path, tmp_path_factory.mktemp("contract") / "data") as running:
        yield running


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        client.post("/collections/default/items", json=ITEMS).raise_for_status()
        yield client


class Document(dict[str, Any]):
    """The description, short where hypothesis prints it."""

    def __repr__(self) -> str:
        return "/openapi.json"


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> Document:
    return Document(http.get("/openapi.json").json())


def check(answer: httpx.Response, path: str, document: Document) -> None:
    """Fails unless status, Content-Type and every member of the answer are described."""
    operation = document["paths"][path][answer.request.method.lower()]
    responses = operation["responses"]
    described = responses.get(str(answer.status_code)) or responses["default"]
    media_type = answer.headers["Content-Type"].partition(";")[0]
    assert media_type in described["content"], (media_type, list(described["content"]))
    schema = described["content"][media_type].get("schema")
    if media_type == "application/x-ndjson":
        assert schema
        for line in answer.text.splitlines():
            assert violations(json.loads(line), schema, document) == []
    elif media_type.endswith("json"):
        assert schema
        assert violations(answer.json(), schema, document) == []


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        pytest.param("/embed", {"json": ONE}, 200, id="an embedding"),
        pytest.param("/embed", {"json": MIXED}, 200, id="some failed"),
        pytest.param("/embed", {"json": MIXED | {"encoding": "base64"}}, 200, id="base64"),
        pytest.param("/embed", {"json": ONE | {"output": "patches"}}, 200, id="patches"),
        pytest.param("/embed", {"json": ONE | {"pool": "mean"}}, 200, id="another pooling"),
        pytest.param("/embed", {"json": ONE, "headers": {"Accept": "application/x-npy"}}, 200, id="npy"),
        pytest.param(
            "/embed", {"json": ONE, "headers": {"Accept": "application/msgpack"}}, 200, id="msgpack"
        ),
        pytest.param("/embed", {"json": MIXED | {"on_error": "fail"}}, 422, id="one failed all"),
        pytest.param("/embed", {"json": []}, 400, id="no object"),
        pytest.param("/embed", {"json": ONE, "headers": {"Accept": "text/html"}}, 406, id="another form"),
        pytest.param("/embed", {"json": ONE | {"model": "none"}}, 404, id="no such model"),
        pytest.param(
            "/embed/stream", LINES | {"headers": {"Content-Type": "application/x-ndjson"}}, 200, id="lines"
        ),
        pytest.param("/embed/stream", {"json": ONE}, 415, id="no lines"),
        pytest.param("/attention", {"json": ONE}, 200, id="a picture"),
        pytest.param(
            "/attention", {"json": ONE, "headers": {"Accept": "application/json"}}, 200, id="attention"
        ),
        pytest.param("/attention", {"json": ONE | {"head": 9}}, 400, id="no such head"),
        pytest.param("/v1/embeddings", {"json": INPUT}, 200, id="OpenAI's"),
        pytest.param(
            "/v1/embeddings", {"json": INPUT | {"encoding_format": "base64"}}, 200, id="OpenAI's base64"
        ),
        pytest.param("/v1/embeddings", {"json": INPUT | {"input": "a cat"}}, 400, id="OpenAI's error"),
        pytest.param("/v1/embeddings", {"json": INPUT | {"model": "gpt"}}, 404, id="OpenAI's missing model"),
        pytest.param("/similar", {"json": ONE | {"include": ["metadata"]}}, 200, id="neighbours"),
        pytest.param("/similar", {"json": {"k": 0}}, 400, id="no neighbours"),
    ],
)
def test_answers_are_as_described(
    http: httpx.Client, document: Document, path: str, sent: dict[str, Any], status: int
) -> None:
    answer = http.post(path, **sent)
    assert answer.status_code == status, answer.text
    check(answer, path, document)


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/{model}", "/v1/models/tiny"),
        ("/v1/models/{model}", "/v1/models/none"),
        ("/collections", "/collections"),
        ("/collections/{name}", "/collections/default"),
        ("/collections/{name}", "/collections/none"),
        ("/collections/{name}/items", "/collections/default/items"),
        ("/collections/{name}/items/{item_id}", "/collections/default/items/a?include=embedding"),
    ],
)
def test_what_is_read_is_as_described(http: httpx.Client, document: Document, path: str, url: str) -> None:
    check(http.get(url), path, document)


def test_a_member_or_a_kind_that_is_not_described_is_found() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
        "required": ["n"],
    }
    assert violations({"n": None}, schema, {}) == []
    wrong: list[Any] = [{}, {"n": "1"}, {"n": True}, {"n": 1, "m": 2}, []]
    for value in wrong:
        assert violations(value, schema, {}) != []


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MEMBERS = st.sampled_from(
    ["images", "input", "model", "messages", "pool", "output", "dtype", "normalize", "encoding", "on_error"]
    + ["head", "overlay", "timeout", "priority", "dimensions", "encoding_format", "k", "id"]
)
IMAGES = st.sampled_from(
    [ONE["images"], ONE["images"][0], {"image": ONE["images"][0]}, ["***"], {"content": []}]
)


@pytest.mark.parametrize("path", ["/embed", "/attention", "/v1/embeddings", "/embed/stream"])
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=ANY_JSON | st.dictionaries(MEMBERS, ANY_JSON | IMAGES, max_size=4))
def test_no_json_makes_it_a_fault_of_the_service(
    http: httpx.Client,
    document: Document,
    path: str,
    body: Any,  # noqa: ANN401
) -> None:
    kind = "application/x-ndjson" if path.endswith("stream") else "application/json"
    text = json.dumps(body).encode("utf-8", "replace")
    answer = http.post(path, content=text, headers={"Content-Type": kind, "Accept": "*/*"})
    assert answer.status_code < 500, (answer.text, body)
    check(answer, path, document)
