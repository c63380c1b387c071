import base64
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dino_core.backbones import make_backbone
from dino_core.bundle import Bundle, load_bundle, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.preprocess import Preprocessing, load_pixels
from tests.app.api.serving import Api, multipart, photo, zeros_png
from tests.app.inference.colours import ColourEmbedder, picture

StartApi = Callable[..., Api]
# Sums in another order: the rest of the precision that batches of different sizes share.
SAME = 2e-5


def embeddings_of(bundle: Bundle, files: list[bytes]) -> NDArray[np.float32]:
    """What evaluation computes, one image at a time."""
    pixels = [load_pixels(file, bundle.manifest.preprocessing) for file in files]
    with torch.inference_mode():
        rows: NDArray[np.float32] = torch.cat([bundle.model(one[None]) for one in pixels]).numpy()
    return rows


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def damaged_png() -> bytes:
    """Begins and ends as a PNG does."""
    whole = photo(1, image_format="PNG")
    return whole[:60] + bytes(200) + whole[260:]


def npy(array: NDArray[np.generic]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_embeddings_over_http_are_those_that_evaluation_computes(api: Api) -> None:
    files = [photo(seed) for seed in range(64)]
    expected = embeddings_of(api.bundle, files)

    answer = api.http.post("/embed", files=multipart(files)).json()
    in_batch = np.array([item["embedding"] for item in answer["data"]])
    alone = np.array(
        [
            api.http.post("/embed", files=multipart([file])).json()["data"][0]["embedding"]
            for file in files[:4]
        ]
    )

    assert (in_batch * expected).sum(1).min() > 0.9999  # both have length 1: this is the cosine
    assert (alone * expected[:4]).sum(1).min() > 0.9999


def test_every_form_of_body_gives_the_same_embedding(api: Api) -> None:
    file = photo(1)
    pixels = load_pixels(file, api.bundle.manifest.preprocessing).permute(1, 2, 0).numpy()
    answers = [
        api.http.post("/embed", files=multipart([file])),
        api.http.post("/embed", content=file, headers={"Content-Type": "image/jpeg"}),
        api.http.post("/embed", content=file, headers={"Content-Type": "application/octet-stream"}),
        api.http.post("/embed", json={"images": [text_of(file)]}),
        api.http.post("/embed", json={"images": [f"data:image/jpeg;base64,{text_of(file)}"]}),
        api.http.post("/embed", content=npy(pixels[None]), headers={"Content-Type": "application/x-npy"}),
        api.http.post("/embed", content=npy(pixels), headers={"Content-Type": "application/x-npy"}),
    ]
    rows = [answer.json()["data"][0]["embedding"] for answer in answers]
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], atol=SAME)


def test_an_answer_says_what_was_sent_and_which_model_answers(api: Api) -> None:
    answer = api.http.post("/embed", files=multipart([photo(1, size_px=(100, 50), image_format="PNG")]))
    body = answer.json()
    assert body["model"] == {"id": "tiny", "fingerprint": api.bundle.manifest.fingerprint, "dimensions": 48}
    item = body["data"][0]
    assert (item["index"], item["width"], item["height"], item["format"]) == (0, 100, 50, "PNG")
    assert len(item["sha256"]) == 64
    assert body["usage"] == {"images": 1, "failed": 0}
    assert answer.headers["X-Model-Fingerprint"] == api.bundle.manifest.fingerprint
    parts = dict(part.split(";dur=") for part in answer.headers["Server-Timing"].split(", "))
    assert list(parts) == ["receive", "queue", "decode", "forward", "other", "total"]
    total_ms = float(parts.pop("total"))
    # Each is rounded to a tenth of a millisecond.
    assert sum(map(float, parts.values())) == pytest.approx(total_ms, abs=0.06 * 6)
    assert float(parts["decode"]) > 0
    assert float(parts["forward"]) > 0


