"""Models of ours, opened by transformers: it says what ours say; and what it has no equal of is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dino_core.backbones import make_backbone
from dino_core.bundle import write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.errors import ConversionError
from dino_core.preprocess import Preprocessing, normalise, resize_and_crop
from dino_core.reference import reference_pictures
from dino_core.vit import PositionInterpolation
from training.cli import main
from training.exporting.huggingface import write_transformers
from training.importing.sources import foreign_model

transformers = pytest.importorskip("transformers", reason="transformers is in the extra dev")
SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def model_of(
    name: str,
    *,
    crop_px: int = 56,
    built_px: int | None = None,
    positions: PositionInterpolation = "official",
    **arguments: Any,  # noqa: ANN401  timm's
) -> EmbeddingModel:
    """A small network with random values in every tensor."""
    torch.manual_seed(3)
    backbone = make_backbone(
        name,
        image_size_px=built_px or crop_px,
        position_interpolation=positions,
        model_kwargs=arguments,
    )
    with torch.no_grad():
        for parameter in backbone.parameters():
            if "resnet" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    preprocessing = Preprocessing(resize_px=64, crop_px=crop_px)
    return EmbeddingModel(backbone, preprocessing=preprocessing, pooling=backbone.default_pooling)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_small_patch8_224", SMALL),
        ("vit_small_patch8_224", {**SMALL, "built_px": 32}),
        ("vit_small_patch14_dinov2", {**SMALL, "built_px": 84, "positions": "antialias"}),
        ("vit_small_patch14_dinov2", {**SMALL, "built_px": 84, "positions": "bicubic"}),
        ("vit_small_patch14_reg4_dinov2", SMALL),
        ("vit_giant_patch14_dinov2", {**SMALL, "mlp_ratio": 5.5}),
        ("vit_small_patch16_dinov3_qkvb", {**SMALL, "global_pool": "token", "crop_px": 64}),
        ("vit_small_plus_patch16_dinov3", {**SMALL, "global_pool": "token", "crop_px": 64}),
        ("resnet18", {"crop_px": 64}),
    ],
    ids=str,
)
def test_transformers_says_what_ours_says_and_gives_it_back(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of(name, **arguments)
    cosine, difference = write_transformers(model, tmp_path / "theirs", name="theirs")
    assert cosine > 0.999999
    assert difference <= 1e-4
    back = foreign_model(str(tmp_path / "theirs"))
    assert (back.preprocessing.resize_px, back.preprocessing.crop_px) == (64, model.preprocessing.crop_px)
    assert "built_px" in arguments or all(
        torch.allclose(tensor, back.network[key])
        for key, tensor in model.backbone.network.state_dict().items()
    )


def test_the_card_and_the_processor_lead_to_our_embedding(tmp_path: Path) -> None:
    model = model_of("vit_small_patch8_224", **SMALL)
    write_transformers(model, tmp_path / "theirs", name=str(tmp_path / "theirs"))
    picture = reference_pictures()[0]
    image = Image.fromarray(picture.movedim(0, 2).contiguous().numpy())
    code = (tmp_path / "theirs/README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {"image": image}
    exec(code, found)
    pixels = resize_and_crop(picture, model.preprocessing)[None].contiguous()
    ours = normalise(pixels, mean=model.preprocessing.mean, std=model.preprocessing.std)
    theirs = found["processor"](images=image, return_tensors="pt")["pixel_values"]
    assert float((ours - theirs).abs().max()) <= 2 / 255 / 0.22  # two grey levels
    assert float(torch.cosine_similarity(found["embedding"], model(pixels)).detach()) > 0.999


def test_what_transformers_has_no_equal_of_is_refused(tmp_path: Path) -> None:
    for name in ("convnext_atto", "resnet26d", "seresnet50", "resnext50_32x4d"):
        with pytest.raises(ConversionError, match="transformers"):
            write_transformers(model_of(name, crop_px=64), tmp_path / "theirs", name="theirs")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_exported_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "models/tiny"
    write_bundle(bundle, model_of("vit_small_patch8_224", **SMALL), provenance={}, card="# tiny\n")
    words = ["export", str(bundle)]
    hf, onnx = ["--hf", str(tmp_path / "hf")], ["--onnx", str(tmp_path / "tiny.onnx")]
    assert main([*words, *hf, *onnx]) == 0
    said = capsys.readouterr().out
    assert "for transformers; cosine with ours at least 1.0000000" in said
    assert "ONNX Runtime computes our embeddings from it" in said
    assert {path.name for path in tmp_path.iterdir()} == {"models", "hf", "tiny.onnx"}
    for more, sentence in (
        (hf, "hf is there already: give --hf another name"),
        (onnx, "tiny.onnx is there already: give --onnx another name"),
        ([], "export to what? Give --out models/NAME, --hf DIR or --onnx FILE"),
        (["--out", str(tmp_path / "models/other")], "is a bundle already: give --hf DIR or --onnx FILE"),
    ):
        assert main([*words, *more]) == 2
        assert sentence in capsys.readouterr().err
