"""The container files say what the code and the README say; they are built and run outside the tests."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import ENV_PREFIX, Settings, load
from training.settings import RunSettings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    sorted(
        set(re.findall(rf"{ENV_PREFIX}([A-Z_]+)", DOCKERFILE))
        | {
            key.removeprefix(ENV_PREFIX)
            for service in COMPOSE["services"].values()
            for key in service.get("environment", {})
            if key.startswith(ENV_PREFIX)
        }
    ),
)
def test_every_variable_is_a_setting(name: str) -> None:
    assert name.lower() in Settings.model_fields


def test_every_flag_of_the_training_service_is_one_of_dino_train() -> None:
    flags = [word.removeprefix("--") for word in COMPOSE["services"]["train"]["command"] if word[:2] == "--"]
    assert flags
    assert {flag.replace("-", "_") for flag in flags} <= set(RunSettings.model_fields)


def test_every_target_and_folder_exists() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE))
    built = [service["build"] for service in COMPOSE["services"].values() if "build" in service]
    assert {build["target"] for build in built} == targets - {"base"}
    for source in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / path).exists() for path in source.split())


def test_the_port_is_published_on_this_machine_only() -> None:
    """The image listens on every interface of its own and without keys, so the host's must be loopback."""
    for service in COMPOSE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_the_search_server_is_one_of_milvus_that_keeps_its_data_and_says_how_it_is() -> None:
    search = COMPOSE["services"]["search"]
    assert search["profiles"] == ["search"]
    assert re.fullmatch(r"milvusdb/milvus:v2\.6\.\d+", search["image"])
    assert search["environment"]["COMMON_STORAGETYPE"] == "local"
    (data,) = search["volumes"]
    volume, _, directory = data.partition(":")
    assert volume in COMPOSE["volumes"]
    assert search["environment"]["ETCD_DATA_DIR"].startswith(f"{directory}/")
    assert "http://localhost:9091/healthz" in search["healthcheck"]["test"]


def test_serving_finds_the_search_server_where_the_comment_says() -> None:
    comment = (ROOT / "docker-compose.yml").read_text().split("services:")[0]
    (url,) = re.findall(r"SEARCH_URL=(\S+) docker compose --profile search up", comment)
    port = COMPOSE["services"]["search"]["ports"][0].rpartition(":")[2]
    assert url == f"http://search:{port}"
    assert COMPOSE["services"]["serve"]["environment"]["DINO_SERVE_SEARCH_URL"] == "${SEARCH_URL:-}"
    for value, expected in (("", None), (url, url)):
        assert load(Settings, ["--search-url", value], prog="dino-serve run").search_url == expected
    assert "[serve,milvus]" in DOCKERFILE


def test_training_leaves_its_bundle_where_serving_looks() -> None:
    serve, train = COMPOSE["services"]["serve"], COMPOSE["services"]["train"]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in train["volumes"]}
    assert mounts["/models"] == "./models"
    assert "./models:/models:ro" in serve["volumes"]
    assert "MODEL=mine docker compose up" in README
    out = train["command"][train["command"].index("--out") + 1]
    assert out == "/models/${MODEL:-mine}"
    assert serve["environment"]["DINO_SERVE_MODEL"].startswith("/models/${MODEL")
