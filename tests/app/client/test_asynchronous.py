"""The client for asyncio against a real service: what it answers is what the other answers."""

import asyncio
import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.client import (
    Added,
    AsyncClient,
    Client,
    Embedded,
    Failure,
    NewVector,
    NotFound,
    Upload,
    rows_of,
)
from tests.app.running import Service, picture, running_service, write_tiny_bundle


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with running_service(write_tiny_bundle(folder / "tiny"), folder / "data") as running:
        yield running


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Forty pictures, one that is none, one that can't be read, and a file that isn't looked at."""
    for number in range(40):
        (tmp_path / f"{number % 3}").mkdir(exist_ok=True)
        (tmp_path / f"{number % 3}/{number:02}.jpg").write_bytes(picture(number))
    (tmp_path / "1/bad.png").write_bytes(b"no picture")
    (tmp_path / "2/gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no")
    return tmp_path


def test_both_clients_have_the_same_methods_with_the_same_arguments() -> None:
    def methods(kind: type) -> dict[str, list[inspect.Parameter]]:
        return {
            name: list(inspect.signature(member).parameters.values())
            for name, member in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_") or name == "__init__"
        }

    blocking = methods(Client)
    del blocking["stream"]  # what `app.client.lifecycle` needs, and nobody else
    blocking["aclose"] = blocking.pop("close")
    assert methods(AsyncClient) == blocking


def test_what_one_client_does_the_other_finds(service: Service) -> None:
    async def scenario() -> None:
        async with AsyncClient(service.url) as client:
            assert (await client.info()).model_id == "tiny"
            assert (await client.create_collection("both")).items == 0
            uploads = [Upload(id=f"{n}", data=picture(n), metadata={"n": n}) for n in range(5)]
            assert await client.add("both", uploads[:2]) == [
                Added(id=f"{n}", status="added") for n in range(2)
            ]
            streamed = [one async for one in client.add_stream("both", uploads)]
            assert [one.status for one in streamed if isinstance(one, Added)] == ["unchanged"] * 2 + [
                "added"
            ] * 3
            found = await client.similar(picture(3), collection="both", k=1)
            assert isinstance(found, list)
            assert found[0].id == "3"
            each = await client.similar_each(ids=["0", "nobody"], collection="both")
            assert isinstance(each[1], Failure)
            groups = await client.similar_groups("n", id="0", collection="both")
            assert isinstance(groups, list)
            assert len(groups) == 4
            assert (await client.explain(id="0", collection="both")).items == 5
            assert [item.id async for item in client.items("both")] == [f"{n}" for n in range(5)]
            assert [item and item.id for item in await client.get("both", ["4", "no"])] == ["4", None]
            assert await client.delete("both", ids=["0"]) == 1
            assert await client.undelete("both", ["0"]) == 1
            assert await client.count("both") == 5
            (row,) = await client.embed_array([picture(1)])
            vector = NewVector(id="v", embedding=row, metadata={})
            fingerprint = (await client.info()).fingerprint
            assert [one async for one in client.add_vectors("both", [vector], fingerprint=fingerprint)] == [
                Added(id="v", status="added")
            ]
            assert "both" in {one.name for one in await client.collections()}
            assert (await client.ask("GET", "/collections/both"))["items"] == 6

    asyncio.run(scenario())
    with Client(service.url) as blocking:
        assert blocking.count("both") == 6

    async def end() -> None:
        async with AsyncClient(service.url) as client:
            await client.drop_collection("both")
            assert await client.collection("both") is None
            with pytest.raises(NotFound):
                await client.drop_collection("both")

    asyncio.run(end())


def test_arrays_come_in_order_with_nan_for_what_failed(service: Service) -> None:
    images = [picture(1), b"no picture", picture(2)]
    with Client(service.url) as client:
        rows_BD = client.embed_array(images)
        answers = client.embed(images)
        pixels_BHWC = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        of_pixels_BD = client.embed_pixels(pixels_BHWC)
    assert rows_BD.shape == (3, 48)
    assert rows_BD.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(rows_BD).any(axis=1), [False, True, False])
    np.testing.assert_allclose(rows_BD, rows_of(answers, dimensions=48), atol=1e-6)
    assert rows_of([], dimensions=48).shape == (0, 48)
    np.testing.assert_allclose(np.linalg.norm(of_pixels_BD, axis=1), 1, atol=1e-5)


def test_a_folder_is_embedded_in_order_each_file_failing_for_itself(service: Service, album: Path) -> None:
    with Client(service.url) as client:
        answers = dict(client.embed_folder(album, images_per_request=4, in_flight=3))
        alone = {path: client.embed([path])[0] for path in (album / "0/00.jpg", album / "1/37.jpg")}
    assert list(answers) == sorted(answers)
    assert len(answers) == 42
    failures = {path.name: one.code for path, one in answers.items() if isinstance(one, Failure)}
    assert failures == {"bad.png": "unsupported_format", "gone.jpg": "unreadable_file"}
    for path, one in alone.items():
        other = answers[path]
        assert isinstance(one, Embedded)
        assert isinstance(other, Embedded)
        assert float(one.embedding @ other.embedding) > 0.9999

    async def embed() -> dict[Path, Embedded | Failure]:
        async with AsyncClient(service.url) as client:
            return {path: one async for path, one in client.embed_folder(album, images_per_request=5)}

    again = asyncio.run(embed())
    assert list(again) == list(answers)
    for path, one in again.items():
        before = answers[path]
        if isinstance(one, Failure) or isinstance(before, Failure):
            assert one == before
        else:
            assert one.sha256 == before.sha256
            assert float(one.embedding @ before.embedding) > 0.9999


def test_what_is_no_folder_is_said(service: Service, tmp_path: Path) -> None:
    with Client(service.url) as client, pytest.raises(NotADirectoryError, match="is no folder"):
        client.embed_folder(tmp_path / "nowhere")
