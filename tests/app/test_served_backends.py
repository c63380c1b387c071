"""A real service with each backend: the same embeddings, and everybody who asks learns what computes them."""

import base64
import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dino_core.bundle import load_bundle
from dino_core.preprocess import load_pixels
from tests.app.running import ROOT, picture, running_service, write_tiny_bundle

# Of unit vectors, over HTTP and through another library: float32 in another order of sums.
ATOL = 1e-3


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def answer(url: str, body: object = None) -> str:
    request = urllib.request.Request(url, headers={"Content-Type": "application/json"})
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = response.read().decode()
    return text


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino", "auto"])
def test_a_service_answers_with_the_models_embeddings_and_says_what_computes_them(
    backend: str, bundle_dir: Path, tmp_path: Path
) -> None:
    packages = {"torch": [], "openvino": ["onnx", "onnxscript", "openvino"]}.get(
        backend, ["onnx", "onnxscript", "onnxruntime"]
    )
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    files = [picture(seed) for seed in range(11)]
    bundle = load_bundle(bundle_dir)
    with torch.inference_mode():
        pixels_BCHW = torch.stack([load_pixels(file, bundle.manifest.preprocessing) for file in files])
        expected_BD = bundle.model(pixels_BCHW).numpy()
    with running_service(bundle_dir, tmp_path / "data", "--backend", backend) as service:
        sent = {"images": [base64.b64encode(file).decode() for file in files]}
        embedded: dict[str, Any] = json.loads(answer(f"{service.url}/embed", sent))
        info: dict[str, Any] = json.loads(answer(f"{service.url}/info"))
        metrics = answer(f"{service.url}/metrics")
    rows_BD = np.array([item["embedding"] for item in embedded["data"]])
    np.testing.assert_allclose(rows_BD, expected_BD, atol=ATOL)
    used = info["model"]["backend"]
    assert used == backend or (backend == "auto" and used in {"torch", "onnxruntime", "openvino"})
    assert info["versions"][used]
    (line,) = [line for line in metrics.splitlines() if line.startswith("dino_serve_model_info{")]
    assert f'backend="{used}"' in line
    if backend == "auto":
        assert any(f"{used} computes the model" in line for line in service.log)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        pytest.param(["--backend", "tensorrt"], "backend: ", id="no such backend"),
        pytest.param(["--backend", "ONNXRuntime"], "'onnxruntime'", id="in capitals"),
    ],
)
def test_a_backend_that_there_is_not_is_refused_with_those_that_there_are(
    flags: list[str], sentence: str, bundle_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "app", "run", "--model", str(bundle_dir), "--data-dir", str(tmp_path)]
    ended = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert all(name in ended.stderr for name in ("auto", "torch", "onnxruntime", "openvino"))
