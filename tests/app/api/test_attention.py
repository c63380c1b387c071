import io
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from dino_core.bundle import Bundle
from dino_core.heatmap import heat, heat_over
from dino_core.preprocess import load_pixels
from tests.app.api.serving import Api, multipart, photo
from tests.app.api.test_embed import damaged_png, text_of

FILE = photo(5)


def ask(api: Api, accept: str = "*/*", **parameters: Any) -> Any:  # noqa: ANN401  httpx's answer
    answer = api.http.post(
        "/attention", files=multipart([FILE]), params=parameters, headers={"Accept": accept}
    )
    assert answer.status_code == 200, answer.text
    return answer


def maps_of(bundle: Bundle) -> NDArray[np.float32]:
    """The class token's attention to the patches, head by head."""
    pixels = load_pixels(FILE, bundle.manifest.preprocessing)[None]
    with torch.inference_mode():
        weights = bundle.model.attention(pixels)
    maps: NDArray[np.float32] = weights[0, :, 0, 1:].reshape(3, 4, 4).numpy()
    return maps


def pixels_of(answer: Any) -> NDArray[np.uint8]:  # noqa: ANN401
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_the_numbers_are_the_networks_in_every_form(api: Api) -> None:
    expected = maps_of(api.bundle)
    body = ask(api, "application/json").json()
    assert (body["heads"], body["grid"]) == (3, {"height": 4, "width": 4})
    assert body["model"]["id"] == "tiny"
    np.testing.assert_allclose(body["attention"], expected, atol=1e-6)
    np.testing.assert_allclose(
        np.load(io.BytesIO(ask(api, "application/x-npy").content)), expected, atol=1e-6
    )
    packed = msgpack.unpackb(ask(api, "application/msgpack").content)["attention"]
    np.testing.assert_allclose(np.frombuffer(packed, "<f4").reshape(3, 4, 4), expected, atol=1e-6)


def test_a_head_or_their_mean_may_be_chosen(api: Api) -> None:
    expected = maps_of(api.bundle)
    one = ask(api, "application/json", head=2).json()
    assert one["heads"] == 1
    np.testing.assert_allclose(one["attention"], expected[2:], atol=1e-6)
    mean = ask(api, "application/json", head="mean").json()["attention"]
    np.testing.assert_allclose(mean, expected.mean(axis=0, keepdims=True), atol=1e-6)


def test_the_picture_is_the_map_over_what_the_network_sees(api: Api) -> None:
    expected = maps_of(api.bundle)
    pixels = load_pixels(FILE, api.bundle.manifest.preprocessing).permute(1, 2, 0).contiguous().numpy()
    answer = ask(api)
    assert answer.headers["Content-Type"] == "image/png"
    assert np.abs(pixels_of(answer).astype(int) - heat_over(pixels, expected.mean(axis=0))).max() <= 1
    head = pixels_of(ask(api, head=1))
    assert np.abs(head.astype(int) - heat_over(pixels, expected[1])).max() <= 1
    plain = pixels_of(ask(api, "image/png", head=0, overlay=False))
    assert np.abs(plain.astype(int) - heat(expected[0], size_hw=(32, 32))).max() <= 1


@pytest.mark.parametrize(
    ("sent", "parameters", "status", "code"),
    [
        pytest.param([], {}, 400, "no_images", id="no image"),
        pytest.param([FILE, FILE], {}, 413, "request_too_large", id="two images"),
        pytest.param([FILE], {"head": 3}, 400, "invalid_parameter", id="no such head"),
        pytest.param([FILE], {"head": -1}, 400, "invalid_parameter", id="below nought"),
        pytest.param([FILE], {"head": "max"}, 400, "invalid_parameter", id="no word of ours"),
        pytest.param([damaged_png()], {}, 422, "undecodable_image", id="damaged"),
    ],
)
def test_what_can_not_be_drawn_is_refused(
    api: Api, sent: list[bytes], parameters: dict[str, Any], status: int, code: str
) -> None:
    answer = api.http.post("/attention", json={"images": [text_of(file) for file in sent]} | parameters)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_raw_image_and_one_that_is_not_base64(api: Api) -> None:
    raw = api.http.post("/attention", content=FILE, headers={"Content-Type": "image/jpeg"})
    assert raw.content == ask(api).content
    bad = api.http.post("/attention", json={"images": ["***"]})
    assert (bad.status_code, bad.json()["code"]) == (400, "invalid_base64")
