"""Checkpoints: whole and bit-equal, or refused with the reason; the one before is used."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.training.conftest import MakeConfig
from training import checkpoint
from training.checkpoint import (
    checkpoints_in,
    load_checkpoint,
    load_newest,
    most_on_disk,
    save_checkpoint,
    step_of,
)
from training.config import RunConfig
from training.errors import CheckpointError
from training.state import TrainState, new_state
from training.step import train_step

CPU = torch.device("cpu")


def views_of(step: int, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 3, side, side, generator=generator) for side in (size, size, size // 2)]


def trained(config: RunConfig, steps: int = 2, size: int = 16) -> TrainState:
    state = new_state(config, device=CPU)
    for step in range(steps):
        train_step(state, [views_of(step, size)], config=config)
    return state


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="ViT, AdamW"),
        pytest.param({"optimizer": {"name": "sgd"}, "head": {"norm_last_layer": False}}, id="ViT, SGD"),
        pytest.param(
            {"backbone": {"name": "test_resnet", "model_kwargs": {}}, "head": {"batch_norm": True}},
            id="BatchNorm",
        ),
    ],
)
def test_a_loaded_state_goes_on_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = make_config(**changes)
    state = trained(config, size=32)
    path = save_checkpoint(tmp_path, state, config)
    loaded, saved_config = load_checkpoint(path, device=CPU, config=config)
    assert saved_config == config
    assert (loaded.step, loaded.nonfinite_in_a_row) == (2, 0)
    for step in (2, 3):
        one = train_step(state, [views_of(step, 32)], config=config)
        two = train_step(loaded, [views_of(step, 32)], config=config)
        assert one == two
    assert torch.equal(state.center_K, loaded.center_K)
    for name, tensor in state.teacher.state_dict().items():
        assert torch.equal(loaded.teacher.state_dict()[name], tensor), name


def test_only_the_newest_are_kept(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(checkpoints={"keep": 2})
    state = new_state(config, device=CPU)
    for step in (1, 2, 3):
        state.step = step
        save_checkpoint(tmp_path, state, config)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000003", "step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_some_are_kept_for_good(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=9, checkpoints={"keep": 1, "every_steps": 2, "keep_every_steps": 4})
    state, most = new_state(config, device=CPU), 0
    for step in (2, 4, 6, 8, 9):
        state.step = step
        save_checkpoint(tmp_path, state, config)
        most = max(most, len(list(tmp_path.iterdir())))
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [9, 8, 4]
    assert most < most_on_disk(config)  # which counts the one that is being written too


def test_what_is_kept_for_good_must_be_written_at_all(make_config: MakeConfig) -> None:
    with pytest.raises(ValidationError, match="keep_every_steps is 3.*every 2 steps.*give a multiple"):
        make_config(checkpoints={"every_steps": 2, "keep_every_steps": 3})


def test_writing_the_same_state_again_leaves_no_moment_without_it(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoints={"keep": 1})
    state = trained(config)
    path = save_checkpoint(tmp_path, state, config)
    removed: list[Path] = []
    remove = shutil.rmtree

    def noted(path: Path, *, ignore_errors: bool = False) -> None:
        removed.append(path)
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", noted)
        assert (
            save_checkpoint(tmp_path, state, make_config(checkpoints={"keep": 1}, log_every_steps=9)) == path
        )
    assert path not in removed
    loaded, saved = load_checkpoint(path, device=CPU)
    assert (loaded.step, saved.log_every_steps) == (2, 9)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_damaged_one_is_written_anew(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    state = trained(config)
    path = save_checkpoint(tmp_path, state, config)
    flip_a_bit(path)
    save_checkpoint(tmp_path, state, config)
    assert load_checkpoint(path, device=CPU)[0].step == 2


def test_a_checkpoint_holds_no_pickle(make_config: MakeConfig, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, trained(make_config()), make_config())
    assert {file.name for file in path.iterdir()} == {"state.safetensors", "state.json"}
    assert json.loads((path / "state.json").read_text())["step"] == 2


def cut_tensors(path: Path) -> None:
    content = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray((path / "state.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "state.safetensors").write_bytes(content)


def drop_tensors(path: Path) -> None:
    (path / "state.safetensors").unlink()


def cut_description(path: Path) -> None:
    content = (path / "state.json").read_bytes()
    (path / "state.json").write_bytes(content[:40])


def empty_folder(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def foreign_format(path: Path) -> None:
    (path / "state.json").write_text(json.dumps({"format": "another", "format_version": 7}))


def not_an_object(path: Path) -> None:
    (path / "state.json").write_text("[1]")


def without_hash(path: Path) -> None:
    description = json.loads((path / "state.json").read_text())
    del description["sha256"]
    (path / "state.json").write_text(json.dumps(description))


def unknown_setting(path: Path) -> None:
    description = json.loads((path / "state.json").read_text())
    description["config"]["loss"]["koleo"] = 1
    (path / "state.json").write_text(json.dumps(description))


def other_networks_tensors(path: Path) -> None:
    description = json.loads((path / "state.json").read_text())
    description["config"]["head"]["hidden_dim"] = 25
    (path / "state.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(cut_tensors, "it is damaged", id="tensors cut off"),
        pytest.param(flip_a_bit, "it is damaged", id="a bit flipped"),
        pytest.param(drop_tensors, "half-written", id="tensors missing"),
        pytest.param(cut_description, "half-written", id="description cut off"),
        pytest.param(empty_folder, "half-written", id="empty folder"),
        pytest.param(foreign_format, "another program", id="of another program"),
        pytest.param(not_an_object, "another program", id="a list"),
        pytest.param(without_hash, "lacks sha256", id="no hash"),
        pytest.param(unknown_setting, "loss.koleo", id="of a newer version"),
        pytest.param(other_networks_tensors, "not those of its settings", id="tensors of another network"),
    ],
)
def test_a_damaged_one_is_refused_and_the_one_before_is_used(
    make_config: MakeConfig, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    config = make_config()
    state = trained(config)
    save_checkpoint(tmp_path, state, config)
    state.step = 4
    newest = save_checkpoint(tmp_path, state, config)
    damage(newest)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(newest, device=CPU)
    loaded, refused = load_newest(tmp_path, device=CPU, config=config)
    assert loaded is not None
    assert loaded.step == 2
    assert len(refused) == 1
    shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="can be used"):
        load_newest(tmp_path, device=CPU, config=config)


def test_prototypes_that_do_not_match_are_named(make_config: MakeConfig, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, trained(make_config()), make_config())
    with pytest.raises(CheckpointError, match=r"head.num_prototypes \(32 -> 64\)"):
        load_checkpoint(path, device=CPU, config=make_config(head={"num_prototypes": 64}))


def test_a_full_disk_leaves_the_checkpoint_before(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    state = trained(config)
    save_checkpoint(tmp_path, state, config)

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    state.step = 3
    with pytest.raises(CheckpointError, match=r"step 3 cannot be written .*No space left.*--resume"):
        save_checkpoint(tmp_path, state, config)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    loaded, refused = load_newest(tmp_path, device=CPU, config=config)
    assert loaded is not None
    assert refused == []


def test_a_folder_without_checkpoints_has_none(make_config: MakeConfig, tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nothing", device=CPU, config=make_config()) == (None, [])