def test_every_form_of_answer_has_the_same_numbers(api: Api) -> None:
    files = [photo(1), photo(2)]

    def ask(accept: str, **parameters: str) -> bytes:
        answer = api.http.post(
            "/embed", files=multipart(files), params=parameters, headers={"Accept": accept}
        )
        assert answer.headers["Content-Type"] == accept
        return answer.content

    rows = np.load(io.BytesIO(ask("application/x-npy")))
    assert rows.dtype == np.float32
    packed = msgpack.unpackb(ask("application/msgpack"))
    assert packed["dtype"] == "float32"
    np.testing.assert_array_equal([np.frombuffer(item["embedding"], "<f4") for item in packed["data"]], rows)
    as_text = api.http.post("/embed?encoding=base64", files=multipart(files)).json()["data"]
    np.testing.assert_array_equal(
        [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in as_text], rows
    )
    as_numbers = api.http.post("/embed", files=multipart(files)).json()["data"]
    # JSON has the shortest text that reads back as the same float32.
    np.testing.assert_array_equal(np.array([item["embedding"] for item in as_numbers], np.float32), rows)
    halves = np.load(io.BytesIO(ask("application/x-npy", dtype="float16")))
    np.testing.assert_array_equal(halves, rows.astype(np.float16))
    short = api.http.post("/embed?encoding=base64&dtype=float16", files=multipart(files)).json()["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(short[1]["embedding"]), "<f2"), halves[1])


def test_bad_images_get_their_own_errors_and_good_ones_their_embeddings(api: Api) -> None:
    good = [photo(1), photo(2)]
    truncated = photo(3)[:-400]
    huge = zeros_png(20_000, 20_000)
    assert len(huge) < 100_000
    sent = [good[0], truncated, b"This is a text file.\n", zeros_png(1, 1), huge, b"", good[1]]

    answer = api.http.post("/embed", files=multipart(sent))

    assert answer.status_code == 200
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(7))
    codes = [item["error"]["code"] if "error" in item else "" for item in data]
    assert codes == [
        "",
        "truncated_image",
        "unsupported_format",
        "image_too_small",
        "image_too_large",
        "empty_image",
        "",
    ]
    assert (data[3]["error"]["limit"], data[3]["error"]["actual"]) == (8, 1)
    assert (data[4]["error"]["limit"], data[4]["error"]["actual"]) == (89_478_485, 400_000_000)
    assert answer.json()["usage"] == {"images": 7, "failed": 5}
    expected = embeddings_of(api.bundle, good)
    np.testing.assert_allclose([data[0]["embedding"], data[6]["embedding"]], expected, atol=SAME)


def test_failed_rows_of_an_npy_answer_are_nan_and_counted(api: Api) -> None:
    answer = api.http.post(
        "/embed", files=multipart([photo(1), b"text"]), headers={"Accept": "application/x-npy"}
    )
    rows = np.load(io.BytesIO(answer.content))
    assert np.isnan(rows).all(axis=1).tolist() == [False, True]
    assert answer.headers["X-Failed-Items"] == "1"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        pytest.param(b"text", 415, "unsupported_format", id="a text"),
        pytest.param(b"", 422, "empty_image", id="nothing"),
        pytest.param(photo(1)[:-400], 422, "truncated_image", id="truncated"),
        pytest.param(zeros_png(1, 1), 422, "image_too_small", id="one pixel"),
        pytest.param(zeros_png(20_000, 20_000), 413, "image_too_large", id="too many pixels"),
        pytest.param(zeros_png(8, 2000), 422, "aspect_ratio_too_extreme", id="a line"),
        pytest.param(damaged_png(), 422, "undecodable_image", id="damaged"),
    ],
)
def test_one_bad_image_by_itself_fails_its_request(api: Api, sent: bytes, status: int, code: str) -> None:
    answer = api.http.post("/embed", content=sent, headers={"Content-Type": "image/jpeg"})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_the_caller_chooses_whether_one_bad_image_fails_all(api: Api) -> None:
    sent = multipart([photo(1), b"text"])
    refused = api.http.post("/embed?on_error=fail", files=sent)
    assert (refused.status_code, refused.json()["index"]) == (415, 1)
    raw = api.http.post("/embed?on_error=item", content=b"text", headers={"Content-Type": "image/png"})
    assert (raw.status_code, raw.json()["data"][0]["error"]["code"]) == (200, "unsupported_format")


def test_bad_base64_is_the_images_own_error(api: Api) -> None:
    sent = ["not base64!", "data:image/png,abc", "é", text_of(photo(1))]
    data = api.http.post("/embed", json={"images": sent}).json()["data"]
    assert [item.get("error", {}).get("code") for item in data] == ["invalid_base64"] * 3 + [None]
    refused = api.http.post("/embed", json={"images": sent, "on_error": "fail"})
    assert (refused.status_code, refused.json()["code"]) == (400, "invalid_base64")


def test_an_image_above_the_limit_of_bytes_fails_alone(start: StartApi) -> None:
    api = start(max_image_bytes=5000)
    large = photo(1, size_px=(400, 400), image_format="BMP")
    data = api.http.post("/embed", files=multipart([photo(2), large])).json()["data"]
    assert "embedding" in data[0]
    assert (data[1]["error"]["limit"], data[1]["error"]["actual"]) == (5000, len(large))


