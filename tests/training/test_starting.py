"""Going on from the weights of a bundle."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from dino_core.bundle import load_bundle, read_manifest
from tests.training.conftest import MakeConfig, MakeFolder
from training.cli import main
from training.errors import ConfigError
from training.loop import run
from training.rundir import RunPlan
from training.state import new_state
from training.step import train_step, values_at


@pytest.fixture
def bundle(make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path) -> Path:
    """What a tiny run ends with."""
    plan = RunPlan(
        data=make_folder(), val_data=None, out=tmp_path / "models/first", config=make_config(seed=7)
    )
    out = run(plan, tmp_path / "runs/first", resume=False, console=Console(quiet=True))
    assert out is not None
    return out


def views() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, side, side, generator=generator) for side in (16, 16, 8, 8)]


def test_a_network_begins_with_the_weights_of_a_bundle(bundle: Path, make_config: MakeConfig) -> None:
    state = new_state(make_config(backbone={"weights": bundle}), device=torch.device("cpu"))
    images = torch.randn(3, 3, 16, 16)
    theirs = load_bundle(bundle).model.backbone(images)
    state.student.eval()
    for network in (state.student, state.teacher):
        torch.testing.assert_close(network.backbone(images), theirs, rtol=0, atol=1e-6)


def test_another_network_is_refused(bundle: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"is a vit_tiny_patch16_224 and backbone.name is resnet10t"):
        new_state(
            make_config(backbone={"name": "resnet10t", "weights": bundle, "model_kwargs": {}}),
            device=torch.device("cpu"),
        )
    with pytest.raises(ConfigError, match="do not fit the network"):
        new_state(
            make_config(backbone={"weights": bundle, "model_kwargs": {"embed_dim": 16, "num_heads": 2}}),
            device=torch.device("cpu"),
        )


def test_the_backbone_stands_still_while_the_head_warms_up(make_config: MakeConfig) -> None:
    config = make_config(optimizer={"head_warmup_steps": 3, "freeze_last_layer_steps": 0, "warmup_steps": 0})
    state = new_state(config, device=torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in state.student.named_parameters()}
    for _ in range(3):
        train_step(state, [views()], config=config)
    for name, tensor in state.student.named_parameters():
        moved = not torch.equal(tensor, before[name])
        assert moved == (name.startswith("head.") and tensor.requires_grad), name
    train_step(state, [views()], config=config)
    after = dict(state.student.named_parameters())
    assert not torch.equal(after["backbone.network.cls_token"], before["backbone.network.cls_token"])


def test_the_nearer_a_layer_is_to_the_pixels_the_less_it_learns(make_config: MakeConfig) -> None:
    config = make_config(optimizer={"layer_decay": 0.5})
    state = new_state(config, device=torch.device("cpu"))
    state.set_rates(learning_rate=1.0, weight_decay=0.3)
    names = {parameter: name for name, parameter in state.student.named_parameters()}
    groups = {
        names[parameter]: group for group in state.optimizer.param_groups for parameter in group["params"]
    }
    rates = [
        groups[f"backbone.network.{name}"]["lr"]
        for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight")
    ]
    assert rates == [0.25, 0.5, 1.0]  # the norm behind the blocks belongs to the last of them
    assert groups["backbone.network.norm.weight"]["lr"] == groups["head.mlp.0.weight"]["lr"] == 1.0
    assert groups["backbone.network.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.3
    assert groups["backbone.network.blocks.0.attn.qkv.bias"]["weight_decay"] == 0.0


def test_values_say_when_the_backbone_thaws(make_config: MakeConfig) -> None:
    config = make_config(optimizer={"head_warmup_steps": 2})
    assert [values_at(step, config).backbone_frozen for step in range(4)] == [True, True, False, False]


def test_adapt_goes_on_from_a_bundle_and_resumes_without_it(
    bundle: Path, make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run_dir = tmp_path / "models/second", tmp_path / "runs/second"
    words = ["run", "--data", str(make_folder("more")), "--out", str(out), "--run-dir", str(run_dir)]
    words += ["--backbone.weights", str(bundle), "--steps", "4", "--batch-size", "4", "--device", "cpu"]
    words += ["--crops.local-px", "8", "--crops.blur-sigma-px", "0.1,0.5", "--checkpoints.every-steps", "2"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "backbone.name = vit_tiny_patch16_224 at 16 px: that of" in said
    assert "optimizer.layer_decay = 0.75: " in said
    adapted = read_manifest(out)
    origin = adapted.provenance["adapted_from"]
    assert origin == {"bundle": "first", "fingerprint": read_manifest(bundle).fingerprint}

    bundle.rename(tmp_path / "moved away")
    for leftover in (out, run_dir / "result.json", run_dir / "checkpoints/step-00000004"):
        leftover.rename(tmp_path / f"old {leftover.name}")
    assert main(["run", "--resume", "--run-dir", str(run_dir)]) == 0
    assert read_manifest(out).fingerprint == adapted.fingerprint
