"""What cannot be imported is refused with one sentence on the command line; and no file runs anything."""

import argparse
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.training.importing.official import drawn_head, full_checkpoint, golden
from training.cli import main
from training.errors import ConfigError
from training.importing.reading import read_contents, read_file

REPOSITORY = Path(__file__).parents[3]


class Runs:
    """Unpickling it would make a file."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


@pytest.mark.parametrize("where", ["alone", "among the arguments", "as a tensor", "as the numbers' type"])
@pytest.mark.parametrize("what", ["os.system", "eval", "a partial of the interpreter"])
def test_code_in_a_file_is_never_run(where: str, what: str, tmp_path: Path) -> None:
    """Also where the official checkpoints' own classes are allowed."""
    witness = tmp_path / "has-run"
    match what:
        case "os.system":
            code: object = Runs(os.system, f"touch {witness}")
        case "eval":
            code = Runs(eval, f"open({str(witness)!r}, 'w')")
        case _:
            code = Runs(subprocess.Popen, ["touch", str(witness)])
    content: dict[str, object] = dict(full_checkpoint(golden("vit.state."), {"teacher": {}, "student": {}}))
    match where:
        case "alone":
            torch.save(code, tmp_path / "bad.pth")
        case "among the arguments":
            torch.save(content | {"args": argparse.Namespace(arch=code)}, tmp_path / "bad.pth")
        case "as a tensor":
            torch.save({"teacher": {"cls_token": code}}, tmp_path / "bad.pth")
        case _:
            number = Runs(np.float64(1).__reduce__()[0], code, b"\0" * 8)  # type: ignore[arg-type]
            torch.save(content | {"epoch": number}, tmp_path / "bad.pth")
    with pytest.raises(ConfigError, match="holds more than tensors .*which is never run"):
        read_contents(tmp_path / "bad.pth")
    assert not witness.exists()
    # The same bytes without torch's archive around them.
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"teacher": code}))
    with pytest.raises(ConfigError, match="never run|cannot be read"):
        read_contents(tmp_path / "plain.pth")
    assert not witness.exists()


def test_nothing_of_the_arguments_is_kept_and_nothing_stays_allowed(tmp_path: Path) -> None:
    arguments = argparse.Namespace(arch="vit_small")
    arguments.__dict__["__class__"] = "something else"
    torch.save({"args": arguments, "lr": np.float64(0.1), "w": torch.ones(2)}, tmp_path / "a.pth")
    content = read_file(tmp_path / "a.pth")
    assert {type(content[name]).__name__ for name in ("args", "lr")} == {"_Blank"}
    assert vars(content["args"]) == vars(content["lr"]) == {}
    assert torch.equal(content["w"], torch.ones(2))
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "a.pth", weights_only=True)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on stderr."""
    assert main(["import", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dino-train: error: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The official tiny ViT."""
    torch.save(golden("vit.state."), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def test_what_is_no_model_is_refused_with_what_may_be(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "models/x")]
    assert "is not there: give a file" in refused(["nowhere.pth", *out], capsys)
    (tmp_path / "empty").mkdir()
    assert "is no model's directory: config.json" in refused([str(tmp_path / "empty"), *out], capsys)
    (tmp_path / "empty/config.json").write_text('{"model_type": "vit"}')
    assert "has no weights: model.safetensors" in refused([str(tmp_path / "empty"), *out], capsys)
    (tmp_path / "empty/config.json").write_text("[]")
    assert "is neither timm's nor transformers'" in refused([str(tmp_path / "empty"), *out], capsys)
    (tmp_path / "cut.pth").write_bytes(tiny.read_bytes()[: tiny.stat().st_size // 2])
    assert "is damaged or cut short" in refused([str(tmp_path / "cut.pth"), *out], capsys)
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    assert "is damaged or cut short" in refused([str(tmp_path / "cut.safetensors"), *out], capsys)
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8")
    assert "is no file of tensors" in refused([str(tmp_path / "picture.jpg"), *out], capsys)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "holds no tensors by name" in refused([str(tmp_path / "list.pt"), *out], capsys)
    assert not (tmp_path / "models").exists()


def test_what_is_another_network_is_refused_with_what_it_looks_like(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "models/x")]
    said = refused([str(tiny), *out], capsys)
    assert "is a ViT of width 48, depth 3 and patch 8" in said
    assert "give --heads" in said
    assert "which 5 heads cannot share" in refused([str(tiny), *out, "--heads", "5"], capsys)
    said = refused([str(tiny), *out, "--name", "vit_smal_patch8_224"], capsys)
    assert "did you mean vit_small_patch8_224" in said
    said = refused([str(tiny), *out, "--heads", "3", "--image-size", "30"], capsys)
    assert "--image-size 30 is no multiple of the network's patch of 8 px: give 32" in said

    small = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    torch.save(small, tmp_path / "small.pth")
    said = refused([str(tmp_path / "small.pth"), *out, "--name", "vit_base_patch16_224"], capsys)
    assert "in vit_base_patch16_224: the tensors look like vit_small_patch16_224" in said
    torch.save({k: t for k, t in small.items() if k != "norm.bias"}, tmp_path / "lacks.pth")
    assert "lacks norm.bias of vit_small_patch16_224" in refused([str(tmp_path / "lacks.pth"), *out], capsys)
    torch.save(small | {"neck.weight": torch.zeros(2)}, tmp_path / "more.pth")
    assert "has neck.weight, which vit_small_patch16_224 has not" in refused(
        [str(tmp_path / "more.pth"), *out], capsys
    )

    convnext = timm.create_model("convnext_atto").state_dict()
    torch.save(convnext, tmp_path / "convnext.pth")
    said = refused([str(tmp_path / "convnext.pth"), *out], capsys)
    assert "no network is recognised by them; convnext_tiny is nearest" in said
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 8)}, tmp_path / "hf.safetensors")
    assert "give the directory that it lies in" in refused([str(tmp_path / "hf.safetensors"), *out], capsys)
    assert not (tmp_path / "models").exists()


