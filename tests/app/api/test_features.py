"""`/embed` with another pooling or with patches, against the network itself."""

import base64
import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from app.api import answers
from dino_core.backbones import make_backbone
from dino_core.bundle import Bundle, fingerprint_of, load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing, load_pixels
from dino_core.projection import Projection
from tests.app.api.serving import Api, multipart, photo, serving
from tests.app.api.test_embed import SAME, damaged_png, npy
from tests.app.inference.colours import ColourEmbedder

StartApi = Callable[..., Api]
FILES = [photo(seed) for seed in range(3)]


def features_of(bundle: Bundle, files: list[bytes]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Class tokens and patches, of any length, as the network gives them."""
    pixels = torch.stack([load_pixels(file, bundle.manifest.preprocessing) for file in files])
    with torch.inference_mode():
        features = bundle.model.features(pixels)
    assert features.cls_BD is not None
    return features.cls_BD.numpy(), features.patches_BND.numpy()


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return scaled


def embedded(api: Api, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    answer = api.http.post("/embed", files=multipart(FILES), params=parameters)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


@pytest.mark.parametrize("normalize", [True, False])
def test_another_pooling_is_what_the_network_says(api: Api, normalize: bool) -> None:
    cls_BD, patches_BND = features_of(api.bundle, FILES)
    mean_BD = patches_BND.mean(axis=1)
    for pool, expected in (("mean", mean_BD), ("cls+mean", np.concatenate([cls_BD, mean_BD], axis=1))):
        body = embedded(api, pool=pool, normalize=normalize)
        rows = np.array([item["embedding"] for item in body["data"]])
        np.testing.assert_allclose(rows, unit(expected) if normalize else expected, atol=SAME, rtol=1e-4)
        assert (body["pool"], body["model"]["dimensions"]) == (pool, expected.shape[1])


def test_the_models_own_pooling_by_name_is_its_embedding(api: Api) -> None:
    assert embedded(api, pool="cls") == embedded(api)
    assert embedded(api)["pool"] == "cls"


def test_another_pooling_has_the_fingerprint_of_a_bundle_that_pools_so(api: Api) -> None:
    own = api.bundle.model
    other = EmbeddingModel(own.backbone, preprocessing=own.preprocessing, pooling="mean")
    assert embedded(api, pool="mean")["model"]["fingerprint"] == fingerprint_of(other)
    assert embedded(api)["model"]["fingerprint"] == api.bundle.manifest.fingerprint
    # So it can't get into a collection of the served model by mistake.
    body = embedded(api, pool="mean")
    item = {"id": "x", "embedding": body["data"][0]["embedding"]}
    said = {"items": [item], "fingerprint": body["model"]["fingerprint"]}
    assert api.http.post("/collections/default/items", json=said).status_code == 409


def test_patches_stand_row_by_row_on_their_grid(api: Api) -> None:
    _, patches_BND = features_of(api.bundle, FILES)
    body = embedded(api, output="patches")
    assert body["grid"] == {"height": 4, "width": 4}
    rows = np.array([item["patches"] for item in body["data"]])
    np.testing.assert_allclose(rows, unit(patches_BND), atol=SAME, rtol=1e-4)
    raw = np.array([item["patches"] for item in embedded(api, output="patches", normalize=False)["data"]])
    np.testing.assert_allclose(raw, patches_BND, atol=SAME, rtol=1e-4)


def test_patches_come_in_every_form(api: Api) -> None:
    expected = np.array([item["patches"] for item in embedded(api, output="patches")["data"]])
    url = "/embed?output=patches&dtype=float16"
    as_npy = api.http.post(url, files=multipart(FILES), headers={"Accept": answers.NPY})
    packed = api.http.post(url, files=multipart(FILES), headers={"Accept": answers.MSGPACK})
    texts = embedded(api, output="patches", encoding="base64")["data"]
    array = np.load(io.BytesIO(as_npy.content))
    assert (array.shape, array.dtype) == ((3, 16, 48), np.float16)
    np.testing.assert_allclose(array, expected, atol=1e-3)
    first = np.frombuffer(msgpack.unpackb(packed.content)["data"][0]["patches"], "<f2").reshape(16, 48)
    np.testing.assert_array_equal(first, array[0])
    decoded = np.frombuffer(base64.b64decode(texts[0]["patches"]), "<f4").reshape(16, 48)
    np.testing.assert_allclose(decoded, expected[0], atol=SAME)


def test_an_image_that_fails_leaves_the_others_their_patches(api: Api) -> None:
    files = multipart([FILES[0], damaged_png(), FILES[1]])
    body = api.http.post("/embed?output=patches", files=files).json()
    assert [item.get("error", {}).get("code") for item in body["data"]] == [None, "undecodable_image", None]
    answer = api.http.post("/embed?output=patches", files=files, headers={"Accept": answers.NPY})
    array = np.load(io.BytesIO(answer.content))
    assert np.isnan(array).all(axis=(1, 2)).tolist() == [False, True, False]


def test_pixels_have_patches_and_poolings_too(api: Api) -> None:
    pixels = np.stack(
        [load_pixels(file, api.bundle.manifest.preprocessing).permute(1, 2, 0).numpy() for file in FILES]
    )
    headers = {"Content-Type": answers.NPY}
    for parameters, name in (({"output": "patches"}, "patches"), ({"pool": "mean"}, "embedding")):
        sent = api.http.post("/embed", content=npy(pixels), headers=headers, params=parameters).json()
        expected = embedded(api, **parameters)
        for one, other in zip(sent["data"], expected["data"], strict=True):
            np.testing.assert_allclose(one[name], other[name], atol=SAME)


def test_embeddings_and_features_of_one_image_at_once_do_not_mix(api: Api) -> None:
    """The same bytes are computed once for all who want the same of them, and for no others."""
    file = photo(77)
    wishes = [{}, {"pool": "mean"}, {"output": "patches"}, {"pool": "cls+mean"}] * 6

    def ask(parameters: dict[str, str]) -> tuple[int, ...]:
        item = api.http.post("/embed", files=multipart([file]), params=parameters).json()["data"][0]
        return np.array(item.get("embedding", item.get("patches"))).shape

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, wishes)) == [(48,), (48,), (16, 48), (96,)] * 6


@pytest.mark.parametrize(
    ("parameters", "status", "code"),
    [
        pytest.param({"pool": "max"}, 400, "invalid_parameter", id="no pooling of ours"),
        pytest.param({"output": "patches", "pool": "mean"}, 400, "invalid_parameter", id="both"),
        pytest.param({"output": "tokens"}, 400, "invalid_parameter", id="no output of ours"),
        pytest.param({"normalize": "false"}, 400, "invalid_parameter", id="raw embeddings"),
        pytest.param({"dtype": "int8"}, 400, "invalid_parameter", id="no type of ours"),
    ],
)
def test_what_can_not_be_had_is_refused(api: Api, parameters: dict[str, str], status: int, code: str) -> None:
    answer = api.http.post("/embed", files=multipart(FILES), params=parameters)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("resnet")
    backbone = make_backbone("resnet10t", image_size_px=64)
    model = EmbeddingModel(backbone, preprocessing=Preprocessing(resize_px=64, crop_px=64), pooling="mean")
    write_bundle(folder / "resnet", model, provenance={}, card="# Random\n")
    with serving(load_bundle(folder / "resnet"), folder / "data") as running:
        yield running


def test_a_network_without_a_class_token_has_patches_and_says_what_it_has_not(convolutional: Api) -> None:
    body = embedded(convolutional, output="patches")
    assert body["grid"] == {"height": 2, "width": 2}
    assert np.array(body["data"][0]["patches"]).shape == (4, 512)
    for parameters in ({"pool": "cls"}, {"pool": "cls+mean"}):
        answer = convolutional.http.post("/embed", files=multipart(FILES), params=parameters)
        assert (answer.status_code, answer.json()["code"]) == (422, "output_unavailable")
        assert "needs a class token" in answer.json()["detail"]
    answer = convolutional.http.post("/attention", files=multipart(FILES[:1]))
    assert (answer.status_code, answer.json()["code"]) == (422, "output_unavailable")
    assert "use a ViT" in answer.json()["detail"]


def test_a_model_that_is_not_a_bundle_gives_embeddings_only(start: StartApi) -> None:
    api = start(embedder=ColourEmbedder())
    assert api.http.post("/embed", files=multipart(FILES)).status_code == 200
    answer = api.http.post("/embed?output=patches", files=multipart(FILES))
    assert (answer.status_code, answer.json()["code"]) == (422, "output_unavailable")


def test_an_answer_that_would_be_too_large_is_refused_before_the_work(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "MAX_ANSWER_BYTES", 2 * 16 * 48 * 2)  # two images' patches, as float16

    def embedded() -> float:
        found = re.search(r'images_total{[^}]*outcome="embedded"} (\S+)', api.http.get("/metrics").text)
        assert found is not None
        return float(found.group(1))

    before = embedded()
    as_json = api.http.post("/embed?output=patches", files=multipart(FILES[:2]))
    assert (as_json.status_code, as_json.json()["code"]) == (413, "request_too_large")
    assert as_json.json()["limit"] < as_json.json()["actual"]
    assert "application/x-npy" in as_json.json()["detail"]
    url, headers = "/embed?output=patches&dtype=float16", {"Accept": answers.NPY}
    assert api.http.post(url, files=multipart(FILES[:2]), headers=headers).status_code == 200
    assert api.http.post(url, files=multipart(FILES), headers=headers).status_code == 413
    assert embedded() == before + 2


def test_numbers_beyond_float16_are_an_error_and_not_infinity(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = make_backbone(
        "vit_tiny_patch16_224",
        image_size_px=32,
        model_kwargs={"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3},
    )
    with torch.no_grad():
        backbone.network.norm.weight.mul_(1e6)  # type: ignore[union-attr,operator]  # timm's layer
    model = EmbeddingModel(backbone, preprocessing=Preprocessing(resize_px=32, crop_px=32), pooling="cls")
    write_bundle(tmp_path / "loud", model, provenance={}, card="# Loud\n")
    with serving(load_bundle(tmp_path / "loud"), tmp_path / "data") as api:
        half = embedded(api, output="patches", normalize=False, dtype="float16")
        assert {item["error"]["code"] for item in half["data"]} == {"embedding_failed"}
        assert "error" not in embedded(api, output="patches", normalize=False)["data"][0]
        assert "error" not in embedded(api, output="patches", dtype="float16")["data"][0]


def test_a_projection_is_of_the_bundles_own_pooling_only(api: Api, tmp_path: Path) -> None:
    own = api.bundle.model
    projection = Projection(torch.zeros(48), torch.randn(48, 8, generator=torch.Generator().manual_seed(0)))
    reduced = EmbeddingModel(
        own.backbone, preprocessing=own.preprocessing, pooling="cls", projection=projection
    )
    write_bundle(tmp_path / "reduced", reduced, provenance={}, card="# Reduced\n")
    with serving(load_bundle(tmp_path / "reduced"), tmp_path / "data") as small:
        assert len(embedded(small)["data"][0]["embedding"]) == 8
        assert embedded(small, pool="cls") == embedded(small)
        without = embedded(small, pool="mean")
    # What the same network without a projection says, under the same fingerprint.
    expected = embedded(api, pool="mean")
    assert without["model"]["fingerprint"] == expected["model"]["fingerprint"]
    for one, other in zip(without["data"], expected["data"], strict=True):
        np.testing.assert_allclose(one["embedding"], other["embedding"], atol=SAME)
