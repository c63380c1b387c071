"""The authors' own checkpoints through the command line: the bundle has the features of the source."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.eva import checkpoint_filter_fn as eva_names
from timm.models.vision_transformer import checkpoint_filter_fn as vit_names
from torch import Tensor
from torchvision.models import resnet50

from dino_core.bundle import load_bundle
from tests.training.importing.official import drawn_head, full_checkpoint, golden, relative_error
from training.cli import main
from training.importing.headfile import head_file, heads_beside
from training.importing.sources import foreign_model
from training.importing.writing import imported_model, report


@pytest.mark.parametrize("kind", ["backbone only", "full", "safetensors"])
def test_the_official_vit_keeps_its_features_sizes_and_attention(kind: str, tmp_path: Path) -> None:
    state = golden("vit.state.")
    source = tmp_path / f"dino.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(state, source)
    else:
        heads = {"teacher": drawn_head(48), "student": drawn_head(48, seed=1)}
        other = {name: tensor + 1 for name, tensor in state.items()}
        torch.save(full_checkpoint(state, heads, student=other) if kind == "full" else state, source)
    assert main(["import", str(source), "--out", str(tmp_path / "tiny"), "--heads", "3"]) == 0
    bundle = load_bundle(tmp_path / "tiny")
    backbone, case = bundle.model.backbone, golden("vit.")
    with torch.no_grad():
        features = backbone.features(case["in"])
        assert features.cls_BD is not None
        tokens = torch.cat([features.cls_BD[:, None], features.patches_BND], dim=1)
        assert relative_error(tokens, case["tokens_last"]) <= 1e-5
        assert relative_error(backbone(case["in"]), case["cls"]) <= 1e-5
        assert relative_error(backbone.attention(case["in"]), case["attention"]) <= 1e-5
        other_sizes = [name.removeprefix("cls") for name in case if name.startswith("cls") and name != "cls"]
        assert other_sizes
        for size in other_sizes:
            assert relative_error(backbone(case[f"in{size}"]), case[f"cls{size}"]) <= 1e-5
    heads_found = heads_beside(tmp_path / "tiny", fingerprint=bundle.manifest.fingerprint)
    assert bool(heads_found.teacher) == bool(heads_found.student) == (kind == "full")
    assert head_file(tmp_path / "tiny").exists() == (kind == "full")
    assert bundle.manifest.provenance["source"]["name"] == source.name


def test_the_official_resnet_keeps_its_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = resnet50().eval()
    state = dict(net.state_dict())
    net.fc = torch.nn.Identity()
    heads = {"teacher": drawn_head(2048), "student": drawn_head(2048, seed=1)}
    without = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    torch.save(full_checkpoint(without, heads), tmp_path / "full.pth")
    # torchvision's own file has the classifier, and in old ones the counters are missing.
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "classifier.pth")
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        expected = net(images)
    assert main(["import", str(tmp_path / "full.pth"), "--out", str(tmp_path / "full")]) == 0
    bundle = load_bundle(tmp_path / "full")
    assert (bundle.manifest.architecture, bundle.manifest.pooling) == ("resnet50", "mean")
    classifier = foreign_model(str(tmp_path / "classifier.pth"))
    for backbone in (bundle.model.backbone, imported_model(classifier).backbone):
        with torch.no_grad():
            assert relative_error(backbone(images), expected) <= 1e-5
    said = capsys.readouterr().out
    assert "a head of 40 prototypes came along, teacher's and student's" in said
    assert "if these are the DINO weights that Meta published: Apache-2.0" in said
    said = "\n".join(report(classifier))
    assert "left out: fc.bias, fc.weight: a classifier's" in said
    assert "counters of batches were not saved" in said
    assert "licence: unknown" in said


def drawn(name: str, **arguments: Any) -> Any:  # noqa: ANN401  any network of timm's
    """A small network of timm's with random values in every tensor."""
    torch.manual_seed(3)
    net = timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.3))
    return net.eval()


SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}


def official_dinov2(net: torch.nn.Module, *, chunked: bool = False) -> dict[str, Tensor]:
    """The state that the authors' code has for the network."""
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if "reg_token" in state:
        state["register_tokens"] = state.pop("reg_token")
        of_class = torch.full((1, 1, 64), 0.2)
        state["pos_embed"] = torch.cat([of_class, state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - of_class
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
    result: dict[str, Tensor] = {"mask_token": torch.zeros(1, 64)}
    for name, tensor in state.items():
        official = name
        if gated:
            official = official.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if chunked and official.startswith("blocks."):
            number = official.split(".")[1]
            official = official.replace("blocks.", f"blocks.{number}.", 1)
        result[official] = tensor
    return result


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "in chunks"])
@pytest.mark.parametrize(
    "name",
    ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"],
)
def test_dinov2_keeps_its_features(name: str, chunked: bool, tmp_path: Path) -> None:
    # With timm's ratio this width would be odd, and a SwiGLU has two halves.
    net = drawn(name, img_size=56, **SMALL, **({"mlp_ratio": 5.5} if "giant" in name else {}))
    official = official_dinov2(net, chunked=chunked)
    head = {f"dino_head.{name}": tensor for name, tensor in drawn_head(64).items()}
    ibot = {f"ibot_head.{name}": tensor for name, tensor in drawn_head(64).items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in official.items()} | head | ibot
    torch.save({"teacher": teacher}, tmp_path / "teacher.pth")
    model = foreign_model(str(tmp_path / "teacher.pth"), heads=2)
    assert model.heads.teacher.keys() == drawn_head(64).keys()
    assert "mask_token" in model.ignored
    assert all(name in model.ignored for name in ibot)
    assert main(["import", str(tmp_path / "teacher.pth"), "--out", str(tmp_path / "v2"), "--heads", "2"]) == 0
    bundle = load_bundle(tmp_path / "v2")
    assert bundle.manifest.architecture == name
    assert bundle.manifest.position_interpolation == ("antialias" if "reg4" in name else "official")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert relative_error(bundle.model.backbone(images), net(images)) <= 1e-5
    if not chunked:  # timm's own reading of the authors' names, as a second opinion
        theirs = vit_names(dict(official), net)
        assert theirs.keys() == model.network.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(model.network[key], tensor)


