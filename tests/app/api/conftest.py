from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dino_core.bundle import Bundle, load_bundle
from tests.app.api import album as photographs
from tests.app.api.serving import Api, serving
from tests.app.running import write_tiny_bundle

StartApi = Callable[..., Api]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture(scope="session")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another model."""
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "other", seed=1))


@pytest.fixture
def start(bundle: Bundle, tmp_path: Path) -> Iterator[StartApi]:
    """Starts services that end with the test."""
    with ExitStack() as stack:

        def start_one(model: Bundle = bundle, data_dir: Path = tmp_path / "data", **options: Any) -> Api:  # noqa: ANN401
            return stack.enter_context(serving(model, data_dir, **options))

        yield start_one


@pytest.fixture(scope="session")
def api(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service with the default settings for all tests that leave nothing behind."""
    with serving(bundle, tmp_path_factory.mktemp("shared") / "data") as running:
        yield running


@pytest.fixture(scope="session")
def album(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service with the example photographs, for all tests that leave them as they are."""
    with serving(bundle, tmp_path_factory.mktemp("album") / "data") as running:
        photographs.fill(running)
        yield running