def test_thirty_two_clients_at_once_get_each_its_own(api: Api) -> None:
    files = [photo(seed) for seed in range(32)]
    expected = embeddings_of(api.bundle, files)

    def ask(index: int) -> float:
        answer = api.http.post("/embed", files=multipart([files[index]])).json()
        return float(np.dot(answer["data"][0]["embedding"], expected[index]))

    with ThreadPoolExecutor(32) as pool:
        cosines = list(pool.map(ask, list(range(32)) * 3))
    assert min(cosines) > 0.9999
    assert (expected @ expected.T - 2 * np.eye(32)).max() < 0.9999  # otherwise the line above could not fail


def test_lengths_other_than_one_are_refused_where_the_bundle_says_one(api: Api) -> None:
    answer = api.http.post("/embed?normalize=false", files=multipart([photo(1)]))
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_parameter")
    assert answer.json()["parameter"] == "normalize"


def test_a_model_of_raw_lengths_gives_them_when_asked(start: StartApi, tmp_path: Path) -> None:
    write_bundle(
        tmp_path / "raw",
        EmbeddingModel(
            make_backbone("resnet10t"),
            preprocessing=Preprocessing(resize_px=36, crop_px=32),
            pooling="mean",
            normalise=False,
        ),
        provenance={},
        card="# A network of random weights\n",
    )
    api = start(load_bundle(tmp_path / "raw"))

    def row(parameters: str) -> NDArray[np.float64]:
        answer = api.http.post(f"/embed{parameters}", files=multipart([photo(1)])).json()
        return np.array(answer["data"][0]["embedding"])

    raw = row("?normalize=false")
    np.testing.assert_allclose(raw, embeddings_of(api.bundle, [photo(1)])[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(row(""), raw / np.linalg.norm(raw), atol=SAME)
    assert abs(np.linalg.norm(raw) - 1) > 0.01  # otherwise both lines above would say the same


def test_a_caller_who_leaves_takes_the_work_along(start: StartApi) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder)
    embedder.open.clear()
    with pytest.raises(Exception, match="timed out"):
        api.http.post("/embed", files=multipart([photo(1)]), timeout=0.3)
    deadline_s = time.monotonic() + 10
    while 'dino_serve_cancelled_total{model="colours"} 1.0' not in api.http.get("/metrics").text:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    embedder.open.set()
    assert 'code="499",route="/embed"' in api.http.get("/metrics").text


def test_a_caller_may_set_a_deadline(start: StartApi) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder)
    embedder.open.clear()
    answer = api.http.post("/embed?timeout=0.2", files=multipart([photo(1)]))
    embedder.open.set()
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")


def test_a_full_service_says_when_to_come_back(start: StartApi) -> None:
    embedder = ColourEmbedder()
    api = start(embedder=embedder, max_concurrent_images=1, max_client_batch_size=1, cache_size=0)
    embedder.open.clear()
    first = threading.Thread(target=lambda: api.http.post("/embed", files=multipart([photo(1)])))
    first.start()
    deadline_s = time.monotonic() + 10
    while not api.engine.gauges()["inflight_images"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    answer = api.http.post("/embed", files=multipart([photo(2)]))
    embedder.open.set()
    first.join()
    assert (answer.status_code, answer.json()["code"]) == (429, "overloaded")
    assert int(answer.headers["Retry-After"]) >= 1
    assert int(answer.headers["Retry-After-Ms"]) == pytest.approx(answer.json()["retry_after"] * 1000, abs=1)


def test_a_failed_launch_costs_only_its_own_image(start: StartApi) -> None:
    embedder = ColourEmbedder()
    embedder.poison = (9, 9, 9)
    api = start(embedder=embedder)
    sent = multipart([picture((1, 2, 3)), picture((9, 9, 9))])
    data = api.http.post("/embed", files=sent).json()["data"]
    assert [item.get("error", {}).get("code") for item in data] == [None, "embedding_failed"]
    refused = api.http.post("/embed?on_error=fail", files=sent)
    assert (refused.status_code, refused.json()["code"]) == (500, "embedding_failed")
    assert "kernel" not in refused.text  # what the model raised is the log's


def test_another_models_fingerprint_is_refused(api: Api) -> None:
    good = api.http.post(
        "/embed",
        files=multipart([photo(1)]),
        headers={"X-Expect-Fingerprint": api.bundle.manifest.fingerprint},
    )
    assert good.status_code == 200
    answer = api.http.post(
        "/embed", files=multipart([photo(1)]), headers={"X-Expect-Fingerprint": "sha256:0"}
    )
    assert (answer.status_code, answer.json()["code"]) == (409, "fingerprint_mismatch")
    assert answer.json()["expected"] == "sha256:0"
    assert answer.json()["found"] == api.bundle.manifest.fingerprint
    assert answer.headers["X-Should-Retry"] == "false"