def official_dinov3(net: torch.nn.Module) -> dict[str, Tensor]:
    """The state that the authors' code has for the network."""
    result: dict[str, Tensor] = {
        "mask_token": torch.zeros(1, 64),
        "rope_embed.periods": (100.0 ** (torch.arange(8) / 8)).bfloat16(),
    }
    state = dict(net.state_dict())
    gated = "blocks.0.mlp.fc1_g.weight" in state
    for name, tensor in state.items():
        official = name.replace("reg_token", "storage_tokens")
        for number in ("1", "2"):
            official = official.replace(f"gamma_{number}", f"ls{number}.gamma")
        if gated:
            official = official.replace("fc1_g", "w1").replace("fc1_x", "w2").replace("fc2", "w3")
        if official.endswith("q_bias"):
            values = state[name.replace("q_bias", "v_bias")]
            attention = official.removesuffix("q_bias")
            # Whatever stands in the keys' third, the mask takes it away.
            result[f"{attention}qkv.bias"] = torch.cat([tensor, torch.ones_like(tensor), values])
            result[f"{attention}qkv.bias_mask"] = torch.cat(
                [torch.ones_like(tensor), torch.zeros_like(tensor), torch.ones_like(tensor)]
            )
        elif not official.endswith("v_bias"):
            result[official] = tensor
    return result


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3_qkvb"],
)
def test_dinov3_keeps_its_features_at_any_size(name: str, tmp_path: Path) -> None:
    net = drawn(name, global_pool="token", **SMALL)
    official = official_dinov3(net)
    torch.save(official, tmp_path / "dinov3.pth")
    assert main(["import", str(tmp_path / "dinov3.pth"), "--out", str(tmp_path / "v3"), "--heads", "2"]) == 0
    bundle = load_bundle(tmp_path / "v3")
    assert (bundle.manifest.architecture, bundle.manifest.pooling) == (name, "cls")
    with torch.no_grad():
        for height_px, width_px in ((224, 224), (64, 96)):
            images = torch.randn(1, 3, height_px, width_px)
            assert relative_error(bundle.model.backbone(images), net(images)) <= 1e-5
    theirs = eva_names(dict(official), net)
    ours = bundle.model.backbone.network.state_dict()
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor)


def test_biases_of_nought_need_no_network_with_biases(tmp_path: Path) -> None:
    official = official_dinov3(drawn("vit_small_patch16_dinov3", global_pool="token", **SMALL))
    nought = {f"blocks.{i}.attn.qkv.bias": torch.zeros(192) for i in range(2)}
    torch.save(official | nought, tmp_path / "nought.pth")
    model = foreign_model(str(tmp_path / "nought.pth"), heads=2)
    assert model.architecture.name == "vit_small_patch16_dinov3"
    assert model.ignored["blocks.0.attn.qkv.bias"].startswith("nought")
    nought["blocks.0.attn.qkv.bias"][64:128] = 1  # a bias of the keys that no mask takes away
    torch.save(official | nought, tmp_path / "keys.pth")
    with pytest.raises(Exception, match="has a bias of the keys, and DINOv3 has none"):
        foreign_model(str(tmp_path / "keys.pth"), heads=2)
    torch.save(official | {"rope_embed.periods": torch.arange(8.0)}, tmp_path / "periods.pth")
    with pytest.raises(Exception, match="timm has no network that rotates so"):
        foreign_model(str(tmp_path / "periods.pth"), heads=2)


@pytest.mark.parametrize(
    ("name", "recognised"),
    [
        ("vit_small_patch16_224", "vit_small_patch16_224"),
        ("vit_base_patch8_224", "vit_base_patch8_224"),
        ("vit_base_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2"),
        ("vit_base_patch16_dinov3_qkvb", "vit_base_patch16_dinov3_qkvb"),
        ("resnet18", "resnet18"),
        ("resnext50_32x4d", "resnext50_32x4d"),
    ],
)
def test_published_networks_are_recognised_by_their_tensors(
    name: str, recognised: str, tmp_path: Path
) -> None:
    torch.save(timm.create_model(name, num_classes=7).state_dict(), tmp_path / "net.pth")
    model = foreign_model(str(tmp_path / "net.pth"))
    assert model.architecture.name == recognised
    assert model.architecture.model_kwargs in ({}, {"global_pool": "token"})
    assert len(model.ignored) == 2  # the classifier
