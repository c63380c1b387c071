"""Going on from the weights of a bundle."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_core.bundle import load_bundle, read_manifest
from tests.training.conftest import MakeConfig, MakeFolder
from training.cli import main
from training.config import RunConfig
from training.errors import ConfigError
from training.loop import run
from training.rundir import RunPlan
from training.starting import described
from training.state import TrainState, new_state
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
    state = new_state(make_config(backbone={"weights": str(bundle)}), device=torch.device("cpu"))
    images = torch.randn(3, 3, 16, 16)
    theirs = load_bundle(bundle).model.backbone(images)
    state.student.eval()
    for network in (state.student, state.teacher):
        torch.testing.assert_close(network.backbone(images), theirs, rtol=0, atol=1e-6)


def test_another_network_is_refused(bundle: Path, make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"is a vit_tiny_patch16_224 and backbone.name is resnet10t"):
        new_state(
            make_config(backbone={"name": "resnet10t", "weights": str(bundle), "model_kwargs": {}}),
            device=torch.device("cpu"),
        )
    with pytest.raises(ConfigError, match="do not fit the network"):
        new_state(
            make_config(backbone={"weights": str(bundle), "model_kwargs": {"embed_dim": 16, "num_heads": 2}}),
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


def test_layers_that_would_hardly_learn_stand_still(make_config: MakeConfig) -> None:
    config = make_config(
        optimizer={"layer_decay": 0.5, "freeze_below": 0.3, "warmup_steps": 0, "freeze_last_layer_steps": 0}
    )
    state = new_state(config, device=torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in state.student.named_parameters()}
    train_step(state, [views()], config=config)
    moved = {
        name for name, tensor in state.student.named_parameters() if not torch.equal(tensor, before[name])
    }
    assert "backbone.network.blocks.0.attn.qkv.weight" in moved  # its factor is 0.5
    assert "backbone.network.patch_embed.proj.weight" not in moved  # and its 0.25
    assert "backbone.network.cls_token" not in moved


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
    assert origin == {"name": "first", "fingerprint": read_manifest(bundle).fingerprint}
    assert "(as the weights came)" in said
    card = (out / "README.md").read_text()
    assert f"| adapted from | `first` `{origin['fingerprint']}` |" in card
    assert "| the weights as they came | this teacher |" in card
    assert "untrained" not in card
    assert "learnt without labels" not in card

    bundle.rename(tmp_path / "moved away")
    for leftover in (out, run_dir / "result.json", run_dir / "checkpoints/step-00000004"):
        leftover.rename(tmp_path / f"old {leftover.name}")
    assert main(["run", "--resume", "--run-dir", str(run_dir)]) == 0
    assert read_manifest(out).fingerprint == adapted.fingerprint


CPU = torch.device("cpu")
RESNET = {"name": "test_resnet", "image_size_px": 32, "drop_path": 0.0, "model_kwargs": {}}


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.fixture
def source(make_config: MakeConfig) -> TrainState:
    """A network, with head, that differs from every freshly drawn one of the tests."""
    return new_state(make_config(seed=99), device=CPU)


def tensors_of(state: TrainState) -> dict[str, torch.Tensor]:
    """The teacher's, as a file takes them."""
    return {name: tensor.contiguous() for name, tensor in state.teacher.state_dict().items()}


@pytest.mark.parametrize("kind", ["official .pth", "ours .safetensors"])
def test_a_file_with_a_head_gives_both(
    kind: str, source: TrainState, make_config: MakeConfig, tmp_path: Path
) -> None:
    tensors = tensors_of(source)
    if kind == "official .pth":
        official = {
            "module." + name.replace("backbone.network.", "backbone."): tensor
            for name, tensor in tensors.items()
        }
        path = tmp_path / "dino.pth"
        torch.save({"teacher": official, "student": {}, "epoch": 3}, path)
    else:
        path = tmp_path / "dino.safetensors"
        save_file(tensors, path)
    state = new_state(make_config(backbone={"weights": str(path)}), device=CPU)
    assert same_tensors(state.student, source.teacher)
    assert same_tensors(state.teacher, source.teacher)
    head = described(str(path), model_kwargs={"num_heads": 2}).head
    assert head is not None
    ours = make_config().head
    assert (head.num_prototypes, head.hidden_dim, head.bottleneck_dim, head.num_layers, head.batch_norm) == (
        ours.num_prototypes,
        ours.hidden_dim,
        ours.bottleneck_dim,
        ours.num_layers,
        ours.batch_norm,
    )


