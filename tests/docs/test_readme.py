"""The README is read and run: its settings, its tree, its commands and its Python."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from app.settings import Settings
from tests.app.running import Service, running_service

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = ("dino_core", "training", "app")
MODULES = sorted(
    str(path.relative_to(ROOT))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if path.name not in {"__init__.py", "__main__.py"}
)


def between(name: str) -> str:
    found = re.search(rf"<!-- {name}:begin.*?-->\n(.*?)<!-- {name}:end -->", README, re.DOTALL)
    assert found, f"the README has lost its {name} markers"
    return found.group(1)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_in_the_table(name: str) -> None:
    assert f"`--{name.replace('_', '-')}`" in between("settings")


def test_the_table_names_no_setting_that_does_not_exist() -> None:
    named = re.findall(r"^\| `--([a-z-]+)`", between("settings"), re.MULTILINE)
    assert {name.replace("-", "_") for name in named} == set(Settings.model_fields)


def test_the_tree_names_every_module_and_no_other() -> None:
    named: list[str] = []
    folders: list[str] = []
    for line in between("tree").splitlines():
        entry = re.match(r"( *)([\w./-]+)(?=  )", line)
        if not entry:
            continue
        depth = len(entry.group(1)) // 2
        folders = [*folders[:depth], entry.group(2).rstrip("/")]
        if entry.group(2).endswith(".py"):
            named.append("/".join(folders))
    assert sorted(named) == MODULES


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def quick_start(service: Service) -> list[str]:
    """The commands of the quick start, but for the address and the interpreter's place."""
    block = next(block for block in blocks("bash") if "curl" in block)
    commands = [line for line in block.splitlines() if line and not line.startswith("#")]
    return [
        command.replace("http://127.0.0.1:8000", service.url).replace(
            ".venv/bin/dino-serve index add",
            f"{sys.executable} -m app index add --server {service.url}",
        )
        for command in commands
    ]


@pytest.mark.timeout(300)
def test_the_quick_start_works_as_it_stands(tmp_path: Path) -> None:
    with running_service(ROOT / "models/default", tmp_path / "data") as service:
        answers = []
        for command in quick_start(service):
            done = subprocess.run(
                ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stderr}"
            answers.append(done.stdout)
    embedded, similar, by_id = (json.loads(answer) for answer in answers if answer.startswith("{"))
    assert len(embedded["data"][0]["embedding"]) == embedded["model"]["dimensions"]
    assert similar["collection"]["items"] == 60
    nearest, second = similar["data"][0]["neighbours"][:2]
    assert nearest["id"] == "cat/1.jpg"
    assert nearest["score"] > 0.999  # itself: the same bytes
    assert second["id"].startswith("cat/")
    assert by_id["data"][0]["neighbours"][0]["id"] == second["id"]  # an item isn't its own neighbour


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 8, stride=8)
            self.to_latent = torch.nn.Linear(8, 16)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            latent: torch.Tensor = self.to_latent(self.stem(images).mean(dim=(2, 3)))
            return latent

    (code,) = blocks("python")
    training, export = code.split("learner.export(")
    names: dict[str, object] = {"network": Network(), "batches": [torch.rand(2, 3, 64, 64)] * 2}
    exec(training, names)
    assert isinstance(names["embedding"], torch.Tensor)
    assert names["embedding"].shape == (2, 16)
    assert export.startswith('"models/')
