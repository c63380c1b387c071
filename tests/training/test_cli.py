"""The command line: what it prints, what it refuses, and with which status."""

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from tests.training.conftest import MakeFolder
from training.cli import main
from training.commands.parsing import parsed
from training.recipes.about import ABOUT
from training.recipes.names import RECIPES
from training.recipes.size import RunSize
from training.settings import RunSettings

FAST = ("--steps", "2", "--batch-size", "4", "--device", "cpu")


def run_words(data: Path | str, tmp_path: Path, name: str = "one") -> list[str]:
    out, run_dir = tmp_path / "models" / name, tmp_path / "runs" / name
    return [
        "run",
        "--data",
        str(data),
        "--recipe",
        "smoke",
        *FAST,
        "--out",
        str(out),
        "--run_dir",
        str(run_dir),
    ]


def test_from_a_folder_to_a_measured_exported_bundle(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(per_class=8, corrupt=1)
    assert main([*run_words(data, tmp_path), "--optimizer.peak_lr", "2e-4"]) == 0
    assert "serve it: dino-serve run --model" in capsys.readouterr().err
    saved = json.loads((tmp_path / "runs" / "one" / "config.json").read_text())
    assert saved["config"]["optimizer"]["peak_lr"] == 2e-4

    bundle, report, vectors = tmp_path / "models" / "one", tmp_path / "report.json", tmp_path / "vectors.npz"
    words = [
        "eval",
        str(bundle),
        "--data",
        str(data),
        "--json-file",
        str(report),
        "--embeddings",
        str(vectors),
        "--card",
        str(tmp_path / "card.md"),
        "--plot",
        str(tmp_path / "bars.png"),
        "--robustness",
        "5",
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "k-NN, k = 10" in printed
    assert "broken-0.jpg" in printed
    assert "| k-NN, k = 10 |" in (tmp_path / "card.md").read_text()
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads(report.read_text())
    measured, *beside = results["models"]
    assert [one["model"] for one in beside] == ["one untrained", "raw pixels", "pHash"]
    assert [one["than"] for one in results["comparisons"]] == [one["model"] for one in beside]
    assert "32 px" not in measured["robustness"], "these pictures are smaller"
    assert measured["robustness"]["jpeg 50"]["cosine"]["queries"] == 5
    assert set(measured["quantised"]) == {"float32", "int8", "binary"}
    assert measured["images"] == 16
    assert measured["fingerprint"].startswith("sha256:")
    with np.load(vectors) as file:
        assert len(file["embeddings"]) == len(file["paths"]) == 16

    words = ["eval", str(bundle), "--data", str(data), "--json-file", str(report), "--scales", "0.75,1,1.5"]
    assert main([*words, "--robustness", "0", "--no-quantise"]) == 0
    several, single = json.loads(report.read_text())["models"][:2]
    assert (several["model"], single["model"]) == ("one at 24, 32, 48 px", "one")
    assert several["fingerprint"] is None, "these are not the vectors of the bundle"
    assert single["spread"] == measured["spread"] != several["spread"]
    assert main(["eval", str(bundle), "--data", str(data), "--scales", "0,1"]) == 2
    assert "give numbers above 0 that make different sizes" in capsys.readouterr().err
    checkpoint = tmp_path / "runs" / "one" / "checkpoints" / "step-00000002"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "models" / "two")]) == 0
    one, two = (tmp_path / "models" / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "models" / "two")]) == 2
    assert "is there already" in capsys.readouterr().err