def test_a_head_of_another_shape_stays_as_it_was_drawn(
    source: TrainState, make_config: MakeConfig, tmp_path: Path
) -> None:
    save_file(tensors_of(source), tmp_path / "dino.safetensors")
    weights = {"weights": str(tmp_path / "dino.safetensors")}
    state = new_state(make_config(head={"num_prototypes": 48}, backbone=weights), device=CPU)
    drawn = new_state(make_config(head={"num_prototypes": 48}), device=CPU)
    assert same_tensors(state.student.backbone, source.teacher.backbone)
    assert same_tensors(state.student.head, drawn.student.head)


def test_a_classifier_is_left_out_and_any_other_tensor_is_not(
    source: TrainState, make_config: MakeConfig, tmp_path: Path
) -> None:
    plain = {
        name.removeprefix("backbone.network."): tensor
        for name, tensor in tensors_of(source).items()
        if name.startswith("backbone.")
    }
    save_file(plain | {"head.weight": torch.zeros(10, 32)}, tmp_path / "timm.safetensors")
    state = new_state(make_config(backbone={"weights": str(tmp_path / "timm.safetensors")}), device=CPU)
    assert same_tensors(state.student.backbone, source.teacher.backbone)
    save_file(plain | {"neck.weight": torch.zeros(10, 32)}, tmp_path / "odd.safetensors")
    with pytest.raises(ConfigError, match="has neck.weight, which vit_tiny_patch16_224 has not"):
        new_state(make_config(backbone={"weights": str(tmp_path / "odd.safetensors")}), device=CPU)


