"""SECURITY.md is tested: each test that it names is there, and what it says of the code holds."""

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
SERVED = [path for folder in ("app", "dino_core") for path in sorted((ROOT / folder).rglob("*.py"))]
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# These send what they are told to send, to where they are told; the others have no way out.
MAY_CONNECT = ("app/client/", "app/bench/", "app/fetching.py", "app/search/milvus/")
CONNECTS = {"httpx", "httpcore", "requests", "aiohttp", "urllib.request", "http.client", "pymilvus"}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def test_each_class_of_faults_has_tests_that_are_there() -> None:
    table = SECURITY.split("## Faults of others")[1]
    _, *rows = re.findall(r"^\| [^|]+ \| [^|]+ \| ([^|]*) \|$", table, re.MULTILINE)
    assert len(rows) == table.count("\n| ") - 1 >= 15
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, f"no test is named: {row}"
        for file, name in named:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"


@pytest.mark.parametrize("path", SERVED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_served_unpickles_nothing_and_runs_no_text(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not UNPICKLERS & {name.partition(".")[0] for name in imports(tree)}
    for call in calls(tree):
        called = ast.unparse(call.func)
        assert called not in {"torch.load", "eval", "exec", "os.system", "os.popen", "yaml.load"}
        assert not called.startswith("torch.hub")
        for word in call.keywords:
            value = ast.unparse(word.value)
            assert (word.arg, value) not in {
                ("allow_pickle", "True"),
                ("shell", "True"),
                ("trust_remote_code", "True"),
                ("weights_only", "False"),
                ("verify", "False"),
            }
        if called in {"np.load", "numpy.load", "npy.read_array"}:
            assert "allow_pickle" in {word.arg for word in call.keywords}


def test_nothing_leaves_the_process_but_where_it_is_told_to() -> None:
    ways_out = {
        str(path.relative_to(ROOT))
        for path in SERVED
        if CONNECTS & set(imports(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert {path for path in ways_out if not path.startswith(MAY_CONNECT)} == set()


def test_versions_with_known_faults_can_not_be_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    floors = {(wanted := Requirement(line)).name: wanted.specifier for line in listed}
    bad_and_good = {
        "torch": ("2.9.1", "2.10"),  # CVE-2026-24747
        "pillow": ("12.9", "13.0"),  # CVE-2026-112403
        "starlette": ("1.0.0", "1.0.1"),  # CVE-2026-48710
        "python-multipart": ("0.0.26", "0.0.27"),  # CVE-2026-42561
    }
    for name, (bad, good) in bad_and_good.items():
        assert Version(good) in floors[name]
        assert Version(bad) not in floors[name]
        assert Version(version(name)) >= Version(good)
