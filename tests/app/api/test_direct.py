"""What is answered directly is what the framework would have answered."""

import re

import httpx
import pytest

from tests.app.api.serving import Api, multipart, photo


def ask(api: Api, path: str, *, direct: bool, **told: object) -> httpx.Response:
    """With a pin the request goes the framework's way; this one pins the model that is served."""
    headers = {} if direct else {"X-Expect-Fingerprint": api.engine.model.fingerprint}
    return api.http.post(path, headers=headers, **told)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "told"),
    [
        pytest.param("/embed", {"files": multipart([photo(1), photo(2)])}, id="embed"),
        pytest.param("/embed?encoding=base64", {"content": photo(3)}, id="embed, raw"),
        pytest.param("/embed?encoding=hex", {"files": multipart([photo(1)])}, id="a parameter's value"),
        pytest.param("/embed", {"files": multipart([b"no picture"])}, id="an image's error"),
        pytest.param("/embed?on_error=fail", {"files": multipart([b"no picture"])}, id="a refused image"),
        pytest.param("/embed", {"json": {"images": "?"}}, id="a malformed body"),
        pytest.param("/embed?model=other", {"files": multipart([photo(1)])}, id="no such model"),
        pytest.param("/similar?k=3", {"files": multipart([photo(1)])}, id="similar"),
        pytest.param("/similar", {"json": {"id": "nothing"}}, id="similar to nothing"),
        pytest.param("/v1/embeddings", {"json": {"model": "other", "input": ["x"]}}, id="OpenAI's error"),
    ],
)
def test_the_same_answer_both_ways(api: Api, path: str, told: dict[str, object]) -> None:
    answers = [ask(api, path, direct=direct, **told) for direct in (True, False)]
    assert answers[0].status_code == answers[1].status_code
    contents = [{**answer.json(), "request_id": ""} for answer in answers]
    assert contents[0] == contents[1]
    names = [sorted(name for name, _ in answer.headers.multi_items()) for answer in answers]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "headers", [{"X-Request-Timeout-Ms": "soon"}, {"X-Request-Timeout-Ms": "-1"}, {"X-Priority": "top"}]
)
def test_a_header_that_can_not_be_read_is_refused(api: Api, headers: dict[str, str]) -> None:
    answer = api.http.post("/embed", files=multipart([photo(1)]), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")
    assert next(iter(headers)).lower() in answer.json()["detail"].lower()


def test_both_ways_are_counted_under_the_same_route(api: Api) -> None:
    def answered() -> float:
        text = api.http.get("/metrics").text
        found = re.search(r'requests_total\{code="200",route="/embed"\} (\S+)', text)
        return float(found.group(1)) if found else 0.0

    before = answered()
    for direct in (True, False):
        assert ask(api, "/embed", direct=direct, files=multipart([photo(9)])).status_code == 200
    assert answered() == before + 2
