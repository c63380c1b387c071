"""OpenAI's own Python package against a real service, unchanged."""

import base64
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest

from dino_core.bundle import Bundle
from tests.app.api.serving import Api, photo
from tests.app.api.test_embed import SAME, damaged_png, embeddings_of, text_of
from tests.app.inference.colours import ColourEmbedder, picture
from tests.app.running import Service, running_service

StartApi = Callable[..., Api]
KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def service(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A process that wants a key."""
    folder = tmp_path_factory.mktemp("openai")
    (folder / "keys").write_text(KEY)
    flags = ("--api-key-file", str(folder / "keys"), "--max-client-batch-size", "8")
    with running_service(bundle.path, folder / "data", *flags) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def data_uri(file: bytes) -> str:
    return f"data:image/jpeg;base64,{text_of(file)}"


def test_the_package_gets_the_embeddings_that_evaluation_computes(
    client: openai.OpenAI, bundle: Bundle
) -> None:
    files = [photo(1), photo(2)]
    # Without `encoding_format` the package asks for base64, and decodes it.
    answer = client.embeddings.create(model="tiny", input=[data_uri(file) for file in files])
    rows = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(rows, embeddings_of(bundle, files), atol=SAME)
    assert [item.index for item in answer.data] == [0, 1]
    assert answer.model == "tiny"
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (2, 2)


def test_numbers_and_base64_are_the_same_embedding(client: openai.OpenAI) -> None:
    kinds: Any = ("float", "base64")
    as_numbers, as_text = (
        client.embeddings.create(model="tiny", input=data_uri(photo(1)), encoding_format=kind).data[0]
        for kind in kinds
    )
    text: Any = as_text.embedding
    decoded = np.frombuffer(base64.b64decode(text), "<f4")
    np.testing.assert_allclose(as_numbers.embedding, decoded, atol=SAME)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(text_of, id="base64"),
        pytest.param(lambda file: {"image": text_of(file)}, id="Jina, base64"),
        pytest.param(lambda file: {"image": data_uri(file)}, id="Azure"),
        pytest.param(lambda file: {"type": "image_url", "image_url": {"url": data_uri(file)}}, id="vLLM"),
        pytest.param(lambda file: {"type": "input_image", "image_url": data_uri(file)}, id="Responses"),
        pytest.param(
            lambda file: {"content": [{"type": "image_base64", "image_base64": data_uri(file)}]}, id="Voyage"
        ),
        pytest.param(
            lambda file: {"content": [{"type": "image_url", "image_url": {"url": data_uri(file)}}]},
            id="Cohere",
        ),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_peers_form_of_an_image_is_taken(
    client: openai.OpenAI, bundle: Bundle, form: Callable[[bytes], Any], wrapped: bool
) -> None:
    value = form(photo(3))
    answer = client.embeddings.create(model="tiny", input=[value] if wrapped else value)
    np.testing.assert_allclose(answer.data[0].embedding, embeddings_of(bundle, [photo(3)])[0], atol=SAME)


def test_a_conversation_and_infinitys_modality_are_taken(client: openai.OpenAI, bundle: Bundle) -> None:
    part = {"type": "image_url", "image_url": {"url": data_uri(photo(4))}}
    extra = {"messages": [{"role": "user", "content": [part]}], "modality": "image"}
    nothing: Any = None
    answer = client.embeddings.create(model="tiny", input=nothing, extra_body=extra)
    np.testing.assert_allclose(answer.data[0].embedding, embeddings_of(bundle, [photo(4)])[0], atol=SAME)


def test_the_package_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "dinoserve"
    with pytest.raises(openai.NotFoundError, match="has 'tiny'") as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("asked", "code", "param"),
    [
        pytest.param({"input": "a cat on a mat"}, "text_not_embedded", None, id="a sentence"),
        pytest.param({"input": "word"}, "text_not_embedded", None, id="a word that is base64"),
        pytest.param({"input": [1, 2, 3]}, "text_not_embedded", None, id="tokens"),
        pytest.param({"input": [[1, 2], [3]]}, "text_not_embedded", None, id="lists of tokens"),
        pytest.param({"input": {"text": "a cat"}}, "text_not_embedded", None, id="Jina's text"),
        pytest.param({"input": []}, "no_images", None, id="nothing"),
        pytest.param({"input": {"picture": "x"}}, "invalid_json", None, id="no form of ours"),
        pytest.param({"input": {"content": [1, 2]}}, "invalid_json", None, id="two parts"),
        pytest.param({"input": "https://example.org/cat.jpg"}, "invalid_json", None, id="an address"),
        pytest.param({"dimensions": 16}, "invalid_parameter", "dimensions", id="fewer dimensions"),
        pytest.param(
            {"input": [data_uri(photo(1)), data_uri(damaged_png())]},
            "undecodable_image",
            "input[1]",
            id="a damaged image",
        ),
        pytest.param({"extra_body": {"size": 1}}, "unknown_parameter", "size", id="an unknown parameter"),
        pytest.param(
            {"extra_body": {"modality": "text"}}, "invalid_parameter", "modality", id="another modality"
        ),
    ],
)
def test_bad_requests_are_the_packages_bad_requests(
    client: openai.OpenAI, asked: dict[str, Any], code: str, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(**({"model": "tiny", "input": data_uri(photo(1))} | asked))
    error = caught.value
    assert (error.code, error.type, error.param) == (code, "invalid_request_error", param)
    assert error.request_id
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}


def test_the_models_own_dimensions_may_be_asked_for(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=data_uri(photo(1)), dimensions=48)
    assert len(answer.data[0].embedding) == 48


def test_other_errors_have_the_packages_types(client: openai.OpenAI, service: Service) -> None:
    with pytest.raises(openai.NotFoundError, match="has 'tiny'"):
        client.embeddings.create(model="text-embedding-3-small", input=data_uri(photo(1)))
    with pytest.raises(openai.APIStatusError) as too_many:
        client.embeddings.create(model="tiny", input=[data_uri(photo(1))] * 9)
    assert (too_many.value.status_code, too_many.value.code) == (413, "request_too_large")
    with pytest.raises(openai.NotFoundError) as nothing:
        client.post("/chat/completions", cast_to=object, body={})
    assert nothing.value.code == "unknown_route"
    with (
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        stranger.embeddings.create(model="tiny", input=data_uri(photo(1)))
    assert refused.value.code == "unauthorized"


def test_a_busy_service_is_tried_again_when_it_says(start: StartApi) -> None:
    device = ColourEmbedder(max_batch=1)
    api = start(embedder=device, max_concurrent_images=1, max_client_batch_size=1)
    device.open.clear()
    statuses: list[int] = []

    def hear(response: Any) -> None:  # noqa: ANN401  the package's own httpx
        statuses.append(response.status_code)
        if response.status_code == 429:
            assert response.headers["Retry-After-Ms"]
            device.open.set()  # there is room from now on

    with (
        openai.DefaultHttpxClient(event_hooks={"response": [hear]}) as http,
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        first = threading.Thread(target=ask, args=(api, picture((1, 2, 3))))
        first.start()
        assert device.entered.wait(20)
        with pytest.raises(openai.RateLimitError) as busy:
            client.embeddings.create(model="colours", input=text_of(picture((4, 5, 6))))
        assert (busy.value.code, busy.value.type) == ("overloaded", "rate_limit_error")
        first.join()
        device.open.clear()
        device.entered.clear()
        first = threading.Thread(target=ask, args=(api, picture((7, 8, 9))))
        first.start()
        assert device.entered.wait(20)
        answer = client.with_options(max_retries=20).embeddings.create(
            model="colours", input=text_of(picture((4, 5, 6)))
        )
        first.join()
    assert [round(value) for value in answer.data[0].embedding] == [4, 5, 6]
    assert statuses[:2] == [429, 429]
    assert statuses[-1] == 200


def ask(api: Api, file: bytes) -> None:
    api.http.post("/embed", content=file, headers={"Content-Type": "image/png"})
