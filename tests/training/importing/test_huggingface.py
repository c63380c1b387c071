"""Models of transformers, made from small configurations with random values: ours say what theirs say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dino_core.bundle import load_bundle
from tests.training.importing.official import relative_error
from training.cli import main
from training.errors import ConfigError
from training.importing.sources import foreign_model
from training.importing.writing import imported_model

transformers = pytest.importorskip("transformers", reason="transformers is in the extra dev")

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout_prob": 0.0}
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", {**SMALL, "intermediate_size": 128, "image_size": 64, "layer_norm_eps": 1e-6}),
    "dinov2": ("Dinov2", {**SMALL, "image_size": 56, "patch_size": 14}),
    "dinov2 swiglu": ("Dinov2", {**SMALL, "image_size": 56, "patch_size": 14, "use_swiglu_ffn": True}),
    "dinov2 registers": ("Dinov2WithRegisters", {**SMALL, "image_size": 56, "patch_size": 14}),
    "dinov3": ("DINOv3ViT", {**SMALL, "intermediate_size": 128, "num_register_tokens": 4}),
    "dinov3 gated": (
        "DINOv3ViT",
        {
            **SMALL,
            "intermediate_size": 128,
            "num_register_tokens": 4,
            "use_gated_mlp": True,
            "hidden_act": "silu",
        },
    ),
}
PROCESSOR = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "size": {"shortest_edge": 80},
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "resample": 3,
}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def saved(kind: str, directory: Path, **changes: Any) -> Any:  # noqa: ANN401  a model of transformers
    """A model with random values everywhere, saved as transformers saves it."""
    name, settings = VITS[kind]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("kind", VITS)
def test_vits_keep_their_features_at_the_native_size_and_at_others(kind: str, tmp_path: Path) -> None:
    theirs = saved(kind, tmp_path / "theirs")
    foreign = foreign_model(str(tmp_path / "theirs"))
    assert "mask_token" in foreign.ignored or kind == "vit"
    ours = imported_model(foreign).backbone
    patch = theirs.config.patch_size
    native = theirs.config.image_size
    for height_px, width_px in ((native, native), (3 * patch, 5 * patch), (6 * patch, 6 * patch)):
        images = torch.randn(2, 3, height_px, width_px)
        more = {"interpolate_pos_encoding": True} if kind == "vit" else {}
        with torch.no_grad():
            expected = theirs(images, **more).last_hidden_state
            features, embeddings = ours.features(images), ours(images)
        assert features.cls_BD is not None
        prefix = expected.shape[1] - features.patches_BND.shape[1]
        assert relative_error(features.cls_BD, expected[:, 0]) <= 1e-5
        assert relative_error(features.patches_BND, expected[:, prefix:]) <= 1e-5
        assert relative_error(embeddings, expected[:, 0]) <= 1e-5


@pytest.mark.parametrize(
    ("layer_type", "sizes"),
    [("bottleneck", [256, 512, 1024, 2048]), ("basic", [64, 128, 256, 512])],
)
def test_resnets_keep_their_features(layer_type: str, sizes: list[int], tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=sizes, depths=[1, 2, 1, 1], layer_type=layer_type
    )
    theirs = transformers.ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    theirs.save_pretrained(tmp_path / "theirs")
    foreign = foreign_model(str(tmp_path / "theirs"))
    assert foreign.architecture.model_kwargs == {"layers": [1, 2, 1, 1]}
    assert [name for name in foreign.ignored if name.startswith("classifier.")]
    ours = imported_model(foreign).backbone
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        expected = theirs.resnet(images).pooler_output.flatten(1)
        mine = ours(images)
    assert relative_error(mine, expected) <= 1e-5


def test_the_bundle_sees_what_the_processor_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved("vit", tmp_path / "theirs")
    (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / "theirs/README.md").write_text("---\nlicense: mit\ntags:\n- vision\n---\n# A model\n")
    assert main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "vit")]) == 0
    bundle = load_bundle(tmp_path / "vit")
    found = bundle.manifest.preprocessing
    assert (found.resize_px, found.crop_px) == (80, 64)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert bundle.manifest.position_interpolation == "bicubic"
    said = capsys.readouterr().out
    assert "licence: mit, as its README.md says" in said
    assert "left out: pooler.dense.bias, pooler.dense.weight" in said
    assert "Of the weights: mit" in (tmp_path / "vit/README.md").read_text()
    for changes, words in (
        ({"resample": 2, "do_center_crop": False, "size": {"height": 64, "width": 64}}, "squeezes pictures"),
        ({"resample": 2}, "resizes by bilinear"),
    ):
        (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
        assert any(words in note for note in foreign_model(str(tmp_path / "theirs")).notes)


def test_what_would_compute_something_else_is_refused(tmp_path: Path) -> None:
    saved("dinov2", tmp_path / "theirs")
    file = tmp_path / "theirs/config.json"
    config = json.loads(file.read_text())
    for changes, sentence in (
        ({"hidden_act": "relu"}, "has hidden_act 'relu' in its config.json"),
        ({"layer_norm_eps": 1e-3}, "adds 0.001 in its layer norms"),
        ({"model_type": "swin"}, "is a model of the type 'swin'"),
    ):
        file.write_text(json.dumps(config | changes))
        with pytest.raises(ConfigError, match=sentence):
            foreign_model(str(tmp_path / "theirs"))
    file.write_text(json.dumps(config | {"layer_norm_eps": 1e-12}))
    assert any("adds 1e-12" in note for note in foreign_model(str(tmp_path / "theirs")).notes)


def test_weights_in_parts_are_read_as_one(tmp_path: Path) -> None:
    model = saved("dinov2", tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    whole, parts = foreign_model(str(tmp_path / "whole")), foreign_model(str(tmp_path / "parts"))
    assert all(torch.equal(tensor, parts.network[name]) for name, tensor in whole.network.items())
    (tmp_path / "parts/model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside"}}')
    with pytest.raises(ConfigError, match="does not name the parts of the weights"):
        foreign_model(str(tmp_path / "parts"))
