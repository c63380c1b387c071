"""Catalogues of every engine: a contract test asks for `catalogue` or `pictures`, and runs once on each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.search.collection import Catalogue, Collection
from app.search.embedded.library import Collections
from app.search.milvus.library import MilvusCollections
from tests.app.search.samples import MODEL, D, milvus_collections

ENGINES = ["embedded", "milvus"]


@pytest.fixture(params=ENGINES)
def catalogue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalogue]:
    if request.param == "embedded":
        with Collections.open(tmp_path) as embedded:
            yield embedded
        return
    with milvus_collections(request.getfixturevalue("milvus_url")) as on_a_server:
        yield on_a_server


@pytest.fixture
def pictures(catalogue: Catalogue) -> Collection:
    return catalogue.create("pictures", fingerprint=MODEL, dimensions=D)


@pytest.fixture
def on_milvus(milvus_url: str) -> Iterator[MilvusCollections]:
    with milvus_collections(milvus_url) as collections:
        yield collections