def test_attention_is_drawn_for_a_vit_and_refused_for_others(
    make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder()
    words = run_words(data, tmp_path)
    kwargs = '{"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}'
    vit = ["--backbone.name", "vit_tiny_patch16_224", "--backbone.model-kwargs", kwargs]
    assert main([*words, *vit]) == 0
    bundle, picture = str(tmp_path / "models" / "one"), data / "down" / "down-1.png"
    assert main(["attention", bundle, str(picture), "--out", str(tmp_path / "maps")]) == 0
    assert (tmp_path / "maps" / "down-1.attention.png").read_bytes().startswith(b"\x89PNG")
    two = [str(picture), str(data / "across" / "across-1.png"), str(picture)]
    assert main(["attention", bundle, *two, "--out", str(tmp_path / "all")]) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        "down-1.attention.png",
        "across-1.attention.png",
        "down-1-2.attention.png",
        "patches.png",
    }
    assert main(["attention", bundle, str(tmp_path / "no.png"), "--out", str(tmp_path / "maps")]) == 2
    assert "no.png cannot be read" in capsys.readouterr().err

    assert main(run_words(data, tmp_path, "resnet")) == 0
    capsys.readouterr()
    assert main(["attention", str(tmp_path / "models" / "resnet"), str(picture)]) == 2
    assert "dino-train: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(["frob"], "there is no command 'frob'", id="command"),
        pytest.param(["run"], "--data DIR", id="no data"),
        pytest.param(["run", "--data", "/nowhere/at/all"], "not there", id="no folder"),
        pytest.param(
            ["run", "--resume", "--run-dir", "/nowhere"], "no run to resume", id="nothing to resume"
        ),
        pytest.param(["eval", "/nowhere", "--data", "."], "/nowhere", id="no bundle"),
        pytest.param(["eval", "/nowhere"], "measure on what? Give --data", id="eval without data"),
        pytest.param(["export", "/nowhere", "--out", "x"], "is no checkpoint", id="no checkpoint"),
        pytest.param(["recipes", "cpuu"], "there is no recipe 'cpuu'", id="recipe"),
        pytest.param(["recipes", "--num-images", "0"], "num_images: input should be greater", id="no images"),
        pytest.param(["recipes", "--frob"], "no flag --frob; `dino-train recipes --help`", id="unknown flag"),
        pytest.param(
            ["run", "--optimizer.peek-lr", "3"], "did you mean --optimizer.peak-lr?", id="misspelt flag"
        ),
        pytest.param(["run", "--peak_lr", "3"], "did you mean --optimizer.peak-lr?", id="part left out"),
        pytest.param(["run", "--batchsize=3"], "did you mean --batch-size?", id="dash left out"),
    ],
)
def test_bad_words_end_in_one_sentence_and_status_two(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("dino-train: error: ")
    assert complaint.count("\n") == 1
    assert sentence in complaint


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        pytest.param(["--backbone.name", "resnett18"], "did you mean resnet18", id="backbone"),
        pytest.param(["--batch-size", "500"], "the batch size is 500", id="more than there is"),
        pytest.param(["--optimizer.peak-lr", "-1"], "optimizer.peak_lr: input should be greater", id="rate"),
        pytest.param(["--loss.teacher-temperature", "0.5"], "the teacher must be the sharper one", id="dull"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_trains(
    make_folder: MakeFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    sentence: str,
) -> None:
    assert main([*run_words(make_folder(), tmp_path), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "models" / "one").exists()


def test_an_unknown_variable_is_refused(
    make_folder: MakeFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DINO_TRAIN_LERNRATE", "3")
    assert main(run_words(make_folder(), tmp_path)) == 2
    assert "DINO_TRAIN_LERNRATE names no setting" in capsys.readouterr().err


def test_recipes_are_listed_with_what_is_known_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name, about in ABOUT.items():
        lines = listed.split(f"{name}: ", maxsplit=1)[1].split("\n\n")[0]
        assert all(words in lines for words in (about.data, about.takes, about.result, about.source)), name
    assert (
        "network resnet18, crops 2 x 128 + 6 x 64 px, 2,048 prototypes, 7,200 steps of 256 images" in listed
    )
    assert "--weights models/NAME" in listed


@pytest.mark.parametrize("name", ["cpu", "resnet18-cifar10", "vit-small-16-imagenet"])
def test_a_recipe_is_printed_as_a_settings_file_that_gives_it_again(
    name: str, make_folder: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", name, "--num-images", "1000"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "mine.toml").write_text(printed)
    settings = parsed(
        RunSettings, "run", ["--data", str(make_folder()), "--config", str(tmp_path / "mine.toml")]
    )
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    assert settings.plan().config == RECIPES[name](RunSize(num_images=1000, device=device)).config
    official = [line for line in printed.splitlines() if "# official" in line]
    assert len(official) == (0 if name == "vit-small-16-imagenet" else len(official))
    assert all(re.search(r"# official .+: \S", line) for line in official)
    if name == "resnet18-cifar10":
        assert 'name = "resnet18"  # official "vit_small_patch16_224": the source\'s first layer' in printed


def test_help_says_where_settings_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "dino-train COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["run", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "--optimizer.peak-lr" in text
    assert "DINO" not in text.split("--optimizer.peak-lr")[0].split("usage")[0]
    line = text.split("--loss.student-temperature float")[-1].split("--")[0]
    assert "default" not in line, "the recipe's value is meant, not the class's"


def test_without_a_command_the_usage_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: dino-train COMMAND" in capsys.readouterr().out