def test_what_is_there_is_left_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/x").write_text("mine")
    words = [str(tiny), "--heads", "3", "--out"]
    assert "is there already" in refused([*words, str(tmp_path / "models/x")], capsys)
    (tmp_path / "models/y.head.safetensors").write_text("mine")
    assert "y.head.safetensors is there already" in refused([*words, str(tmp_path / "models/y")], capsys)
    assert main(["import", *words, str(tmp_path / "models/z")]) == 0
    capsys.readouterr()
    said = refused([str(tmp_path / "models/z"), "--out", str(tmp_path / "models/w")], capsys)
    assert "is a bundle already" in said


def test_without_internet_names_are_refused_with_what_else_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    out = ["--out", str(tmp_path / "models/x")]
    assert "timm's weights of resnet10t.c3_in1k cannot be had" in refused(
        ["timm:resnet10t.c3_in1k", *out], capsys
    )
    assert "hf:nobody/nothing cannot be had" in refused(["hf:nobody/nothing", *out], capsys)
    assert "torchvision has no weights 'resnet5000'" in refused(["torchvision:resnet5000", *out], capsys)


def test_a_head_of_another_bundle_is_not_taken(tiny: Path, tmp_path: Path) -> None:
    from training.importing.headfile import head_file
    from training.starting import described

    heads = {"teacher": drawn_head(48), "student": drawn_head(48, seed=1)}
    torch.save(full_checkpoint(golden("vit.state."), heads), tmp_path / "full.pth")
    assert main(["import", str(tmp_path / "full.pth"), "--heads", "3", "--out", str(tmp_path / "a")]) == 0
    assert (
        main(["import", str(tiny), "--heads", "3", "--image-size", "64", "--out", str(tmp_path / "b")]) == 0
    )
    assert described(str(tmp_path / "a")).head is not None
    assert described(str(tmp_path / "b")).head is None
    head_file(tmp_path / "a").rename(head_file(tmp_path / "b"))
    with pytest.raises(ConfigError, match="is the head of another bundle"):
        described(str(tmp_path / "b"))


def test_the_real_command_line_says_what_became_of_the_tensors(tiny: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training", "import", str(tiny), "--heads", "3", "--out", str(tmp_path / "x")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "42 tensors of the network, all that it has and no others" in done.stdout
    assert f"next: dino-train eval {tmp_path / 'x'}" in done.stdout
