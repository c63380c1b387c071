"""`index delete` on a running service and on a directory: the same words, the same end."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app import sinks
from app.client import Client
from app.errors import InvalidFilter, StorageError, UnknownCollection
from app.index_deletion import Selection, index_delete
from app.search.collection import Item
from app.search.embedded.library import Collections
from app.settings import SettingsInvalid
from app.sinks import Place
from tests.app.running import running_service, write_tiny_bundle

DIMENSIONS = 48


@pytest.fixture(autouse=True)
def nobody_at_the_default_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may really run a service on this machine."""
    monkeypatch.setattr(sinks, "DEFAULT_URL", "http://127.0.0.1:9")


def fill(data_dir: Path) -> None:
    rng = np.random.default_rng(0)
    with Collections.open(data_dir) as catalogue:
        collection = catalogue.create("album", fingerprint="sha256:f", dimensions=DIMENSIONS)
        items = [
            Item(
                id=f"{n}",
                vector=rng.normal(size=DIMENSIONS).astype(np.float32),
                metadata={"even": n % 2 == 0},
            )
            for n in range(10)
        ]
        collection.upsert(items, fingerprint="sha256:f")


def ids_in(data_dir: Path) -> list[str]:
    with Collections.open(data_dir) as catalogue:
        return [item.id for item in catalogue.get("album").scroll(cursor=None, limit=100).items]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


Answer = Callable[[str], None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """What the user types."""
    return lambda text: monkeypatch.setattr(sys, "stdin", Terminal(text))


def test_items_of_a_directory_are_deleted_by_id_and_by_filter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    place = Place(data_dir=tmp_path)
    some = Selection(ids=("1", "nobody", "1"))
    assert index_delete(some, collection="album", place=place, dry_run=True) == 0
    assert "1 items of 'album' would be deleted" in capsys.readouterr().err
    assert len(ids_in(tmp_path)) == 10
    assert index_delete(some, collection="album", place=place, asks=False) == 0
    even = Selection(filter='{"field": "even", "eq": true}')
    assert index_delete(even, collection="album", place=place, asks=False) == 0
    assert "5 items of 'album' were deleted" in capsys.readouterr().err
    assert ids_in(tmp_path) == ["3", "5", "7", "9"]


def test_the_user_is_asked_and_only_yes_is_yes(
    tmp_path: Path, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    place, everything = Place(data_dir=tmp_path), Selection(everything=True)
    for text in ("", "\n", "n\n", "never\n"):
        answer(text)
        assert index_delete(everything, collection="album", place=place) == 1
    said = capsys.readouterr().err
    assert "Delete the collection 'album' with its 10 items, for good? [y/N]" in said
    assert "nothing was deleted" in said
    assert len(ids_in(tmp_path)) == 10
    answer("y\n")
    assert index_delete(everything, collection="album", place=place) == 0
    with pytest.raises(UnknownCollection):
        ids_in(tmp_path)


def test_where_nobody_can_be_asked_nothing_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(SettingsInvalid, match="say --yes"):
        index_delete(Selection(ids=("1",)), collection="album", place=Place(data_dir=tmp_path))
    assert len(ids_in(tmp_path)) == 10


def test_a_running_service_is_asked_to_delete(tmp_path: Path) -> None:
    fill(tmp_path / "data")
    bundle = write_tiny_bundle(tmp_path / "tiny")
    with running_service(bundle, tmp_path / "data") as service, Client(service.url) as client:
        place = Place(server=service.url)

        def delete(selection: Selection) -> int:
            return index_delete(selection, collection="album", place=place, asks=False)

        assert delete(Selection(ids=("1", "2"))) == 0
        assert delete(Selection(filter='{"field": "even", "eq": true}')) == 0
        assert [item.id for item in client.items("album")] == ["3", "5", "7", "9"]
        assert delete(Selection(everything=True)) == 0
        assert client.collection("album") is None
        with pytest.raises(UnknownCollection, match="index stats"):
            delete(Selection(everything=True))


@pytest.mark.parametrize(
    "said",
    [{}, {"ids": ("a",), "everything": True}, {"ids": ("a",), "filter": "{}"}],
)
def test_one_way_to_say_what_is_wanted(said: dict[str, object]) -> None:
    with pytest.raises(SettingsInvalid, match="--id ID"):
        Selection(**said)  # type: ignore[arg-type]


@pytest.mark.parametrize("filter", ["", "{", "[]", "3", "[" * 100_000])
def test_a_filter_that_is_none_is_refused(filter: str) -> None:
    with pytest.raises(InvalidFilter):
        Selection(filter=filter)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    some = Selection(ids=("a",))
    with pytest.raises(StorageError, match="no directory"):
        index_delete(some, collection="album", place=Place(data_dir=tmp_path / "nowhere"), asks=False)
    fill(tmp_path)
    with pytest.raises(UnknownCollection):
        index_delete(some, collection="none", place=Place(data_dir=tmp_path), asks=False)
    with pytest.raises(InvalidFilter):
        index_delete(Selection(filter="{}"), collection="album", place=Place(data_dir=tmp_path), asks=False)
