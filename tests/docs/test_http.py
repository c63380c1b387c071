"""docs/http.md is run: each example, and the answer that it shows; and it names every route."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app.api.serving import photo
from tests.app.api.test_embed import text_of
from tests.app.running import Service, running_service, write_tiny_bundle

PAGE = (Path(__file__).parents[2] / "docs/http.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
EXAMPLES = re.findall(r"```bash\n(.*?)```\n(?:```json\n(.*?)```)?", PAGE, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the pictures of the examples."""
    made = tmp_path_factory.mktemp("http")
    pictures = {"cat": photo(1), "dog": photo(2)}
    for name, data in pictures.items():
        (made / f"{name}.jpg").write_bytes(data)
    (made / "notes.txt").write_text("no picture")
    lines = [json.dumps({"id": name, "image": text_of(data)}) for name, data in pictures.items()]
    (made / "images.ndjson").write_text("\n".join(lines) + "\n")
    return made


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    with running_service(write_tiny_bundle(folder / "default"), folder / "data") as running:
        yield running


def shape(value: Any) -> Any:  # noqa: ANN401  any JSON
    """Members and kinds of a value; of a list, of its first element."""
    if isinstance(value, dict):
        return {name: shape(member) for name, member in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="the examples are for curl")
def test_every_command_gives_the_answer_that_is_shown(service: Service, folder: Path) -> None:
    assert len(EXAMPLES) > 10
    for command, shown in EXAMPLES:
        # jq is no dependency: the one example that picks a part is picked here.
        whole, _, picked = command.partition(" | jq ")
        done = subprocess.run(
            ["bash", "-c", whole.replace(ADDRESS, service.url)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if not shown:
            assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")
            continue
        answer = json.loads(done.stdout)
        if picked:
            assert picked.strip() == ".data[1]"
            answer = answer["data"][1]
        assert shape(answer) == shape(json.loads(shown)), command


@pytest.mark.parametrize("code", PYTHON, ids=["httpx", "openai"])
def test_the_python_runs(service: Service, folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code.replace(ADDRESS, service.url), names)
    if "client" in names:  # a script leaves it to its end; here that would be a warning
        names["client"].close()


def test_the_page_names_every_route(service: Service) -> None:
    document = httpx.get(f"{service.url}/openapi.json").json()
    table = PAGE.partition("## All routes")[2]
    for path in document["paths"]:
        last = "/" + path.rpartition("/")[2]
        assert path in table or last in table, path