class Runs:
    """Unpickling it would run something."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of a stranger has run",))


def test_code_in_a_file_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"teacher": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(ConfigError, match="holds more than tensors .*, which is never run"):
        described(str(tmp_path / "bad.pth"), name="resnet18")
    assert "has run" not in capsys.readouterr().out
    (tmp_path / "torn.safetensors").write_bytes(b"12345")
    with pytest.raises(ConfigError, match="cannot be read as tensors"):
        described(str(tmp_path / "torn.safetensors"), name="resnet18")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="holds no tensors by name"):
        described(str(tmp_path / "list.pt"), name="resnet18")


def test_what_is_not_there_is_refused_with_what_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match="is not there: give a bundle"):
        described("models/nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="give --backbone.name with timm's name of the network"):
        described(str(tmp_path / "a.safetensors"))
    start = described("timm:vit_small_patch14_dinov2.lvd142m")
    assert (start.backbone.name, start.cell_px) == ("vit_small_patch14_dinov2", 14)
    assert start.backbone.position_interpolation == "antialias"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot be had"):
        new_state(
            make_config(backbone={**RESNET, "name": "resnet10t", "weights": "timm:resnet10t.c3_in1k"}),
            device=CPU,
        )


def test_a_run_goes_on_from_the_head_of_another(
    bundle: Path, make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run_dir = tmp_path / "models/third", tmp_path / "runs/third"
    words = ["run", "--data", str(make_folder("more")), "--out", str(out), "--run-dir", str(run_dir)]
    words += ["--backbone.weights", str(tmp_path / "runs/first"), "--steps", "2", "--batch-size", "4"]
    words += ["--device", "cpu", "--crops.local-px", "8", "--crops.blur-sigma-px", "0.1,0.5"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "head.num_prototypes = 32: those of" in said
    assert "optimizer.head_warmup_steps = 0: the head comes with the weights" in said
    config = RunConfig.model_validate(read_manifest(out).provenance["config"])
    start = described(str(tmp_path / "runs/first"))
    assert config.backbone.weights_fingerprint == start.fingerprint
    begun = new_state(config, device=CPU)
    assert same_tensors(begun.teacher.backbone, load_bundle(bundle).model.backbone)


def test_other_weights_under_the_same_name_are_refused(bundle: Path, make_config: MakeConfig) -> None:
    weights = {"weights": str(bundle), "weights_fingerprint": "sha256:of something else"}
    with pytest.raises(ConfigError, match="has changed since the run was made"):
        new_state(make_config(backbone=weights), device=CPU)


@pytest.mark.parametrize("statistics", ["frozen", "batch"])
def test_frozen_statistics_stay_and_everything_else_learns(make_config: MakeConfig, statistics: str) -> None:
    config = make_config(
        backbone={**RESNET, "norm_statistics": statistics},
        head={"batch_norm": True},
        optimizer={"warmup_steps": 0, "freeze_last_layer_steps": 0},
    )
    state = new_state(config, device=CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in state.student.modules():
            if isinstance(module, _BatchNorm) and module.running_var is not None:
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    before = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
    views = [torch.randn(4, 3, side, side, generator=generator) for side in (32, 32, 16, 16)]
    for _ in range(2):
        assert train_step(state, [views], config=config).is_finite
    after = state.student.state_dict()
    for name, tensor in after.items():
        is_statistic = "running" in name or "num_batches" in name
        stays = (
            is_statistic and name.startswith("backbone.") and statistics == "frozen"
        ) or "weight_g" in name
        assert torch.equal(tensor, before[name]) == stays, name
    teacher = state.teacher.backbone.state_dict()
    for name, tensor in state.student.backbone.state_dict().items():
        if "running" in name:
            assert torch.equal(tensor, teacher[name])


def test_targets_are_made_by_the_frozen_statistics(make_config: MakeConfig) -> None:
    """A batch of images that are all alike: normalised by themselves they would say nothing."""
    measured = {}
    for statistics in ("frozen", "batch"):
        config = make_config(
            backbone={**RESNET, "norm_statistics": statistics}, loss={"teacher_temperature": 0.02}
        )
        state = new_state(config, device=CPU)
        one = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).expand(4, -1, -1, -1)
        expected = state.teacher(one[None])
        train_step(state, [[one, one]], config=config)
        moved = state.center_K / (1 - config.loss.center_momentum)
        measured[statistics] = float((moved - expected[0, 0]).abs().max())
    assert measured["frozen"] < 1e-4 < measured["batch"]


def test_the_waiting_backbone_does_not_shorten_the_gradients_of_the_head(make_config: MakeConfig) -> None:
    """Clipped together, a large gradient of the frozen network would hold the head back."""
    norms = []
    for warmup_steps in (0, 1):
        config = make_config(optimizer={"head_warmup_steps": warmup_steps, "clip": "global"})
        state = new_state(config, device=CPU)
        norms.append(train_step(state, [views()], config=config).gradient_norm)
        of_head = [p.grad.norm() for p in state.student.head.parameters() if p.grad is not None]
        of_all = [p.grad.norm() for p in state.student.parameters() if p.grad is not None]
        assert (len(of_head) == len(of_all)) == bool(warmup_steps)
    assert norms[1] < norms[0]


def test_both_heads_of_an_official_checkpoint_go_on(
    source: TrainState, make_config: MakeConfig, tmp_path: Path
) -> None:
    """Through an import too, whose bundle has them beside it."""
    other = new_state(make_config(seed=98), device=CPU).student
    official = {
        part: {
            prefix + name.replace("backbone.network.", "backbone."): tensor
            for name, tensor in network.state_dict().items()
        }
        for part, prefix, network in (("teacher", "", source.teacher), ("student", "module.", other))
    }
    torch.save(official, tmp_path / "full.pth")
    bundle = tmp_path / "models/full"
    assert main(["import", str(tmp_path / "full.pth"), "--heads", "2", "--out", str(bundle)]) == 0
    for weights in (tmp_path / "full.pth", bundle):
        named = {"weights": str(weights), "name": "vit_small_patch8_224"}
        state = new_state(make_config(backbone=named), device=CPU)
        assert same_tensors(state.student.backbone, source.teacher.backbone)
        assert same_tensors(state.teacher, source.teacher)
        assert same_tensors(state.student.head, other.head)
        narrow = make_config(backbone=named, head={"num_prototypes": 48})
        state = new_state(narrow, device=CPU)
        assert same_tensors(state.student.head, state.teacher.head)


def test_adapt_goes_on_from_an_imported_bundle_with_its_head(
    source: TrainState, make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"teacher": tensors_of(source)}, tmp_path / "full.pth")
    bundle, out = tmp_path / "models/full", tmp_path / "models/adapted"
    assert main(["import", str(tmp_path / "full.pth"), "--heads", "2", "--out", str(bundle)]) == 0
    words = ["run", "--data", str(make_folder()), "--out", str(out), "--run-dir", str(tmp_path / "runs/a")]
    words += ["--backbone.weights", str(bundle), "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    words += ["--crops.local-px", "8", "--crops.blur-sigma-px", "0.1,0.5"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert f"head.num_prototypes = 32: those of {bundle}, whose head goes on" in said
    assert "optimizer.head_warmup_steps = 0: the head comes with the weights" in said
    assert read_manifest(out).provenance["adapted_from"]["name"] == "full"
