"""What several tests of the service share: a Milvus server, started once."""

import os
from collections.abc import Iterator

import pytest

from tests.app.milvus_server import any_milvus


@pytest.fixture(scope="session")
def milvus_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that all tests share; each takes a space of its own there."""
    with any_milvus(tmp_path_factory.mktemp("milvus")) as url:
        yield url


@pytest.fixture(scope="session", autouse=True)
def _torch_computes() -> None:
    """Services in these tests compute with torch unless a test says otherwise: choosing takes seconds."""
    os.environ.setdefault("DINO_SERVE_BACKEND", "torch")
