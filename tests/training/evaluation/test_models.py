"""What can be measured: bundles, runs, checkpoints, timm's networks."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from dino_core.bundle import load_bundle
from dino_core.errors import BackboneError
from tests.training.conftest import MakeConfig, MakeFolder
from training.checkpoint import checkpoints_in
from training.errors import CheckpointError, ConfigError
from training.evaluation.models import model_named
from training.loop import run
from training.rundir import RunPlan

CPU = torch.device("cpu")


def test_a_run_its_checkpoint_and_its_bundle_are_one_model(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    plan = RunPlan(data=make_folder(), val_data=None, out=tmp_path / "models/tiny", config=make_config())
    assert run(plan, tmp_path / "runs/tiny", resume=False, console=Console(quiet=True)) == plan.out
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = load_bundle(plan.out).model(pixels)
    newest = checkpoints_in(tmp_path / "runs/tiny/checkpoints")[0]
    for what, name in (
        (plan.out, "tiny"),
        (tmp_path / "runs/tiny", "tiny at step 6"),
        (newest, "tiny at step 6"),
    ):
        named = model_named(str(what), device=CPU)
        assert named.name == name
        torch.testing.assert_close(named.model(pixels), expected, rtol=0, atol=1e-6)


def test_timms_network_has_random_weights_by_a_seed() -> None:
    pixels = torch.randint(0, 256, (1, 3, 160, 160), dtype=torch.uint8)
    first, again, other = (
        model_named("timm:test_resnet", device=CPU, untrained=True, seed=seed).model(pixels)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize(
    ("what", "untrained", "sentence"),
    [
        ("models/nowhere", False, "is not there: give a bundle"),
        ("models/nowhere", True, "--untrained goes with timm:NAME"),
    ],
)
def test_what_is_not_there_is_refused(what: str, untrained: bool, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        model_named(what, device=CPU, untrained=untrained)


def test_a_misspelt_network_is_named() -> None:
    with pytest.raises(BackboneError, match="did you mean .*resnet50"):
        model_named("timm:resnet5O", device=CPU, untrained=True)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="has no checkpoint yet"):
        model_named(str(tmp_path), device=CPU)


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    make_config: MakeConfig, make_folder: MakeFolder, tmp_path: Path
) -> None:
    """It refused the run, though the checkpoint before was whole."""
    plan = RunPlan(data=make_folder(), val_data=None, out=tmp_path / "models/tiny", config=make_config())
    run(plan, tmp_path / "runs/tiny", resume=False, console=Console(quiet=True))
    checkpoints = checkpoints_in(tmp_path / "runs/tiny/checkpoints")
    tensors = checkpoints[0] / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    named = model_named(str(tmp_path / "runs/tiny"), device=CPU)
    assert named.name == f"tiny at step {int(checkpoints[1].name[-8:])}"
    (remark,) = named.remarks
    assert remark.startswith("passed over step-00000006: ")
    assert "SHA-256 differs" in remark
    for checkpoint in checkpoints[1:]:
        (checkpoint / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used; the newest: .*step-00000006"):
        model_named(str(tmp_path / "runs/tiny"), device=CPU)
